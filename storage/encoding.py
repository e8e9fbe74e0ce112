"""Activations as a shard stores them: scaled, rounded, and with what is noted of each row.

Rows are encoded on the device where the model computes, so a GPU hands over no more bytes than are
stored; on a CPU block by block, so that each is read from memory once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from storage.dtypes import largest_value, stored_dtype
from storage.layout import StoreSpec
from storage.row_memory import RowMemory

_BLOCK_VALUES = 512 * 768
"""Of a block on the CPU, which stays in the cache of a core."""

_NONE_CLIPPED = torch.zeros(0, dtype=torch.int64)

_SMALLEST = 127 * 2.0**-96
"""Rows whose largest value is below get the scale 2^96 of int8, which then need not be infinite."""


class EncodedBlock(NamedTuple):
    """Some rows of one layer, encoded; the fields are those of `EncodedRows`, `clipped` empty if none was."""

    stored: Shaped[Tensor, "rows d_model"]
    norm: Float32[Tensor, " rows"]
    clipped: Int64[Tensor, " clipped"]
    scale: Float32[Tensor, " scaled"]
    squared_error: Float32[Tensor, " scaled"]


@dataclass(frozen=True)
class EncodedRows:
    """The rows of one array of a shard."""

    stored: Shaped[np.ndarray, "rows d_model"]
    """Numbers of the store's dtype."""

    norm: Float32[np.ndarray, " rows"]
    """Euclidean norm of each row, in the model's units; NaN where no row was put."""

    clipped: Int64[np.ndarray, " rows"]
    """Values of each row that were too large for the dtype and became its largest."""

    scale: Float32[np.ndarray, " scaled"]
    """Of int8: what the row was multiplied by; else empty."""

    squared_error: Float32[np.ndarray, " scaled"]
    """Of int8: the squared distance that rounding moved the row, in the model's units; else empty."""

    order: Int64[np.ndarray, " rows"] | None = None
    """Which of these rows stands at each row of the shard; None: they stand as they are here.

    To permute them where the shard is written, piece by piece, costs half of scattering them here."""

    @classmethod
    def empty(
        cls,
        n_rows: int,
        dtype: str,
        memory: RowMemory,
        order: Int64[np.ndarray, " rows"] | None = None,
    ) -> "EncodedRows":
        """Room for that many rows, of `memory_for` their store."""
        n_scaled = n_rows if dtype == "int8" else 0
        return cls(
            stored=memory.borrow(n_rows),
            norm=np.full(n_rows, np.nan, np.float32),
            clipped=np.zeros(n_rows, np.int64),
            scale=np.ones(n_scaled, np.float32),
            squared_error=np.zeros(n_scaled, np.float32),
            order=order,
        )

    @classmethod
    def of(
        cls,
        spec: StoreSpec,
        array: str,
        shard: int,
        x: Float[Tensor, "rows d_model"],
        memory: RowMemory | None = None,
    ) -> "EncodedRows":
        """Encode rows that are in memory, in the order of `spec.rows_of(shard)`."""
        encoded = cls.empty(len(x), spec.dtype, memory or memory_for(spec))
        if not spec.groups:
            (layer,) = spec.layers_of(array)
            for span, block in encode(x, None, spec.scale_of(layer), spec.dtype):
                encoded.put(span, block)
            return encoded
        layers = spec.row_layers(array, *spec.rows_of(shard))[: len(x)]
        for layer in spec.layers_of(array):
            places = np.flatnonzero(layers == layer)
            rows = torch.from_numpy(places).to(x.device)
            for span, block in encode(x, rows, spec.scale_of(layer), spec.dtype):
                encoded.put(places[span], block)
        return encoded

    def put(self, places: slice | Int64[np.ndarray, " rows"], block: EncodedBlock) -> None:
        """Put a block that is in main memory at its places."""
        for name, values in block._asdict().items():
            if values.shape[0]:
                getattr(self, name)[places] = values.numpy()

    def noted(self, name: str) -> Shaped[np.ndarray, " rows"]:
        """A field that says something of each row, in the shard's order."""
        values = getattr(self, name)
        return values if self.order is None or not len(values) else values[self.order]

    def copy_into(self, memory: Shaped[np.ndarray, "rows d_model"], start: int) -> None:
        """Fill memory with the shard's rows from `start` on, in its order, and with zeros after its last."""
        part = slice(start, start + len(memory))
        n_rows = len(range(len(self.stored))[part])
        if self.order is None:
            memory[:n_rows] = self.stored[part]
        else:
            # `raise` would not write into `out` straight away; these numbers are a permutation.
            np.take(self.stored, self.order[part], axis=0, out=memory[:n_rows], mode="clip")
        memory[n_rows:] = 0

    def of_shard(self, mine: Bool[np.ndarray, " rows"]) -> Shaped[np.ndarray, "some d_model"]:
        """The rows that `mine` says of the shard's, in its order."""
        return self.stored[mine if self.order is None else self.order[mine]]


def memory_for(spec: StoreSpec) -> RowMemory:
    """Memory for one array of a shard at a time, or of several."""
    return RowMemory(spec.shard_rows, spec.d_model, stored_dtype(spec.dtype))


def encode(
    x: Float[Tensor, "tokens d_model"],
    rows: Int64[Tensor, " rows"] | None,
    scale: float,
    dtype: str,
) -> Iterator[tuple[slice, EncodedBlock]]:
    """Encode some rows of one layer on the device they are on, block by block.

    On a CPU all blocks are made in the same memory: use each before you ask for the next.

    Rounds to nearest, ties to even. What is too large becomes the largest finite value of its sign.
    Rows that are not finite, or whose norm is not, get a norm that is not.

    Args:
        x: Activations in the model's units.
        rows: Which of them are stored; None: all.
        scale: They are multiplied by it; int8 finds one for each row instead.
        dtype: One of `DTYPES`.

    Yields:
        Which part of `rows` it is, and the block.
    """
    n_rows = len(x) if rows is None else len(rows)
    step = max(1, n_rows if x.is_cuda else min(n_rows, _BLOCK_VALUES // x.shape[1]))
    memory = _BlockMemory(step, x, dtype)
    for start in range(0, n_rows, step):
        span = slice(start, min(start + step, n_rows))
        block = x[span] if rows is None else memory.gather(x, rows[span])
        wide = memory.widen(block)
        yield (
            span,
            _int8_block(wide) if dtype == "int8" else _block(block, wide, scale, dtype, memory),
        )


class _BlockMemory:
    """What a block is made in. On a GPU each has its own: the one before may still be on its way."""

    def __init__(self, n_rows: int, x: Float[Tensor, "tokens d_model"], dtype: str) -> None:
        shape = (n_rows, x.shape[1])
        self._again = not x.is_cuda
        self._gathered = torch.empty(shape, dtype=x.dtype) if self._again else x
        self._wide = torch.empty(shape) if self._again and x.dtype != torch.float32 else x
        stored = self._again and dtype != "int8"
        self._stored = torch.empty(shape, dtype=getattr(torch, dtype)) if stored else x

    def gather(
        self, x: Float[Tensor, "tokens d_model"], rows: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows d_model"]:
        """Some rows of `x`."""
        if not self._again:
            return x.index_select(0, rows)
        return torch.index_select(x, 0, rows, out=self._gathered[: len(rows)])

    def widen(self, block: Float[Tensor, "rows d_model"]) -> Float32[Tensor, "rows d_model"]:
        """The block in float32."""
        if block.dtype == torch.float32 or not self._again:
            return block.float()
        return self._wide[: len(block)].copy_(block)

    def scaled(
        self, x: Float[Tensor, "rows d_model"], scale: float
    ) -> Float[Tensor, "rows d_model"]:
        """`x * scale` in the dtype of the store."""
        return torch.mul(x, scale, out=self._stored[: len(x)])


def _block(
    x: Float[Tensor, "rows d_model"],
    wide: Float32[Tensor, "rows d_model"],
    scale: float,
    dtype: str,
    memory: _BlockMemory,
) -> EncodedBlock:
    target, largest = getattr(torch, dtype), largest_value(dtype)
    norm = _norms(wide)
    # No value is larger than its row's norm. On a GPU to ask would be to wait for it.
    if x.is_cuda or float(norm.max()) * scale > largest:
        scaled = wide * scale
        clipped = (scaled.abs() > largest).sum(dim=1)
        stored = scaled.clamp_(-largest, largest).to(target)
    else:
        clipped = _NONE_CLIPPED
        # A power of two times a number of the same dtype is rounded as it would be from float32.
        as_is = x if x.dtype == target else wide
        stored = as_is if scale == 1 and x.dtype == target else memory.scaled(as_is, scale)
    if dtype == "bfloat16":
        stored = stored.view(torch.uint16)
    nothing = norm[:0]
    return EncodedBlock(stored, norm, clipped, nothing, nothing)


def _norms(x: Float32[Tensor, "rows d_model"]) -> Float32[Tensor, " rows"]:
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=1)
    rows = x.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # such a row is refused, by its norm
        return torch.from_numpy(np.sqrt(np.vecdot(rows, rows)))  # twice as fast


def _int8_block(x: Float32[Tensor, "rows d_model"]) -> EncodedBlock:
    """Each row by the scale that brings its largest value to 127, so that nothing is clipped."""
    norm = _norms(x)
    largest = x.abs().amax(dim=1)
    scale = torch.where(largest > 0, 127 / largest.clamp(min=_SMALLEST), 1.0)
    stored = (x * scale[:, None]).round_().to(torch.int8)
    error = decode(stored, scale, "int8").sub_(x).square_().sum(dim=1)
    return EncodedBlock(stored, norm, torch.zeros_like(norm, dtype=torch.int64), scale, error)


def decode(
    stored: Shaped[Tensor, "rows d_model"], scale: Float32[Tensor, " rows"], dtype: str
) -> Float32[Tensor, "rows d_model"]:
    """Activations in the model's units from stored rows and what each was multiplied by."""
    x = stored.view(torch.bfloat16) if dtype == "bfloat16" else stored
    return x.to(torch.float32, copy=True).div_(scale[:, None])
