"""Random draws that depend on nothing but their own coordinates.

A draw is a hash of (seed, stream, counters...), so it is the same whichever process makes it, in
whatever order, with any number of actors, and for ever: it is part of the store's format and
never changes within a format version (docs/store_format.md; golden values in its test).
"""

from enum import IntEnum

import numpy as np
from jaxtyping import Int, Int64, Integer, UInt8, UInt64

_GAMMA = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    LAYER = 1
    """The layer stored of a token in a group."""

    POPULATION = 2
    """The order in which sequences enter a store."""

    SHARD_ROWS = 3
    """The order of rows inside a shard."""

    EPOCH_CHUNKS = 4
    """The order of chunks in an epoch of reading."""

    WINDOW_ROWS = 5
    """The order of rows inside a window of reading."""


def _mixed(z: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit in decides every bit out."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(
    seed: int, stream: Stream, *counters: int | Integer[np.ndarray, "*shape"]
) -> UInt64[np.ndarray, "..."]:
    """Uniform 64-bit words, one for each broadcast element of `counters`.

    The state starts as mix(seed); each of stream and counters, in turn, is added by exclusive or
    and mixed in: state = mix((state ^ value) + 0x9e3779b97f4a7c15), modulo 2^64.
    """
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64 on purpose
        state = _mixed(np.asarray([seed & _WORD], np.uint64) + np.uint64(_GAMMA))
        for value in (int(stream), *counters):
            word = np.asarray(value).astype(np.uint64)
            state = _mixed((state ^ word) + np.uint64(_GAMMA))
    return state


def permutation(n: int, seed: int, stream: Stream, *counters: int) -> Int64[np.ndarray, " n"]:
    """The numbers 0 to n-1 in the order of their draws, of which no two are equal: `_mixed` is one to one."""
    return np.argsort(draw(seed, stream, *counters, np.arange(n)))


def layer_draw(
    seed: int,
    sequence: Int[np.ndarray, " rows"] | Integer[np.ndarray, " rows"],
    position: Integer[np.ndarray, " rows"],
    group: int,
    layers: tuple[int, ...],
) -> UInt8[np.ndarray, " rows"]:
    """The layer of `layers` that is stored for each token: uniform, and independent between groups.

    Args:
        seed: Of the store.
        sequence: Index of each token's sequence in its split.
        position: Index of each token in its sequence.
        group: Index of the group in the store.
        layers: The group's layers.
    """
    words = draw(seed, Stream.LAYER, sequence, position, group)
    # Multiply-shift on the upper half: the bias is below n_layers / 2^32, far under any sampling.
    choice = ((words >> np.uint64(32)) * np.uint64(len(layers))) >> np.uint64(32)
    return np.asarray(layers, np.uint8)[choice.astype(np.int64)]
