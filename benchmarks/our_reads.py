"""Our side of the reading benchmark: a turn is an epoch of shuffled batches out of a store."""

from itertools import islice
from pathlib import Path
from typing import Any

from actors.allocator import keep_freed_memory
from benchmarks.cpu import Findings, Turn, serve_turns
from benchmarks.one_layer import ALL_ROWS, ARRAY
from benchmarks.read_data import LOOKED_AT, Size, distinct
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches


def reader(folder: Path, batch_rows: int) -> ShuffledBatches:
    """What a trainer reads with, at the defaults; no row is dropped."""
    store = ActivationStore.open(folder)
    return ShuffledBatches(store, ARRAY, ALL_ROWS, batch_rows, window_chunks=64, seed=0)


def make(arguments: dict[str, Any]) -> Turn:
    """The epochs of a reader, one after the other."""
    batches = reader(Path(arguments["store"]), Size.of(arguments).batch_rows)
    keep_freed_memory(0)  # as the trainer's process does

    def turn(number: int) -> Findings:
        stream = batches.batches(Cursor(epoch=number))
        epoch = islice(stream, batches.batches_per_epoch)
        firsts = [
            batch.stored[:, 0].clone() for i, (_, batch) in enumerate(epoch) if i % LOOKED_AT == 0
        ]
        return lambda: distinct([first for first in firsts if len(first) == len(firsts[0])])

    return turn


if __name__ == "__main__":
    serve_turns(make, ["torch", "zarr", "numpy"])
