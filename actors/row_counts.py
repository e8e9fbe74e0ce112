"""Counts what the row filter leaves of a store: how many rows of each array are used, and why not.

A counter counts the shards of a job, several at a time; any number of counters share the jobs, and `added` gives the
same sums however many they are.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from storage.activations import ActivationStore
from storage.commits import CommitLog
from storage.hygiene import RowFilter
from storage.layout import StoreSpec
from storage.places import Location
from storage.reading import REQUESTS_AT_ONCE

JOB_ROWS = 2**21
"""Of the shards of a job, at most, unless it has one: their columns are in memory at the same time."""

Counts = dict[str, dict[str, int]]
"""Per array: `stored` rows, those `used`, and those dropped by the filter's reasons."""


class RowCounter:
    """Reads of one store the columns that a row filter asks for, each once.

    A plain class: tests call it in process.
    """

    def __init__(self, store: Location, row_filter: RowFilter) -> None:
        """Open the store.

        Raises:
            StoreError: If there is no store at that path.
        """
        self._store, self._row_filter = ActivationStore.open(store), row_filter

    def count(self, *shards: int) -> Counts:
        """Of some committed shards, that are read at the same time.

        A row that is dropped for several reasons counts for the first, so that the figures add up.

        Raises:
            StoreError: If a shard is damaged.
        """
        with ThreadPoolExecutor(len(shards)) as threads:
            return added(threads.map(self._of_shard, shards))

    def _of_shard(self, shard: int) -> Counts:
        store, span = self._store, self._store.spec.shard_range(shard)
        token_id, position = store.column("token_id", *span), store.column("position", *span)
        counts: Counts = {}
        for array in store.spec.arrays:
            layers, norm = store.row_layers(array, *span), store.column(f"{array}/norm", *span)
            left = span[1] - span[0]
            total, told = {"stored": left, "used": 0}, np.zeros(left, bool)
            reasons = self._row_filter.dropped(token_id, position, layers, norm)
            for reason, rows in reasons.items():
                total[reason] = int((rows & ~told).sum())
                told, left = rows | told, left - total[reason]
            counts[array] = {**total, "used": left}
        return counts


def counting_jobs(store: Location) -> list[tuple[int, ...]]:
    """The committed shards, as jobs for `RowCounter.count`."""
    opened = ActivationStore.open(store)
    shards, size = CommitLog(opened.place, opened.spec.digest).shards(), counting_size(opened.spec)
    return [tuple(shards[first : first + size]) for first in range(0, len(shards), size)]


def counting_size(spec: StoreSpec) -> int:
    """Shards of a job."""
    return min(REQUESTS_AT_ONCE, max(1, JOB_ROWS // spec.shard_rows))


def added(parts: Iterable[Counts]) -> Counts:
    """The sums of some counts of one store."""
    first, *others = parts
    return {
        array: {key: n + sum(part[array][key] for part in others) for key, n in of_array.items()}
        for array, of_array in first.items()
    }
