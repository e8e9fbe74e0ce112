"""Whoever may have read parts of a store already, for all processes of a machine."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped


@runtime_checkable
class ChunkSource(Protocol):
    """Decoded parts of one store; what it does not have is read from the store."""

    def chunk(self, array: str, chunk: int) -> Shaped[np.ndarray, "rows d_model"] | None:
        """A chunk of an array, as stored and not to be written to; None if it is not to be had."""
        ...

    def column(self, name: str, shard: int) -> Shaped[np.ndarray, " rows"] | None:
        """A column of a shard, not to be written to; None if it is not to be had."""
        ...
