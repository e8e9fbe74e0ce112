"""Processes that train one autoencoder together (docs/dictionary_parallel.md), and what they can't divide."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Discriminator, Tag

from orchestrator.sweeps.axes import Positive, Range, at_width
from orchestrator.sweeps.space import TRAIN, Space
from sae.fit import FitConfig


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Ranks in rows and columns: rank b*latents + a holds piece a, and is given part b of the batch."""

    latents: Positive = 1
    """Ranks among which the latents are divided: of weights and moments each has so much less."""

    batch: Positive = 1
    """Ranks among which the tokens of a batch are divided."""

    @property
    def n_ranks(self) -> int:
        """Processes of a trial."""
        return self.latents * self.batch


Ranks = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[RankGrid, Tag("grid")],
    Discriminator(lambda value: "grid" if isinstance(value, Mapping | RankGrid) else "number"),
]
"""A grid, or how many ranks share the latents."""


def indivisible(space: Space, base: FitConfig, grid: RankGrid) -> Iterator[str]:
    """What some corner of a sweep has too few of: `path: what is, what was allowed, what to do`."""
    encoders, sizes = (space.axes[name].ends for name in ("encoder", "d_sae"))
    for (encoder, path), (d_sae, where) in itertools.product(encoders, sizes):
        try:
            shape = at_width(encoder, d_sae)
        except ValueError:
            continue  # it is told elsewhere
        n_pieces, kind = (d_sae, "latents") if shape == "dense" else (shape.h, "heads")
        if n_pieces < grid.latents:
            yield (
                f"sweep.{where if shape == 'dense' else path}: its {n_pieces} {kind} can't be divided "
                f"among {grid.latents} ranks, of which each holds one at least; lower "
                "compute.ranks_per_trial, or widen the dictionary"
            )
    axis = space.axes.get(f"{TRAIN}batch_tokens")
    batches = [(base.batch_tokens, "train.batch_tokens")]
    if axis:
        batches = [(size, f"sweep.{path}") for size, path in axis.ends]
    for size, path in batches:
        if size % grid.batch or (grid.batch > 1 and axis and isinstance(axis.values, Range)):
            yield (
                f"{path}: {size} tokens can't be divided evenly among the {grid.batch} ranks that share a "
                f"batch (compute.ranks_per_trial); give multiples of {grid.batch}, in a list"
            )
