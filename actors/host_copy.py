"""Copies from a GPU to the host that go on while the GPU computes."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


class HostCopy:
    """Tensors of one GPU on their way to the host: begun when made, waited for when asked."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Begin, on a stream of its own and into pinned memory; returns at once."""
        self._host: list[Tensor] = []
        for x in tensors:
            stream = _copy_stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                self._host.append(host.copy_(x, non_blocking=True))
                self._done = stream.record_event()
            x.record_stream(stream)  # its memory is not given away before the copy has ended

    def result(self) -> list[Tensor]:
        """The tensors on the host, as soon as they are there."""
        self._done.synchronize()
        return self._host


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
