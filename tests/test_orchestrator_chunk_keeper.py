"""One read for all trials of a node, on a real Ray and a real S3 server."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.bundle import Bundle
from actors.trial import Trial
from orchestrator import cluster
from orchestrator.config import ComputeConfig
from orchestrator.sweeps.chunk_keeper import ChunkKeeper, keeping_chunks
from sae.config import SaeConfig
from sae.fit import FitConfig
from storage.hygiene import Hygiene, RowFilter
from tests.object_server import BUCKET, counted, object_server, use
from tests.stores import filled_store, small_spec
from tests.trials import result_of

pytestmark = pytest.mark.ray

SPEC = small_spec(
    d_model=64,
    groups=((0, 2), (1,)),
    n_population=300,
    n_sequences=240,
    rows_per_sequence=20,
    sequences_per_chunk=10,
    chunks_per_shard=6,
    dtype="float16",
    codec="zstd",
)
WINDOW_CHUNKS = 8
CHUNK_BYTES = 200 * 64 * 2
TWO_WINDOWS = 2 * WINDOW_CHUNKS * CHUNK_BYTES
COLUMN_BYTES = SPEC.n_rows * 24
STORE = f"s3://{BUCKET}/train.zarr"


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """A store in a bucket, a Ray beside it, and the bytes of all that is fetched."""
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        object_server() as endpoint,
        counted(endpoint) as (proxy, sizes),
    ):
        use(monkeypatch, proxy)
        filled_store(STORE, SPEC)  # pyright: ignore[reportArgumentType]
        filled_store(tmp_path_factory.getbasetemp() / "validation.zarr", small_spec(d_model=64))
        with cluster.connected(ComputeConfig(cpus=2), TWO_WINDOWS):
            yield sizes


@pytest.fixture
def trial(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(
        id="t",
        group=0,
        layers=(0, 2),
        sae=SaeConfig(d_model=64, d_sae=64, k=4),
        fit=FitConfig(batch_tokens=512, lr=1e-3),
        n_steps=6,  # most of a pass
        seed=3,
        layer_scale={0: 1.0, 2: 1.0},
        window_chunks=WINDOW_CHUNKS,
        checkpoint_seconds=1e9,
        train_store=STORE,
        validation_store=tmp_path_factory.getbasetemp() / "validation.zarr",
        row_filter=RowFilter(Hygiene(), (0,), {0: 1e9, 1: 1e9, 2: 1e9}),
        folder=tmp_path / "t",
    )


def several(trial: Trial, n: int) -> list[Trial]:
    """Trials that differ in k."""
    return [
        replace(
            trial,
            id=f"{trial.id}{k}",
            sae=replace(trial.sae, k=k),
            folder=trial.folder.parent / f"{trial.id}{k}",
        )
        for k in range(1, n + 1)
    ]


def in_step(trials: Sequence[Trial], shared: Any) -> None:
    """Train all, a few steps each in turn, as processes of a node do that are as fast."""
    actors = [Bundle([trial], shared=shared) for trial in trials]
    while not actors[0].is_over:
        for actor in actors:
            actor.advance(2)


def outcome(trial: Trial) -> tuple[bytes, dict[str, Any]]:
    return (trial.folder / "sae" / "sae.safetensors").read_bytes(), {
        key: value
        for key, value in result_of(trial).items()
        if key not in ("seconds", "data_wait_fraction")
    }


def test_six_trials_in_step_fetch_hardly_more_than_one(fetched: list[int], trial: Trial):
    before = sum(fetched)
    alone = replace(several(trial, 3)[2], folder=trial.folder / "alone")
    in_step([alone], None)
    by_one = sum(fetched) - before

    six = several(trial, 6)
    before = sum(fetched)
    with keeping_chunks(STORE, TWO_WINDOWS + COLUMN_BYTES) as shared:
        in_step(six, shared)
    by_six = sum(fetched) - before
    assert by_six <= 1.2 * by_one, f"one fetches {by_one:,} bytes, six fetch {by_six:,}"
    assert outcome(six[2]) == outcome(alone)


def test_trials_far_apart_and_a_keeper_that_dies_change_nothing(fetched: list[int], trial: Trial):
    two = several(replace(trial, n_steps=14), 2)
    alone = [replace(t, folder=t.folder / "alone") for t in two]
    in_step(alone, None)
    with keeping_chunks(STORE, CHUNK_BYTES) as shared:  # room for a chunk: nothing is there twice
        ahead, behind = (Bundle([t], shared=shared) for t in two)
        ahead.advance(5)
        behind.advance(2)
        [keeper] = shared._keepers.values()
        ray.kill(keeper, no_restart=False)
        ahead.advance(5)
        behind.advance(2)
        ray.kill(keeper)
        for actor in (ahead, behind):
            while not actor.is_over:
                actor.advance(5)
    assert [outcome(t) for t in two] == [outcome(t) for t in alone]


def test_who_asks_while_it_is_read_waits_for_that_read(fetched: list[int]):
    keeper = ChunkKeeper(STORE, TWO_WINDOWS)
    keeper.part("chunk", "groups/0", 0)  # and with it what is read once: metadata, a commit record
    requests = [len(fetched)]
    keeper.part("chunk", "groups/0", 1)
    requests.append(len(fetched))
    with ThreadPoolExecutor(8) as threads:
        asked = [("chunk", "groups/0", 2)] * 8
        found = [part for part in threads.map(lambda part: keeper.part(*part), asked) if part]
    requests.append(len(fetched))
    assert requests[2] - requests[1] == requests[1] - requests[0] > 0
    assert len(found) == 8
    assert len({ref for [ref] in found}) == 1
    rows = ray.get(found[0][0])
    assert rows.shape == (200, 64)
    assert not rows.flags.writeable, "it is a view of what all processes see"


def test_what_was_asked_for_longest_ago_is_dropped_first(fetched: list[int]):
    keeper = ChunkKeeper(STORE, 2 * CHUNK_BYTES)
    first = {n: keeper.part("chunk", "groups/0", n) for n in (0, 1)}
    assert keeper.part("chunk", "groups/0", 0) == first[0]
    keeper.part("chunk", "groups/0", 2)  # in place of 1
    assert keeper.part("chunk", "groups/0", 0) == first[0]
    assert keeper.part("chunk", "groups/0", 1) != first[1]


def test_what_can_not_be_read_is_left_to_the_trial_to_tell(fetched: list[int]):
    keeper = ChunkKeeper(STORE, TWO_WINDOWS)
    assert keeper.part("chunk", "groups/7", 0) is None
    assert keeper.part("column", "no-such", 0) is None
