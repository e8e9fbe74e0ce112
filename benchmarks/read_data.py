"""Rows for the reading benchmark: the first number of each is its sequence, so that mixing can be counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

LOOKED_AT = 8
"""Of so many batches one is looked at, so that looking costs little."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the rows, and of what every contender makes of them."""

    n_sequences: int = 1408
    """Below 2048, so that float16 can count them."""
    context: int = 512
    d_model: int = 768
    batch_rows: int = 4096

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Size":
        """The size that `vars` of one has made arguments of."""
        return cls(**{name: arguments[name] for name in cls.__dataclass_fields__})

    @property
    def n_bytes(self) -> int:
        """In float16."""
        return 2 * self.n_sequences * self.context * self.d_model

    def rows(self, sequences: Tensor, generator: torch.Generator) -> Tensor:
        """(sequences * context, d_model) in float16."""
        shape = len(sequences), self.context, self.d_model
        x = torch.randn(shape, generator=generator).half()
        x[:, :, 0] = sequences[:, None].half()
        return x.flatten(0, 1)


def distinct(firsts: Sequence[Tensor]) -> dict[str, float]:
    """Mean number of sequences in a batch, from the first numbers of its rows."""
    return {"distinct": fmean(len(first.unique()) for first in firsts)}
