"""Memory for rows that is used again and again."""

import weakref

import numpy as np
from jaxtyping import Shaped


class RowMemory:
    """Memory of rows that nobody holds any more, for the next ones.

    Fresh memory is given by the system page by page, which takes as long as the copy into it.
    """

    def __init__(self, n_rows: int, d_model: int, dtype: np.dtype) -> None:
        """For at most so many rows at a time."""
        self.shape, self.dtype = (n_rows, d_model), dtype
        self._free: list[np.ndarray] = []

    def borrow(self, n_rows: int) -> Shaped[np.ndarray, "rows d_model"]:
        """Room for some rows. It is free again when this very array is gone, so no view may outlive it."""
        memory = self._free.pop() if self._free else np.empty(self.shape, self.dtype)
        lent = memory[:n_rows]
        weakref.finalize(lent, self._free.append, memory)
        return lent
