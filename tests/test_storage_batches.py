import hashlib
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.language_model import ModelShape
from orchestrator import config_file
from orchestrator.stores import store_spec, window_chunks
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.draw import Stream, draw, permutation
from storage.errors import StoreError
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.windows import (
    READING_ORDER,
    Batch,
    chunk_windows,
    chunks_to_mix,
    mixed,
    run_rows,
    segments,
)
from tests.stores import encoded, filled_store, small_spec

GROUPS = ((0, 2), (1,))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return filled_store(tmp_path_factory.mktemp("store"), small_spec(groups=GROUPS))


@pytest.fixture(scope="module")
def per_layer(tmp_path_factory) -> ActivationStore:
    return filled_store(tmp_path_factory.mktemp("store"), small_spec(dtype="float16"))


def reader(store: ActivationStore, batch_rows=7, window_chunks=4, seed=0, drop=(0,), array=None):
    row_filter = RowFilter(Hygiene(), drop, {0: 2.0, 1: 2.0, 2: 2.0})
    array = array or store.spec.arrays[0]
    return ShuffledBatches(store, array, row_filter, batch_rows, window_chunks, seed)


def epoch(batches: ShuffledBatches, n: int = 0) -> list[Batch]:
    stream = batches.batches(Cursor(epoch=n))
    return [batch for _, batch in islice(stream, batches.batches_per_epoch)]


def rows(batches: list[Batch]) -> np.ndarray:
    """Each row with its layer, in the order of reading."""
    return np.concatenate([np.column_stack([b.x, b.layer]) for b in batches])


def in_order(table: np.ndarray) -> np.ndarray:
    return table[np.lexsort(table.T)]


@settings(max_examples=15)
@given(
    batch_rows=st.integers(1, 130),
    window_chunks=st.integers(1, 14),
    seed=st.integers(0, 2**40),
    number=st.integers(0, 3),
    array=st.sampled_from(["groups/0", "groups/1"]),
)
def test_every_kept_row_comes_exactly_once_per_epoch(
    store, batch_rows, window_chunks, seed, number, array
):
    batches = reader(store, batch_rows, window_chunks, seed, array=array)
    n_rows = store.spec.n_rows
    kept = store.column("token_id", 0, n_rows) != 0
    expected = np.column_stack([store.read(array, 0, n_rows), store.row_layers(array, 0, n_rows)])[
        kept
    ]

    seen = epoch(batches, number)

    assert batches.n_rows == kept.sum() < n_rows
    np.testing.assert_array_equal(in_order(rows(seen)), in_order(expected))
    assert all(len(batch.layer) == batch_rows for batch in seen[:-1])


@settings(max_examples=15)
@given(batch_rows=st.integers(1, 60), window_chunks=st.integers(1, 14), done=st.integers(0, 200))
def test_resuming_at_any_cursor_gives_the_unbroken_stream(store, batch_rows, window_chunks, done):
    batches = reader(store, batch_rows, window_chunks)
    done %= 2 * batches.batches_per_epoch
    unbroken = list(islice(batches.batches(Cursor()), done + 4))

    again = reader(store, batch_rows, window_chunks)
    for start in (unbroken[done][0], Cursor(step=done)):
        for (cursor, batch), (expected_cursor, expected) in zip(
            again.batches(start), unbroken[done:], strict=False
        ):
            assert cursor == expected_cursor
            np.testing.assert_array_equal(batch.x, expected.x)
            np.testing.assert_array_equal(batch.layer, expected.layer)


@settings(max_examples=15)
@given(window_chunks=st.integers(1, 14), size=st.integers(1, 60), times=st.integers(2, 4))
def test_a_larger_batch_holds_the_rows_of_the_smaller_ones(store, window_chunks, size, times):
    small, large = (epoch(reader(store, n, window_chunks)) for n in (size, times * size))
    for i, batch in enumerate(large):
        expected = rows(small[i * times : (i + 1) * times])
        np.testing.assert_array_equal(in_order(rows([batch])), in_order(expected))


def test_epochs_and_seeds_differ_in_order(store):
    orders = [
        rows(epoch(reader(store, seed=seed), number)) for seed, number in ((0, 0), (0, 1), (1, 0))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (orders[i] != orders[j]).any()


def test_rows_of_a_single_chunk_are_permuted_anew_each_epoch(tmp_path):
    batches = reader(filled_store(tmp_path / "s", small_spec(n_sequences=2)))
    one, other = (rows(epoch(batches, number)) for number in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(in_order(one), in_order(other))


def test_per_layer_arrays_carry_their_layer_and_stay_aligned_across_arrays(per_layer):
    streams = [epoch(reader(per_layer, array=array)) for array in per_layer.spec.arrays]
    for layer, stream in enumerate(streams):
        assert all((batch.layer == layer).all() for batch in stream)
    sizes = [[len(batch.layer) for batch in stream] for stream in streams]
    assert sizes[0] == sizes[1] == sizes[2]


@settings(max_examples=40)
@given(
    n_chunks=st.integers(1, 200),
    chunks_per_shard=st.integers(1, 16),
    window_chunks=st.integers(1, 40),
    seed=st.integers(0, 2**40),
)
def test_windows_use_every_chunk_once_and_as_many_shards_as_they_can(
    n_chunks, chunks_per_shard, window_chunks, seed
):
    windows = chunk_windows(n_chunks, chunks_per_shard, window_chunks, seed, epoch=0, segment=0)
    order = np.concatenate(windows)
    assert sorted(order.tolist()) == list(range(n_chunks))
    sizes = [len(window) for window in windows]
    assert max(sizes) <= window_chunks
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-n_chunks // window_chunks)
    left = np.bincount(order // chunks_per_shard)
    for window in windows:
        used = np.bincount(window // chunks_per_shard, minlength=len(left))
        assert (used > 0).sum() == min(len(window), (left > 0).sum())
        left -= used


def test_no_window_repeats_a_shard_where_equal_shards_suffice():
    for window in chunk_windows(64 * 16, 16, 32, seed=3, epoch=2, segment=1):
        assert len(set((window // 16).tolist())) == len(window)


def test_batches_mix_sequences_almost_like_a_uniform_draw(tmp_path):
    spec = small_spec(
        d_model=1,
        layers=(0,),
        scales=(1.0,),
        n_population=2048,
        n_sequences=2048,
        rows_per_sequence=32,
        sequences_per_chunk=8,
        chunks_per_shard=16,
    )
    store = ActivationStore.create(tmp_path / "s", spec)
    for shard in range(spec.n_shards):
        sequence, position = spec.rows_of(shard)
        x = (sequence[:, None] + 1).astype(np.float32)
        store.write_shard(
            shard,
            encoded(spec, shard, {"layers/0": x}),
            {"sequence": sequence, "position": position, "token_id": sequence},
        )
    everything = RowFilter(Hygiene(drop_special_tokens=False), (), {0: 1e9})
    batches = ShuffledBatches(store, "layers/0", everything, 512, window_chunks=16, seed=0)
    distinct = [len(np.unique(batch.x.numpy())) for batch in epoch(batches)]
    uniform = 2048 * (1 - (1 - 1 / 2048) ** 512)
    assert np.mean(distinct) >= 0.8 * uniform


SHAPES = {
    "bert": (768, 512),
    "gpt2": (768, 1024),
    "pythia-160m": (768, 2048),
    "qwen2-0.5b": (896, 32_768),
    "pythia-410m": (1024, 2048),
    "tinyllama": (2048, 2048),
    "gemma-2-2b": (2304, 8192),
    "llama-2-7b": (4096, 4096),
    "llama-2-13b": (5120, 4096),
    "llama-3-8b": (4096, 8192),
    "mistral-7b": (4096, 32_768),
    "llama-3-70b": (8192, 8192),
}
"""Width and longest sequence of models."""


@pytest.mark.parametrize("tokens", [5_000_000, 100_000_000])
@pytest.mark.parametrize(("d_model", "longest"), SHAPES.values(), ids=SHAPES)
def test_a_batch_at_the_defaults_mixes_almost_like_a_uniform_draw_over_the_store(
    tmp_path, tokens, d_model, longest
):
    """On the places of rows alone: nothing is written."""
    cfg = config_file.parse(
        {
            "run_dir": str(tmp_path),
            "model": {"name": "a/b"},
            "corpus": {"source": "stdlib"},
            "harvest": {"tokens": tokens},
            "sweep": {"d_sae": 64, "k": [4]},
        },
        "test",
    )
    shape = ModelShape(n_layers=2, d_model=d_model, longest=longest, vocabulary=1000)
    spec = store_spec(
        *(cfg, shape, "train"),
        context=shape.context,
        first_position=0,
        scales={0: 1.0, 1: 1.0},
        groups=((0, 1),),
    )
    batch_rows, n_sequences = cfg.train.batch_tokens, spec.n_sequences
    chunks = window_chunks(cfg, spec)
    uniform = n_sequences * (1 - (1 - 1 / n_sequences) ** batch_rows)
    cut = segments(spec.n_shards, chunks)
    for s, w in {(0, 0), (len(cut) - 1, -1)}:  # the first batches of an epoch, and its last
        first, last = (shard * spec.chunks_per_shard for shard in (cut[s].start, cut[s].stop))
        n_chunks = min(last, spec.n_chunks) - first
        windows = chunk_windows(n_chunks, spec.chunks_per_shard, chunks, 0, 0, s)
        window = first + windows[w]
        sequences = np.concatenate([sequences_of_chunk(spec, int(chunk)) for chunk in window])
        order = mixed(len(sequences), spec, 0, 0, s, w % len(windows))
        batches = sequences[order][: 20 * batch_rows].reshape(-1, batch_rows)
        distinct = np.mean([len(np.unique(batch)) for batch in batches])
        assert distinct >= 0.8 * uniform


@given(n_shards=st.integers(1, 500), window_chunks=st.integers(1, 100))
def test_segments_are_as_few_as_can_be_and_alike_in_size(n_shards: int, window_chunks: int):
    cut = segments(n_shards, window_chunks)
    assert [shard for segment in cut for shard in segment] == list(range(n_shards))
    sizes = [len(segment) for segment in cut]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= window_chunks
    assert len(sizes) == math.ceil(n_shards / window_chunks)


@given(
    n_rows=st.integers(0, 3000),
    per_sequence=st.integers(1, 4000),
    per_chunk=st.integers(1, 40),
    per_shard=st.integers(1, 16),
    window=st.integers(0, 3),
)
def test_mixing_is_a_permutation_in_runs_of_a_small_part_of_a_chunk_and_of_its_sequences(
    n_rows, per_sequence, per_chunk, per_shard, window
):
    spec = small_spec(
        rows_per_sequence=per_sequence, sequences_per_chunk=per_chunk, chunks_per_shard=per_shard
    )
    order = mixed(n_rows, spec, 0, 1, 2, window)
    assert sorted(order.tolist()) == list(range(n_rows))
    breaks = np.count_nonzero(np.diff(order) != 1)
    # By chance a run or two follow the one that they followed before.
    longest = min(16, per_sequence * per_chunk // 128, per_chunk * per_shard // 8)
    assert breaks >= n_rows / max(1, longest) - 12


def sequences_of_chunk(spec: StoreSpec, chunk: int) -> np.ndarray:
    shard, within = divmod(chunk, spec.chunks_per_shard)
    sequence, _ = spec.rows_of(shard)
    return sequence[within * spec.chunk_rows : (within + 1) * spec.chunk_rows]


def test_an_unfinished_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="lacks 1 of its 4 shards"):
        reader(filled_store(tmp_path / "s", small_spec(), [0, 1, 3]))


def test_a_filter_that_drops_everything_is_refused(store):
    with pytest.raises(StoreError, match="drops all 110 rows of groups/0"):
        next(reader(store, drop=tuple(range(11))).batches(Cursor()))


def test_the_order_of_reading_is_that_of_its_number():
    """A trial that is continued by a newer Strata goes on in the order in which it began, or is refused."""
    spec = small_spec(
        n_sequences=1024,
        n_population=1024,
        rows_per_sequence=16,
        sequences_per_chunk=128,
        chunks_per_shard=2,
    )
    windows = chunk_windows(spec.n_chunks, spec.chunks_per_shard, 3, seed=5, epoch=1, segment=0)
    orders = [mixed(len(w) * spec.chunk_rows, spec, 5, 1, 0, i) for i, w in enumerate(windows)]
    assert run_rows(spec) == 16
    cut = [shard for segment in segments(10, 4) for shard in (segment.start, segment.stop)]
    large = replace(spec, n_sequences=10**5, n_population=10**5, sequences_per_chunk=8)
    assert chunks_to_mix(large, batch_rows=4096) == 768
    text = np.concatenate([*windows, *orders, cut]).astype("<i8").tobytes()
    assert hashlib.blake2b(text, digest_size=8).hexdigest() == "be4798569b3531e7"
    assert READING_ORDER == 2, "another order has another number"


@pytest.mark.parametrize("start", [Cursor(), Cursor(step=3)])
def test_the_first_batch_waits_for_the_columns_of_its_segment_alone(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, start: Cursor
):
    read = []
    column = ActivationStore.column
    monkeypatch.setattr(ActivationStore, "column", lambda *a: read.append(a[2]) or column(*a))
    next(reader(store, window_chunks=1).batches(start))
    assert max(read) < store.spec.shard_range(2)[1], "of four shards, one for each segment"


def test_sizes_must_be_positive(store):
    with pytest.raises(StoreError, match="window_chunks=0"):
        reader(store, window_chunks=0)


@given(
    n_chunks=st.integers(1, 60),
    chunks_per_shard=st.integers(1, 8),
    window_chunks=st.integers(1, 12),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    segment=st.integers(0, 3),
)
def test_windows_are_filled_as_the_format_describes_it(
    n_chunks: int, chunks_per_shard: int, window_chunks: int, seed: int, epoch: int, segment: int
):
    order = permutation(n_chunks, seed, Stream(4), epoch, segment).tolist()
    shards = range(-(-n_chunks // chunks_per_shard))
    left = [[chunk for chunk in order if chunk // chunks_per_shard == shard] for shard in shards]
    windows: list[list[int]] = []
    m = math.ceil(n_chunks / window_chunks)
    for w in range(m):
        ties = draw(seed, Stream(4), epoch, segment, w + 1, np.arange(len(shards)))
        window: list[int] = []
        room = n_chunks * (w + 1) // m - n_chunks * w // m
        while len(window) < room:
            for shard in sorted(shards, key=lambda shard: (-len(left[shard]), ties[shard])):
                if left[shard] and len(window) < room:
                    window.append(left[shard].pop())
        windows.append(window)
    found = chunk_windows(n_chunks, chunks_per_shard, window_chunks, seed, epoch, segment)
    assert [window.tolist() for window in found] == windows
