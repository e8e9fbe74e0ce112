"""A safetensors file that ranks write together, each its own rows, and of which each reads its own.

No rank ever holds the whole, and nothing in the file tells how many wrote it.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.ranks import Ranks

# In the order in which safetensors itself puts them: widest first, so that all are aligned.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


_LENGTH = 8
"""Bytes that say how long the file's head is, and stand before it."""


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """Which rows of a tensor a rank holds."""

    rows: list[range]
    """Pieces of the whole tensor, in the order in which they are held one after the other."""

    n_rows: int
    """Rows of the whole tensor."""


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    held: Mapping[str, HeldRows],
    metadata: dict[str, str],
    ranks: Ranks,
) -> None:
    """Write a file; every rank calls this, and on return it is there.

    Args:
        path: On a file system that all ranks share; replaced once all of it is written.
        tensors: What this rank holds, on any device.
        held: Which rows these are; of tensors it doesn't name all ranks hold the whole.
        metadata: The file's; the first rank's counts.
        ranks: Who writes.

    Raises:
        ValueError: On every rank, if one can't see the file that the first one began.
        OSError: If writing fails.
    """
    header, places = _layout(tensors, held, metadata)
    partial = path.with_name(path.name + ".partial")
    writes = ranks.batch_rank == 0
    first = writes and ranks.dictionary_rank == 0
    with ranks.together():
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(n_bytes for _, n_bytes in places.values()))
    with ranks.together():
        if writes:
            _write_rows(partial, tensors, held, places, first=first)
    with ranks.together():
        if first:
            os.replace(partial, path)


def _write_rows(
    partial: Path,
    tensors: Mapping[str, Tensor],
    held: Mapping[str, HeldRows],
    places: Mapping[str, tuple[int, int]],
    *,
    first: bool,
) -> None:
    if not partial.exists():
        raise ValueError(
            f"{partial}, which another rank began, is not there for this one; ranks write one file "
            "together; give a path on a file system that all of them share"
        )
    with partial.open("rb") as head:
        origin = _LENGTH + int.from_bytes(head.read(_LENGTH), "little")
    # Nothing may be read through this one: its buffer would then write back what others have changed.
    with partial.open("r+b") as file:
        for name, tensor in tensors.items():
            rows = tensor.detach().contiguous()
            begin = origin + places[name][0]
            if name not in held:
                if first:
                    _write_at(file, begin, rows)
                continue
            sizes = [len(some) for some in held[name].rows]
            for some, piece in zip(held[name].rows, rows.split(sizes), strict=True):
                _write_at(
                    file, begin + some.start * math.prod(rows.shape[1:]) * rows.itemsize, piece
                )
        file.flush()
        os.fsync(file.fileno())


def _write_at(file: Any, place: int, tensor: Tensor) -> None:
    file.seek(place)
    file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)


def _layout(
    tensors: Mapping[str, Tensor], held: Mapping[str, HeldRows], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's head, and of every tensor where it starts behind that, and its bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    order = list(_NAMES)
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        tensor = tensors[name]
        shape = list(tensor.shape)
        if name in held:
            shape[0] = held[name].n_rows
        n_bytes = math.prod(shape) * tensor.itemsize
        places[name] = end, n_bytes
        offsets = [end, end + n_bytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        end += n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text, places


def read(file: Any, held: Mapping[str, HeldRows]) -> dict[str, Tensor]:
    """The tensors of an open safetensors file: the rows held, or all of what `held` doesn't name."""
    return {
        name: _rows_of(file.get_slice(name), held[name]) if name in held else file.get_tensor(name)
        for name in file.keys()  # noqa: SIM118
    }


def _rows_of(whole: Any, held: HeldRows) -> Tensor:
    return torch.cat([whole[some.start : some.stop] for some in held.rows])
