"""When the C library gives freed memory back to the system: asked for, or never.

Both speak to glibc; where the C library is another one, nothing is done.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's mallopt(3)
_LARGEST_KEPT = 64 * 2**20


def release_freed_memory() -> None:
    """Return what is free.

    A harvester with two threads was seen to grow to twice what it used, over a few shards.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory(largest: int) -> None:
    """Keep what is freed from now on, for the next that asks for as much.

    A training step makes gradients as large as the weights anew. glibc would have the system map each of
    them, page by page, and take it back: a sixth of a step at d_sae 16384 on two cores. Larger ones than
    64 MiB are left to the system: the holes that they leave in the heap would cost more than they save.

    Args:
        largest: Bytes of the largest block that comes and goes.
    """
    set_option = _function("mallopt")
    if set_option is not None and largest <= _LARGEST_KEPT:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, -1)  # as an unsigned number: the largest


def _function(name: str) -> "ctypes._FuncPointer | None":
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
