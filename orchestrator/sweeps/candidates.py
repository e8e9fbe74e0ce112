"""The autoencoders that a sweep trains on a group, as validated objects with a name each."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from operator import attrgetter
from random import Random

from actors.trial import encoder_settings
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.labels import encoder_label
from orchestrator.sweeps.space import Choice, Space, fit_config, sae_config
from sae.config import SaeConfig
from sae.fit import FitConfig

PATIENCE = 200
"""Draws for each trial that is wanted: a narrow range may hold fewer."""

LONGEST_NAME = 180
"""Characters: file systems take 255 bytes. A longer name is cut, and ends in a hash of the whole."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One autoencoder and its training."""

    id: str
    """Unique in the run, for instance `g0-k16-kron-128x2x4-batch_topk-lr0.001`."""

    group: int
    sae: SaeConfig
    fit: FitConfig


def candidate(
    cfg: RunConfig, group: int, k: int, space: Space, choice: Choice, d_model: int
) -> Candidate:
    """A combination of a group's space, with a name that tells what varies."""
    sae = sae_config(choice, k, d_model)
    encoder = encoder_label(encoder_settings(sae.encoder)).replace(" ", "-")
    name = f"g{group}-k{k}-{encoder}-{sae.selection}{space.label(choice)}"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:12]}"
    return Candidate(
        id=name,
        group=group,
        sae=sae,
        fit=fit_config(choice, cfg.train),
    )


def candidates(cfg: RunConfig, group: int, d_model: int) -> Iterator[Candidate]:
    """All of a group, in a fixed order: the grid, or the draws that the seed decides.

    What Optuna suggests is not known beforehand: of it there is nothing here, but that there can be as many.

    Raises:
        UserError: If ranges hold fewer different numbers than trials are wanted.
    """
    k, space = cfg.sweep.of_group(group)
    for number, _ in k.ends:
        if cfg.sweep.search.method == "grid":
            choices = space.grid()
            yield from (candidate(cfg, group, number, space, c, d_model) for c in choices)
            continue
        drawn = _drawn(cfg, group, number, space, d_model)
        if cfg.sweep.search.method == "random":
            yield from drawn


def _drawn(cfg: RunConfig, group: int, k: int, space: Space, d_model: int) -> Sequence[Candidate]:
    wanted = cfg.sweep.search.trials or 0
    found: dict[str, Candidate] = {}
    for choice in islice(space.draws(Random(f"{cfg.seed}/{group}/{k}")), wanted * PATIENCE):
        drawn = candidate(cfg, group, k, space, choice, d_model)
        found.setdefault(drawn.id, drawn)
        if len(found) == wanted:
            break
    if len(found) < wanted:
        raise too_narrow(len(found), cfg)
    return list(found.values())


def too_narrow(found: int, cfg: RunConfig) -> UserError:
    """What to tell of ranges that hold fewer different numbers than trials are wanted."""
    return UserError(
        f"sweep.search.trials: {cfg.sweep.search.trials} are wanted for each k of each group, and {found} different ones "
        "were found, as numbers of a range have four digits; widen the ranges, or lower it"
    )


def n_candidates(cfg: RunConfig, group: int) -> int:
    """How many autoencoders are trained on a group; with narrow ranges the most there can be."""
    k, space = cfg.sweep.of_group(group)
    return len(k.ends) * (
        cfg.sweep.search.trials or math.prod(len(a.ends) for a in space.axes.values())
    )


def foreseen(cfg: RunConfig, group: int, d_model: int) -> list[SaeConfig]:
    """The autoencoders of a group; of what Optuna will suggest, the largest there can be.

    Raises:
        UserError: As `candidates`.
    """
    known = [found.sae for found in candidates(cfg, group, d_model)]
    if cfg.sweep.search.method != "optuna":
        return known
    size = attrgetter("n_parameters", "training_flops_per_token")
    return [max(corners(cfg, d_model, group), key=size)] * n_candidates(cfg, group)


def corners(cfg: RunConfig, d_model: int, group: int | None = None) -> Iterator[SaeConfig]:
    """The autoencoders of a group (or of all) in which every range is at one of its ends."""
    kinds = cfg.sweep.kinds() if group is None else [cfg.sweep.of_group(group)]
    for k, space in kinds:
        for number, _ in k.ends:
            for choice in space.without_training().grid():
                yield sae_config(choice, number, d_model)


def largest_batch(cfg: RunConfig) -> int:
    """Tokens of the largest batch that any trial trains on."""
    axes = (space.axes.get("train.batch_tokens") for _, space in cfg.sweep.kinds())
    sizes = [size for axis in axes if axis for size, _ in axis.ends]
    return max(sizes, default=cfg.train.batch_tokens)
