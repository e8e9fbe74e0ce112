"""The space of one sweep on one group: its axes, what is impossible in it, and its combinations."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from orchestrator.sweeps.axes import Range, at_width
from sae.config import KronShape, SaeConfig
from sae.fit import FitConfig


@dataclass(frozen=True)
class Axis:
    """What one setting is chosen from."""

    values: tuple[Any, ...] | Range

    paths: tuple[str, ...]
    """Where in the section `sweep` each value stands; of a range, the one place of it."""

    @property
    def ends(self) -> list[tuple[Any, str]]:
        """The values, or the ends of the range, each with its place."""
        if isinstance(self.values, Range):
            return [(self.values.min, self.paths[0]), (self.values.max, self.paths[0])]
        return list(zip(self.values, self.paths, strict=True))

    @property
    def size(self) -> int | float:
        """How many values there are."""
        return self.values.size if isinstance(self.values, Range) else len(self.values)

    def draw(self, rng: Random) -> Any:
        """One value."""
        return self.values.draw(rng) if isinstance(self.values, Range) else rng.choice(self.values)


Choice = Mapping[str, Any]
"""A value of every axis."""

TRAIN = "train."
"""Prefix of the axes that are settings of training."""


@dataclass(frozen=True)
class Space:
    """The axes `encoder`, `selection`, `d_sae`, `prefixes`, `scaling` and those of training."""

    axes: Mapping[str, Axis]

    @property
    def size(self) -> int | float:
        """How many combinations there are."""
        return math.prod(axis.size for axis in self.axes.values())

    def grid(self) -> Iterator[Choice]:
        """Every combination of lists, in a fixed order; of ranges, the ends."""
        values = [[value for value, _ in axis.ends] for axis in self.axes.values()]
        return (dict(zip(self.axes, choice, strict=True)) for choice in itertools.product(*values))

    def draws(self, rng: Random) -> Iterator[Choice]:
        """Combinations drawn at random, without end; one may come again."""
        while True:
            yield {name: axis.draw(rng) for name, axis in self.axes.items()}

    def label(self, choice: Choice) -> str:
        """What tells a combination from others, beside encoder and selection; with a leading dash."""
        return "".join(
            f"-{name.removeprefix(TRAIN)}{_spelt(choice[name])}"
            for name, axis in self.axes.items()
            if name not in ("encoder", "selection") and axis.size > 1
        )

    def without_training(self) -> "Space":
        """The axes of the autoencoder alone."""
        return Space({name: axis for name, axis in self.axes.items() if TRAIN not in name})


def sae_config(choice: Choice, k: int, d_model: int) -> SaeConfig:
    """The autoencoder of a combination.

    Raises:
        ValueError: If it is impossible.
    """
    return SaeConfig(
        d_model=d_model,
        d_sae=choice["d_sae"],
        k=k,
        encoder=at_width(choice["encoder"], choice["d_sae"]),
        selection=choice["selection"],
        prefixes=choice["prefixes"],
        scaling=choice["scaling"],
    )


def fit_config(choice: Choice, base: FitConfig) -> FitConfig:
    """How the autoencoder of a combination is trained, where it differs from `base`.

    Raises:
        ValueError: If it is impossible.
    """
    varied = {n.removeprefix(TRAIN): value for n, value in choice.items() if n.startswith(TRAIN)}
    return replace(base, **varied)


def impossible(k: Axis, space: Space) -> Iterator[str]:
    """What can't be built in some corner of a space: `path: what is, what was allowed, what to do`."""
    for name, axis in {"k": k, **space.axes}.items():
        if isinstance(axis.values, tuple) and name != "encoder":
            for i, (value, path) in enumerate(axis.ends):
                if value in axis.values[:i]:
                    yield f"{path}: {_spelt(value)} is listed twice; name each once"
    sizes = space.axes["d_sae"]
    least, where = min(sizes.ends)
    corner = "" if where == "d_sae" else f" ({where})"
    for number, path in k.ends:
        if number > least:
            yield f"{path}: {number} exceeds d_sae = {least}{corner}; lower k or widen the dictionary"
    possible: list[tuple[int, Any]] = []
    for (encoder, path), (d_sae, _) in itertools.product(space.axes["encoder"].ends, sizes.ends):
        try:
            if isinstance(sizes.values, Range) and encoder != "dense":
                raise ValueError(
                    f"h*m*n = d_sae does not hold for every number of {where}; list the sizes "
                    "there, or leave Kronecker encoders out"
                )
            shape = at_width(encoder, d_sae)
        except ValueError as error:
            yield f"{path}: {error}"
            continue
        if (d_sae, shape) in possible:
            yield f"{path}: {_spelt(shape)} is listed twice; name each once"
        possible.append((d_sae, shape))
    yield from _without_effect(space)
    for prefixes, path in space.axes["prefixes"].ends:
        for d_sae, shape in possible if prefixes else ():
            try:
                SaeConfig(d_model=1, d_sae=d_sae, k=1, encoder=shape, prefixes=prefixes)
            except ValueError as error:
                yield f"{path}: {error}"


def _without_effect(space: Space) -> Iterator[str]:
    """Axes along which all trials would be the same."""
    needs = {
        "prefix_weights": ("prefixes", lambda value: len(value) > 1, "vary.prefixes"),
        "threshold_momentum": ("selection", lambda value: value == "batch_topk", "batch_topk"),
    }
    for setting, (name, uses_it, wanted) in needs.items():
        axis = space.axes.get(f"{TRAIN}{setting}")
        if axis and not any(uses_it(value) for value, _ in space.axes[name].ends):
            where = axis.paths[0].removesuffix("[0]")
            yield f"{where}: no trial of this sweep uses it; add {wanted}, or leave it out"


def impossible_training(space: Space, base: FitConfig) -> Iterator[str]:
    """The same of training, for every two values of its axes; no setting depends on more than one other."""
    axes = {n.removeprefix(TRAIN): a for n, a in space.axes.items() if n.startswith(TRAIN)}
    firsts = {name: axis.ends[0][0] for name, axis in axes.items()}
    for (a, first), (b, second) in itertools.combinations_with_replacement(axes.items(), 2):
        for (x, at), (y, path) in itertools.product(first.ends, second.ends):
            varied = {**firsts, a: x, b: y}
            try:
                replace(base, **varied)
            except ValueError as error:
                for line in str(error).splitlines():
                    name, _, text = line.partition(": ")
                    if name in (a, b):
                        yield f"{path if name == b else at}: {text}"
                    elif name not in axes:  # else it is told where that axis is looked at
                        yield f"{path}: with it train.{line}"


def _spelt(value: Any) -> str:
    """A value as a part of a file name."""
    if isinstance(value, KronShape):
        return f"{value.h}x{value.m}x{value.n}"
    if isinstance(value, tuple):
        return ".".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
