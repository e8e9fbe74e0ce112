"""Stores in an object store: the same bytes as on a disk, whatever happens to requests and writers."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from actors.harvester import Harvester
from actors.model_source import ModelSource
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.errors import StoreError
from storage.hygiene import Hygiene, RowFilter
from storage.places import Place, place
from storage.repair import take_back_shards
from storage.tokens import TokenStore
from storage.verify import Verification
from tests.models import CONTEXT, D_MODEL, N_LAYERS, random_model, random_tokens
from tests.object_server import BUCKET, SCHEMES, disturbed, object_server, use
from tests.stores import filled_store, small_spec

ROOT = Path(__file__).resolve().parents[1]
SPEC = small_spec(groups=((0, 2), (1,)))

CHILD = """
import sys
from storage.activations import ActivationStore
from tests.stores import filled_store, small_spec

where, spec = sys.argv[1], small_spec(groups=((0, 2), (1,)))
print(flush=True)
filled_store(where, spec, ActivationStore.create(where, spec).missing())
"""


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def endpoint(scheme):
    with object_server(scheme) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(scheme, endpoint, monkeypatch, request) -> Place:
    use(monkeypatch, endpoint, scheme)
    return place(f"{scheme}://{BUCKET}/{request.node.name}")


def objects(where: Place) -> dict[str, bytes]:
    return {name: where.read(name) for name in where.names()}


def row_filter() -> RowFilter:
    return RowFilter(Hygiene(), (0,), dict.fromkeys(range(3), 1e3))


def damages(where: Place, kind: str = "activation") -> list[str]:
    verification = Verification(where, kind)
    list(verification.run(n_threads=2))
    return [str(damage) for damage in verification.damages]


def test_a_store_and_its_batches_are_those_of_a_disk(tmp_path, bucket):
    disk = filled_store(tmp_path, SPEC)
    cloud = filled_store(bucket, SPEC)
    assert objects(bucket) == objects(place(tmp_path))
    assert damages(bucket) == []
    reopened = ActivationStore.open(str(bucket))
    assert reopened.missing() == []
    for array in SPEC.arrays:
        np.testing.assert_array_equal(reopened.read(array, 3, 100), disk.read(array, 3, 100))
    readers = (ShuffledBatches(s, "groups/0", row_filter(), 7, 3, 1) for s in (disk, cloud))
    streams = [reader.batches(Cursor(epoch=0, step=2)) for reader in readers]
    for _ in range(20):
        (_, ours), (_, theirs) = map(next, streams)
        np.testing.assert_array_equal(ours.x, theirs.x)
        np.testing.assert_array_equal(ours.layer, theirs.layer)


def test_a_harvest_through_lost_and_refused_requests_gives_the_bytes_of_a_disk(
    tmp_path, scheme, endpoint, bucket, monkeypatch
):
    spec = small_spec(
        d_model=D_MODEL,
        layers=tuple(range(N_LAYERS)),
        groups=(tuple(range(N_LAYERS)),),
        rows_per_sequence=CONTEXT - 1,
        n_population=10,
        n_sequences=8,
    )
    model = ModelSource(name=str(random_model(tmp_path / "model")))
    with disturbed(endpoint, seed=3) as (way, done):
        use(monkeypatch, way, scheme)
        theirs = place(str(bucket))
        for where in (place(tmp_path / "disk"), theirs):
            random_tokens(where / "tokens.zarr", spec.n_population)
            store = ActivationStore.create(where / "train.zarr", spec)
            harvester = Harvester(model, where / "tokens.zarr", 100)
            for shard in store.missing():
                harvester.harvest(where / "train.zarr", shard)
            assert TokenStore.open(where / "tokens.zarr").n_sequences("train") == 10
        assert len(set(done)) > 4
    use(monkeypatch, endpoint, scheme)
    assert objects(place(str(bucket))) == objects(place(tmp_path / "disk"))
    assert damages(place(f"{bucket}/tokens.zarr"), "token") == []


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.crash)])
def test_writers_killed_at_any_moment_are_continued(tmp_path, bucket, n_kills):
    whole, moments, kills = objects(filled_store(tmp_path, SPEC).place), random.Random(0), 0
    for attempt in range(10 * n_kills):
        where = bucket / str(attempt)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(where)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()  # it has imported everything
        time.sleep(moments.random() * 0.5)
        child.kill()
        kills += child.wait() < 0
        left = objects(where)
        assert all(whole[name] == data for name, data in left.items())
        assert objects(filled_store(where, SPEC).place) == whole
        if kills == n_kills:
            return
    pytest.fail(f"only {kills} of {n_kills} writers were still at work when they were killed")


def test_damage_in_a_bucket_is_named_and_mended(tmp_path, bucket):
    whole = objects(filled_store(bucket, SPEC).place)
    name = "groups/0/x/c/1/0"
    flipped = bytearray(whole[name])
    flipped[10] ^= 1
    bucket.write(name, [bytes(flipped)])
    assert damages(bucket) == [
        f"groups/0/x, shard 1, chunk 0: its checksum does not match ({name})"
    ]
    start, stop = SPEC.shard_range(1)
    with pytest.raises(StoreError, match="are damaged"):
        ActivationStore.open(bucket).read("groups/0", start, stop)
    verification = Verification(bucket, "activation")
    list(verification.run(n_threads=1))
    take_back_shards(bucket, verification.damages)
    store = ActivationStore.open(bucket)
    assert store.missing() == [1]
    assert objects(filled_store(bucket, SPEC).place) == whole


def test_an_object_that_vanishes_is_an_error_and_no_zeros(bucket):
    store = filled_store(bucket, SPEC)
    start, stop = SPEC.shard_range(1)
    store.read("groups/0", start, stop)
    bucket.delete("groups/0/x/c/1/0")
    for reader in (store, ActivationStore.open(bucket)):
        with pytest.raises(StoreError, match="is gone"):
            reader.read("groups/0", start, stop)
