"""Reading with the help of whoever has read already: the same numbers, and nothing asked in vain."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.hygiene import Hygiene, RowFilter
from tests.stores import filled_store, small_spec

FILTER = RowFilter(Hygiene(), (0,), {0: 2.0, 1: 2.0, 2: 2.0})


class Reader:
    """A source that reads another handle of the store, and now and then has nothing."""

    def __init__(self, path: Path, has: Callable[[int], bool]) -> None:
        self._store, self._has = ActivationStore.open(path), has
        self.asked: list[tuple[str, int]] = []

    def chunk(self, array: str, chunk: int) -> np.ndarray | None:
        return self._given(
            f"{array}/x",
            chunk,
            lambda: self._store.read_stored(array, *self._store.spec.chunk_range(chunk)),
        )

    def column(self, name: str, shard: int) -> np.ndarray | None:
        return self._given(
            name, shard, lambda: self._store.column(name, *self._store.spec.shard_range(shard))
        )

    def _given(self, name: str, number: int, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        self.asked.append((name, number))
        if not self._has(len(self.asked)):
            return None
        found = read().copy()
        found.flags.writeable = False  # as shared memory is
        return found


def some_batches(store: ActivationStore) -> list[tuple[Cursor, bytes, bytes]]:
    batches = ShuffledBatches(store, "groups/0", FILTER, 32, window_chunks=2, seed=5)
    stream = batches.batches(Cursor(epoch=0, step=1))
    taken = (next(stream) for _ in range(7))
    return [(at, b.x.numpy().tobytes(), b.layer.numpy().tobytes()) for at, b in taken]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "has", [lambda _: True, lambda n: n % 3, lambda _: False], ids=["all", "some", "none"]
)
def test_batches_do_not_tell_where_their_chunks_came_from(
    tmp_path: Path, dtype: str, has: Callable[[int], bool]
):
    filled_store(tmp_path, small_spec(groups=((0, 2), (1,)), dtype=dtype, codec="zstd"))
    alone = some_batches(ActivationStore.open(tmp_path))
    source = Reader(tmp_path, has)
    assert some_batches(ActivationStore.open(tmp_path, shared=source)) == alone
    names = {name for name, _ in source.asked}
    assert {"groups/0/x", "groups/0/layer", "token_id"} <= names


def test_what_is_read_in_place_asks_nobody_for_chunks_or_columns(tmp_path: Path):
    filled_store(tmp_path, small_spec(groups=((0, 2), (1,))))
    source = Reader(tmp_path, lambda _: True)
    store = ActivationStore.open(tmp_path, shared=source)
    some_batches(store)
    assert store.in_place
    assert source.asked == []
