"""Copies from a GPU to the host that go on while the GPU computes; on the CPU nothing is copied."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host: begun when made, waited for when asked."""

    def __init__(self, x: Float[Tensor, "rows d_model"]) -> None:
        """Begin, on a stream of its own and into pinned memory; returns at once."""
        self._host, self._done = x, None
        if x.is_cuda:
            stream = _copy_stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                self._host.copy_(x, non_blocking=True)
                self._done = stream.record_event()
            x.record_stream(stream)  # its memory is not given away before the copy has ended

    def result(self) -> Float32[np.ndarray, "rows d_model"]:
        """The values, in float32, as soon as they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.float().cpu().numpy()


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
