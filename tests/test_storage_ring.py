"""A store that holds a few segments at a time, against the same store held whole."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.errors import StoreError
from storage.hygiene import Hygiene, RowFilter
from storage.ring import RingReader, RingWriter
from storage.verify import Verification
from tests.stores import files_of, filled_store, shard_content, small_spec

WINDOW_CHUNKS = 2  # and so segments of one or two shards
SPEC = small_spec(groups=((0, 2), (1,)), sequences_per_chunk=1, chunks_per_shard=2)  # 11 shards
ROOM = 4
FILTER = RowFilter(Hygiene(), (0,), dict.fromkeys(range(3), 1e9))


def batches(store: ActivationStore, ring: RingReader | None = None) -> ShuffledBatches:
    return ShuffledBatches(store, "groups/0", FILTER, 7, WINDOW_CHUNKS, seed=3, ring=ring)


@contextmanager
def written_on_demand(
    folder: Path, most: list[int], written: list[int] | None = None
) -> Iterator[Path]:
    """A ring, written as it is asked for; `most` is told how many shards were there at a time, `written` which are."""
    store = ActivationStore.create(folder / "ring.zarr", SPEC)
    writer = RingWriter(store, folder / "requests", ROOM)
    over = Event()

    def work() -> None:
        while not over.wait(0.005):
            for shard in writer.next_shards():
                store.write_shard(shard, *shard_content(SPEC, shard))
                if written is not None:
                    written.append(shard)
                most.append(len(list((folder / "ring.zarr/groups/0/x/c").glob("*/0"))))

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield folder / "requests"
        assert thread.is_alive()
    finally:
        over.set()
        thread.join()


def taken(stream: Iterator, n: int, pause: float = 0.0) -> list[np.ndarray]:
    rows = []
    for _, batch in islice(stream, n):
        rows.append(np.column_stack([batch.x, batch.layer]))
        time.sleep(pause)
    return rows


def test_readers_of_any_speed_get_what_a_whole_store_gives_and_the_ring_stays_small(tmp_path):
    whole = batches(filled_store(tmp_path / "whole.zarr", SPEC))
    n = 2 * whole.batches_per_epoch + 3
    expected = taken(whole.batches(Cursor()), n)
    found: dict[str, list[np.ndarray]] = {}
    most: list[int] = []
    with written_on_demand(tmp_path, most) as requests:

        def read(name: str, pause: float) -> None:
            reader = RingReader(requests, name)
            store = ActivationStore.open(tmp_path / "ring.zarr")
            stream = batches(store, reader).batches(Cursor())
            found[name] = taken(stream, n, pause)
            reader.leave()
            stream.close()

        with ThreadPoolExecutor() as threads:
            readers = []
            for number, pause in enumerate((0, 0.01, 0.002)):
                readers.append(threads.submit(read, f"r{number}", pause))
                # The next comes when the others are ahead: the ring goes back for it.
                time.sleep(0.3)
            for reader in readers:
                reader.result()
        assert list((tmp_path / "requests").iterdir()) == []
    assert max(most) <= ROOM < SPEC.n_shards
    for rows in found.values():
        for one, other in zip(rows, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_reading_goes_on_at_any_cursor(tmp_path):
    whole = batches(filled_store(tmp_path / "whole.zarr", SPEC))
    with written_on_demand(tmp_path, []) as requests:
        for step in (0, 5, whole.batches_per_epoch - 1, whole.batches_per_epoch + 2):
            reader = RingReader(requests, "r")
            store = ActivationStore.open(tmp_path / "ring.zarr")
            stream = batches(store, reader).batches(Cursor(step=step))
            rows = taken(stream, 2)
            reader.leave()
            stream.close()
            for one, other in zip(rows, taken(whole.batches(Cursor(step=step)), 2), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.timeout(120)
def test_readers_that_begin_elsewhere_hold_nothing_of_where_they_were(tmp_path):
    """Two at once fill the room, each with what it held and what was read ahead for it."""
    whole = batches(filled_store(tmp_path / "whole.zarr", SPEC))
    n = whole.batches_per_epoch
    expected = taken(whole.batches(Cursor()), 2 * n)
    with written_on_demand(tmp_path, []) as requests, ThreadPoolExecutor() as threads:

        def jump(name: str, seed: int) -> None:
            reader = RingReader(requests, name)
            mine = batches(ActivationStore.open(tmp_path / "ring.zarr"), reader)
            for step in np.random.default_rng(seed).integers(0, n, 8).tolist():
                stream = mine.batches(Cursor(step=step))  # the one before is dropped, not left
                for one, other in zip(taken(stream, 5), expected[step:], strict=False):
                    np.testing.assert_array_equal(one, other)
            reader.leave()
            stream.close()

        for reader in [threads.submit(jump, f"r{seed}", seed) for seed in (1, 2)]:
            reader.result()


def test_what_was_passed_before_is_not_written_again_for_a_reader_that_goes_on(tmp_path):
    store = ActivationStore.create(tmp_path / "ring.zarr", SPEC)
    n = batches(filled_store(tmp_path / "whole.zarr", SPEC)).batches_per_epoch
    written: list[int] = []
    with written_on_demand(tmp_path, [], written) as requests:
        for start, n_steps in ((0, n - 4), (n - 4, 1)):
            written.clear()
            reader = RingReader(requests, "r")
            stream = batches(ActivationStore.open(store.place), reader).batches(Cursor(step=start))
            taken(stream, n_steps)
            reader.leave()
            stream.close()
        assert not set(written) & set(range(4))


def test_a_shard_that_is_released_while_its_store_is_verified_is_not_damaged(tmp_path):
    store = filled_store(tmp_path / "s", SPEC)
    verification = Verification(tmp_path / "s", "activation")
    store.release(3)
    (tmp_path / "s" / "groups" / "0" / "x" / "c" / "4" / "0").unlink()
    list(verification.run(1))
    assert [damage.shard for damage in verification.damages] == [4]


def test_a_released_shard_is_missing_until_it_is_written_again_and_nothing_is_damaged(tmp_path):
    store = filled_store(tmp_path / "s", SPEC)
    before = files_of(tmp_path / "s")
    store.release(3)
    store.release(3)
    assert store.missing() == [3]
    assert len(store.column("token_id", 0, SPEC.n_rows)) == SPEC.n_rows
    with pytest.raises(StoreError, match="is gone"):
        ActivationStore.open(tmp_path / "s").read("groups/0", *SPEC.shard_range(3))
    verification = Verification(tmp_path / "s", "activation")
    list(verification.run(1))
    assert verification.damages == []
    with pytest.raises(StoreError, match="lacks 1 of its 11 shards"):
        batches(store)
    store.write_shard(3, *shard_content(SPEC, 3))
    assert files_of(tmp_path / "s") == before


def test_a_writer_that_fails_tells_those_who_wait(tmp_path):
    store = ActivationStore.create(tmp_path / "ring.zarr", SPEC)
    writer = RingWriter(store, tmp_path / "requests", ROOM)
    writer.fail("the disk has gone; bring it back")
    stream = batches(store, RingReader(tmp_path / "requests", "r")).batches(Cursor())
    with pytest.raises(StoreError, match="the disk has gone; bring it back"):
        next(stream)


def test_what_is_in_use_comes_before_what_is_needed_next(tmp_path):
    store = ActivationStore.create(tmp_path / "ring.zarr", SPEC)
    writer = RingWriter(store, tmp_path / "requests", ROOM)
    for name, asked in {
        "fast": {"epoch": 1, "held": [2, 3], "now": [4, 5], "then": [6, 7]},
        "slow": {"epoch": 0, "held": [], "now": [8, 9], "then": [10]},
    }.items():
        (tmp_path / "requests").mkdir(exist_ok=True)
        (tmp_path / "requests" / f"{name}.json").write_text(json.dumps(asked))
    assert writer.next_shards() == [2, 3, 8, 9]


def test_what_a_reader_is_at_stays_whatever_the_room(tmp_path):
    store = filled_store(tmp_path / "s", SPEC)
    writer = RingWriter(store, tmp_path / "requests", ROOM)
    (tmp_path / "requests").mkdir(exist_ok=True)
    for name, asked in {
        "slow": {"epoch": 0, "held": [2, 3], "now": [4, 5], "then": [6]},
        "fast": {"epoch": 1, "held": [], "now": [8, 9], "then": [10]},
    }.items():
        (tmp_path / "requests" / f"{name}.json").write_text(json.dumps(asked))
    assert writer.next_shards() == []
    assert store.missing() == [0, 1, 6, 7, 10]


def test_a_shard_that_is_asked_for_while_it_is_released_stays(tmp_path):
    store = filled_store(tmp_path / "s", SPEC)
    before = files_of(tmp_path / "s")

    def asked_for() -> bool:
        assert store.missing() == [3]  # so whoever asks from now on waits
        return True

    assert not store.release(3, unless=asked_for)
    assert files_of(tmp_path / "s") == before
