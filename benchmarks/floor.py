"""The least time a training step could take on this machine, from what its parts must do.

Encoder: its matrix product, at the rate the machine shows for one. Decoder and weight gradients: a
row of d_model read for each entry and pass, at the bandwidth the machine shows for a copy. Optimizer:
gradients written once; gradient, weight and two moments read, three of them written. Selection, the
loss, clipping and the constraint on the decoder count nothing, and caches can't help: so a bound to be
near, not one to reach.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FLOAT = 4
_REPEATS = 7


def rates(threads: int, tokens: int, d_model: int) -> dict[str, float]:
    """`flops`: multiply-adds times 2 per second of a product; `bandwidth`: bytes per second, copied."""
    torch.set_num_threads(threads)
    x, w = torch.randn(min(tokens, 1024), d_model), torch.randn(4096, d_model)
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    product = _best(lambda: torch.nn.functional.linear(x, w))
    copied = _best(lambda: target.copy_(source))
    return {
        "flops": 2 * len(x) * len(w) * d_model / product,
        "bandwidth": 2 * source.nbytes / copied,
    }


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def seconds(
    rates: Mapping[str, float], tokens: int, d_model: int, shape: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of each part of a step, and their sum, `total`.

    Args:
        rates: As `rates` measured them.
        tokens: Tokens a step.
        d_model: Width of the activations.
        shape: `d_sae`, `k` and, for a Kronecker encoder, `kron` = (h, m, n).
    """
    d_sae, k, kron = shape["d_sae"], shape["k"], shape.get("kron")
    rows = kron[0] * (kron[1] + kron[2]) if kron else d_sae
    entries = tokens * k
    # Decoded; dotted with the gradient; gathered into both weights' gradients (Kron: two factors).
    passes = 3 + (2 if kron else 1)
    parts = {
        "encoder": 2 * tokens * d_model * rows / rates["flops"],
        "decoder": passes * entries * d_model * _FLOAT / rates["bandwidth"],
        "optimizer": (1 + 4 + 3) * (rows + d_sae) * d_model * _FLOAT / rates["bandwidth"],
    }
    return {**parts, "total": sum(parts.values())}
