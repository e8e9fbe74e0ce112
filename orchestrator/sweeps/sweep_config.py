"""The section `sweep`: which autoencoders are trained, how they are chosen, and when one is given up."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.sweeps.axes import (
    EncoderShapes,
    FloatRange,
    IntRange,
    KronRule,
    Listed,
    ListOrRange,
    Positive,
    Range,
)
from orchestrator.sweeps.space import TRAIN, Axis, Space, impossible

Selection = Literal["topk", "batch_topk"]
Scaling = Literal["layer_scale", "token_standardize"]
_ABSENT = Field(exclude_if=lambda value: value is None)
Ints = Annotated[ListOrRange[Positive, IntRange] | None, _ABSENT]
Floats = Annotated[ListOrRange[float, FloatRange] | None, _ABSENT]


@dataclass(frozen=True, kw_only=True)
class VaryTraining:
    """Settings of training that trials differ in: `sae.fit.FitConfig` says what they are.

    Not those of JumpReLU, which no sweep trains.
    """

    batch_tokens: Ints = None
    lr: Annotated[ListOrRange[float | None, FloatRange] | None, _ABSENT] = None
    weight_decay: Floats = None
    betas: Annotated[Listed[tuple[float, float]] | None, _ABSENT] = None
    warmup_fraction: Floats = None
    decay_fraction: Floats = None
    auxk_coefficient: Floats = None
    dead_after_tokens: Ints = None
    grad_clip: Floats = None
    threshold_momentum: Floats = None
    prefix_weights: Annotated[Listed[Literal["equal", "size"]] | None, _ABSENT] = None


@dataclass(frozen=True, kw_only=True)
class Vary:
    """Settings that trials differ in, beside those with a list of their own."""

    d_sae: Ints = None
    """In place of the one `sweep.d_sae`."""

    prefixes: Annotated[Listed[tuple[Positive, ...]] | None, _ABSENT] = None
    """Matryoshka: each a list of nested sizes, the last one d_sae; [] is d_sae alone."""

    scaling: Annotated[Listed[Scaling] | None, _ABSENT] = None

    train: VaryTraining = field(default_factory=VaryTraining)

    def axes(self, path: str) -> Iterator[tuple[str, Axis]]:
        """Those that are given; `path` is where this section stands."""
        for prefix, section in (("", self), (TRAIN, self.train)):
            for setting in fields(section):
                values = getattr(section, setting.name)
                if isinstance(values, tuple | Range):
                    name = f"{prefix}{setting.name}"
                    yield name, _axis(values, f"{path}.{name}")


@dataclass(frozen=True, kw_only=True)
class GroupAxes:
    """What one group has in place of the sweep's own lists."""

    k: Annotated[Listed[Positive] | None, _ABSENT] = None
    encoders: Annotated[Listed[EncoderShapes] | None, _ABSENT] = None
    selection: Annotated[Listed[Selection] | None, _ABSENT] = None
    vary: Vary = field(default_factory=Vary)
    """Settings that are not named vary as in all other groups."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which combinations of the axes are tried."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """All; drawn at random; or suggested by Optuna, which learns from trials that have ended."""

    trials: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """How many of them, for each k of each group: random and optuna need it."""

    def __post_init__(self) -> None:
        """Refuse a number where there is nothing to count, and the reverse."""
        if self.method == "grid" and self.trials:
            raise ValueError(
                f"trials: {self.trials}, but a grid has as many as there are combinations; leave it "
                "out, or set method to random or optuna"
            )
        if self.method != "grid" and not self.trials:
            raise ValueError(f"method: {self.method} needs a number of trials; add trials: 20")


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a trial is given up. Only trials of one group, k and d_sae are compared."""

    method: Literal["none", "asha", "median"] = "none"
    """Never; when it is not among the best at a rung; or when it is worse than the median of the others."""

    grace: Annotated[float, Field(ge=0.001, lt=1)] = 0.1
    """Share of its steps that every trial is given; with asha the first rung."""

    reduction: Annotated[float, Field(ge=1.1, le=1000)] = 3.0
    """Of asha: one trial in so many goes on from a rung; the next is so many times further."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The autoencoders that are trained on every group: all combinations of the lists, or some."""

    d_sae: Positive
    """Latents of every autoencoder, unless `vary` says otherwise."""

    k: Listed[Positive]
    """Latents kept per token (on average, for batch_topk)."""

    encoders: Listed[EncoderShapes] = ("dense",)
    """`dense`, the Kronecker shape {h, m, n} with h*m*n = d_sae, or the rule {kron: {m: [..], n: [..]}}."""

    selection: Listed[Selection] = ("topk",)
    """How the k latents are chosen: per token, or over the batch."""

    scaling: Scaling = "layer_scale"
    """How activations are scaled before they are encoded."""

    vary: Vary = field(default_factory=Vary)
    """Other settings that trials differ in: lists, or ranges {min, max, log}."""

    groups: dict[int, GroupAxes] = field(default_factory=dict)
    """What single groups have in place of the lists above, by the group's number."""

    search: SearchConfig = field(default_factory=SearchConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    tokens: Annotated[int, Field(ge=1, le=10**12)] = 1_000_000
    """Activations each autoencoder is trained on; more than the store holds means more epochs."""

    window_chunks: Positive | None = None
    """Chunks mixed at a time; more is a better shuffle. Compressed ones, or those of a bucket, are held in
    memory, two windows of them. By default as many as `storage.windows.chunks_to_mix`."""

    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Time between checkpoints of a trial, or twenty times what writing one takes if that is longer: the
    most that a crash can cost. One is written when the run is interrupted, too."""

    winner: Literal["lowest_fvu_per_k", "lowest_fvu"] = "lowest_fvu_per_k"
    """Which trials of a group are evaluated: the best for each k, or the best alone."""

    def __post_init__(self) -> None:
        """Refuse every impossible combination, all at once."""
        faults: dict[str, None] = {}
        for k, space in self.kinds():
            faults |= dict.fromkeys((*impossible(k, space), *self._unsearchable(space)))
        if faults:
            raise ValueError("\n".join(faults))

    def kinds(self) -> Iterator[tuple[Axis, Space]]:
        """The k and the space of groups that have nothing of their own, and of each that has."""
        return (self.of_group(group) for group in (None, *self.groups))

    def of_group(self, group: int | None) -> tuple[Axis, Space]:
        """The k and the space of a group; of None, what groups have without a section of their own."""
        mine = self.groups.get(group, GroupAxes()) if group is not None else GroupAxes()

        def lists(name: str) -> tuple[Any, str]:
            own = getattr(mine, name)
            return (own, f"groups[{group}].{name}") if own else (getattr(self, name), name)

        k, selection = (_axis(*lists(name)) for name in ("k", "selection"))
        return k, Space(
            {
                "encoder": _encoder_axis(*lists("encoders")),
                "selection": selection,
                "d_sae": Axis((self.d_sae,), ("d_sae",)),
                "prefixes": Axis(((),), ("vary.prefixes",)),
                "scaling": Axis((self.scaling,), ("scaling",)),
                **dict(self.vary.axes("vary")),
                **dict(mine.vary.axes(f"groups[{group}].vary")),
            }
        )

    def _unsearchable(self, space: Space) -> Iterator[str]:
        wanted = self.search.trials or 0
        if wanted > space.size:
            yield (
                f"search.trials: {wanted} is more than the {space.size:.0f} combinations that there "
                "are; lower it, or set search.method to grid"
            )
        for axis in space.axes.values() if self.search.method == "grid" else ():
            if isinstance(axis.values, Range):
                yield (
                    f"{axis.paths[0]}: a range has no grid; list its values, or choose some: "
                    "sweep.search: {method: random, trials: 20}"
                )


def _axis(values: tuple[Any, ...] | Range, path: str) -> Axis:
    if isinstance(values, Range):
        return Axis(values, (path,))
    return Axis(values, tuple(f"{path}[{i}]" for i in range(len(values))))


def _encoder_axis(shapes: tuple[Any, ...], path: str) -> Axis:
    """Rules become the shapes they stand for."""
    encoders = [
        (encoder, f"{path}[{i}].kron" if isinstance(shape, KronRule) else f"{path}[{i}]")
        for i, shape in enumerate(shapes)
        for encoder in (shape.heads if isinstance(shape, KronRule) else (shape,))
    ]
    values, paths = zip(*encoders, strict=True)
    return Axis(values, paths)
