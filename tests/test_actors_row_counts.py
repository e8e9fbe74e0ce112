from threading import Barrier

import numpy as np
import pytest

from actors.row_counts import RowCounter, added, counting_jobs
from orchestrator.planning import requests
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.places import Location
from tests.object_server import BUCKET, counted, object_server, use
from tests.stores import filled_store, small_spec

FILTER = RowFilter(
    Hygiene(drop_first_positions=2, max_norm_ratio=1.05), (0, 7), dict.fromkeys(range(3), 1.62)
)


def count(store: Location, row_filter: RowFilter) -> dict[str, dict[str, int]]:
    counter = RowCounter(store, row_filter)
    return added(counter.count(*job) for job in counting_jobs(store))


@pytest.mark.parametrize("groups", [(), ((0, 2), (1,))], ids=["layers", "groups"])
def test_every_row_is_counted_once_as_used_or_for_what_it_is_dropped_for(tmp_path, groups):
    spec = small_spec(groups=groups)
    store = filled_store(tmp_path / "s", spec)
    counts = count(store.place, FILTER)
    assert list(counts) == list(spec.arrays)
    token_id, position = (store.column(n, 0, spec.n_rows) for n in ("token_id", "position"))
    for array, found in counts.items():
        norm = store.column(f"{array}/norm", 0, spec.n_rows)
        special = np.isin(token_id, (0, 7))
        first = ~special & (position < 2)
        massive = ~special & ~first & (norm > 1.05 * 1.62)
        assert min(special.sum(), first.sum(), massive.sum()) > 0
        assert found == {
            "stored": spec.n_rows,
            "used": spec.n_rows - special.sum() - first.sum() - massive.sum(),
            "special_tokens": special.sum(),
            "first_positions": first.sum(),
            "massive_norms": massive.sum(),
        }
        layers = store.row_layers(array, 0, spec.n_rows)
        assert found["used"] == FILTER.keep(token_id, position, layers, norm).sum()


def test_special_tokens_count_as_used_where_they_are_kept(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    hygiene = Hygiene(drop_special_tokens=False, max_norm_ratio=1e6)
    row_filter = RowFilter(hygiene, (0, 7), dict.fromkeys(range(3), 1.0))
    for found in count(store.place, row_filter).values():
        assert found["used"] == found["stored"]
        assert found["special_tokens"] == 0


def test_counts_are_the_same_however_shards_are_shared_out_and_of_committed_ones_alone(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    spec = small_spec(groups=((0, 2), (1,)))
    store = filled_store(tmp_path / "s", spec, shards=(3, 0, 1))
    assert counting_jobs(store.place) == [(0, 1, 3)]
    whole = count(store.place, FILTER)
    assert {found["stored"] for found in whole.values()} == {spec.n_rows - spec.shard_rows}
    monkeypatch.setattr("actors.row_counts.JOB_ROWS", 1)
    jobs = counting_jobs(store.place)
    assert jobs == [(0,), (1,), (3,)]
    single = [RowCounter(store.place, FILTER).count(*job) for job in reversed(jobs)]
    assert repr(added(single)) == repr(whole), "in the order of keys too"


def test_a_bucket_is_asked_for_each_column_once(monkeypatch: pytest.MonkeyPatch):
    spec = small_spec(groups=((0, 2), (1,)), n_population=300, n_sequences=192)
    where = f"s3://{BUCKET}/rows.zarr"
    with object_server() as endpoint, counted(endpoint) as (proxy, asked):
        use(monkeypatch, proxy)
        filled_store(where, spec)  # pyright: ignore[reportArgumentType]
        jobs, counter = counting_jobs(where), RowCounter(where, FILTER)
        before = len(asked)
        found = added(counter.count(*job) for job in jobs)
        n_asked = len(asked) - before
    assert {of_array["stored"] for of_array in found.values()} == {spec.n_rows}
    assert n_asked == requests.count_gets(spec) == 32 * (1 + 2 + 2 * 2)


def test_the_shards_of_a_job_are_read_at_the_same_time(tmp_path, monkeypatch: pytest.MonkeyPatch):
    spec = small_spec(n_population=300, n_sequences=192)
    store = filled_store(tmp_path / "s", spec)
    jobs = counting_jobs(store.place)
    assert [len(job) for job in jobs] == [16, 16]
    counter, read = RowCounter(store.place, FILTER), ActivationStore.column
    at_once = Barrier(16, timeout=30)

    def together(self: ActivationStore, name: str, start: int, stop: int) -> np.ndarray:
        at_once.wait()  # ends in an error unless all come
        return read(self, name, start, stop)

    monkeypatch.setattr(ActivationStore, "column", together)
    assert counter.count(*jobs[0])["layers/0"]["stored"] == 16 * spec.shard_rows
