"""Whether a checkpoint holds what was written: its header by checksum, its tensors by the sum of their words.

Safetensors itself notices a file that is cut short, and not a bit that has turned over. A sum, unlike a
checksum, is that of its parts: ranks take it of the rows that each holds, and it is the same however
many they are. Files of others, and those from before there was one, go without.
"""

import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.ranks import Ranks

KEY = "integrity"
"""Of the header."""

_WORDS = {1: torch.int8, 2: torch.int16}


class DamagedError(ValueError):
    """A file is not the one that was written."""

    def __init__(self, path: Path, fault: str) -> None:
        """Say which file, and what is wrong with it."""
        super().__init__(path, fault)
        self.path, self.fault = path, fault

    def __str__(self) -> str:
        """With the remedy."""
        return f"{self.path} is damaged ({self.fault}); fetch or train it again"


def sealed(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], held: Collection[str], ranks: Ranks
) -> str:
    """The text of a header that says by what it and the tensors can be checked; every rank calls this.

    Args:
        header: What describes the tensors.
        tensors: What this rank holds.
        held: Names of those of which it holds some rows, not the whole.
        ranks: Who holds the others.
    """
    seal = {"crc32": _checksum(header), "sums": _sums(tensors, held, ranks)}
    return json.dumps({**header, KEY: seal})


def opened(text: str, path: Path) -> dict[str, Any]:
    """The header of a file, its seal still in it.

    Raises:
        DamagedError: If it is not as written.
    """
    try:
        header = json.loads(text)
        bare = {key: value for key, value in header.items() if key != KEY}
        if KEY in header and header[KEY]["crc32"] != _checksum(bare):
            raise DamagedError(path, "its header is not the one that was written")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(path, f"its header can't be read: {error}") from error
    return header


def check_tensors(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    held: Collection[str],
    ranks: Ranks,
    path: Path,
) -> None:
    """Raises DamagedError on every rank if tensors are not as written; arguments as of `sealed`."""
    if KEY not in header:
        return
    written, found = header[KEY].get("sums"), _sums(tensors, held, ranks)
    with ranks.together():
        if written != found:
            raise DamagedError(path, "its tensors are not those that were written")


def _checksum(header: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(header).encode()):08x}"


def _sums(tensors: Mapping[str, Tensor], held: Collection[str], ranks: Ranks) -> dict[str, int]:
    sums = {name: _sum(tensor) for name, tensor in tensors.items()}
    if held:  # in one order on all ranks, and where these exchange the weights themselves
        names, device = sorted(held), tensors[min(held)].device
        parts = torch.tensor([sums[name] for name in names], device=device)
        sums |= zip(names, ranks.over_latents(parts).tolist(), strict=True)
    return dict(sorted(sums.items()))


def _sum(tensor: Tensor) -> int:
    words = _WORDS.get(tensor.itemsize, torch.int32)
    return int(tensor.detach().contiguous().reshape(-1).view(words).sum(dtype=torch.int64))
