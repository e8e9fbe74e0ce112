"""Batches on their way to trials: read and copied to the device once, for all who train on the same ones."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae.ranks import Ranks
from storage.batches import Cursor, ShuffledBatches
from storage.ring import RingReader
from storage.windows import Batch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A batch as a step takes it."""

    rows: tuple[Float32[Tensor, "rows d_model"], Int64[Tensor, " rows"]]
    """Activations in the model's units, and the layer of each."""

    following: Cursor
    """Of the batch after it."""

    n_rows: int
    """Of the whole batch, also where ranks share it."""

    def part_of(self, ranks: Ranks) -> "Given":
        """The rows that one of some ranks is given."""
        x, layer = self.rows
        mine = ranks.part(self.n_rows)
        return replace(self, rows=(x[mine], layer[mine]))


class Feed:
    """A stream of batches that several trainers may follow, each at its own time."""

    def __init__(self, batches: ShuffledBatches, device: str, ring: RingReader | None) -> None:
        """Read nothing yet.

        Args:
            batches: What is read.
            device: Where it is wanted.
            ring: What asks for shards, if the store is one; it is left with the last trainer.
        """
        self._batches, self._device, self._ring = batches, device, ring
        self._users = 0
        self._stream: Iterator[tuple[Cursor, Batch]] | None = None
        self._asked: Cursor | None = None
        self._given: Given | None = None
        self.waited = 0.0
        """Seconds for which a batch was not there, or not on the device, when it was asked for."""

    def join(self) -> None:
        """One more trains on it."""
        self._users += 1

    def leave(self) -> None:
        """One less; after the last the data are let go."""
        self._users -= 1
        if not self._users:
            if self._ring:
                self._ring.leave()
            self._stream = self._given = self._asked = None

    def at(self, cursor: Cursor) -> Given:
        """The batch at a cursor.

        Given at once to all who ask for it before anyone asks for the next. Another place than
        these two has the stream begin there.
        """
        if self._given is None or cursor != self._asked:
            self._given = self._next(cursor)
            self._asked = cursor
        return self._given

    def _next(self, cursor: Cursor) -> Given:
        asked = time.monotonic()
        if self._stream is None or self._given is None or cursor != self._given.following:
            self._stream = on_device(self._batches.batches(cursor), self._device)
        found, batch = next(self._stream)
        self.waited += time.monotonic() - asked
        return Given(
            rows=(batch.x, batch.layer),
            following=Cursor(epoch=found.epoch, step=found.step + 1),
            n_rows=len(batch.layer),
        )


def on_device(
    batches: Iterator[tuple[Cursor, Batch]], device: str
) -> Iterator[tuple[Cursor, Batch]]:
    """The same batches on a device, each gathered by a thread of its own while the one before it is used.

    To a GPU it copies them too, through pinned memory, in a stream of its own. What is not there in time
    is waited for here.
    """
    if torch.device(device).type == "cpu":
        yield from _ahead(lambda: next(batches, None))
        return
    copies = torch.cuda.Stream(device)

    def bring() -> tuple[Cursor, Batch, torch.cuda.Event] | None:
        found = next(batches, None)
        if found is None:
            return None
        cursor, batch = found
        copied = torch.cuda.Event()
        with torch.cuda.stream(copies):
            moved = batch.to(device)
            copied.record()
        return cursor, moved, copied

    for cursor, batch, copied in _ahead(bring):
        copied.synchronize()
        for tensor in (batch.stored, batch.scale, batch.layer):
            tensor.record_stream(torch.cuda.current_stream(device))
        yield cursor, batch


def _ahead(bring: Callable[[], T | None]) -> Iterator[T]:
    """What is brought, each while the one before it is used, until nothing comes."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(bring)
        while (brought := coming.result()) is not None:
            coming = thread.submit(bring)
            yield brought
