"""Counts what the row filter leaves of a store: how many rows of each array are used, and why not."""

import numpy as np

from storage.activations import ActivationStore
from storage.hygiene import RowFilter
from storage.places import Location


def count_rows(store: Location, row_filter: RowFilter) -> dict[str, dict[str, int]]:
    """Per array: `stored` rows, those `used`, and those dropped by the filter's reasons.

    Of the shards that are committed. A row that is dropped for several reasons counts for the first,
    so that the figures add up.

    Raises:
        StoreError: If a shard is damaged.
    """
    opened = ActivationStore.open(store)
    counts: dict[str, dict[str, int]] = {}
    for array in opened.spec.arrays:
        total: dict[str, int] = {"stored": 0, "used": 0}
        for shard in opened.committed():
            span = opened.spec.shard_range(shard)
            reasons = row_filter.dropped(
                opened.column("token_id", *span),
                opened.column("position", *span),
                opened.row_layers(array, *span),
                opened.column(f"{array}/norm", *span),
            )
            left = span[1] - span[0]
            total["stored"] += left
            told = np.zeros(left, bool)
            for reason, rows in reasons.items():
                n = int((rows & ~told).sum())
                total[reason] = total.get(reason, 0) + n
                told, left = rows | told, left - n
            total["used"] += left
        counts[array] = total
    return counts
