from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.draw import Stream, layer_draw, permutation
from storage.errors import StoreError
from storage.layout import StoreSpec
from tests.stores import small_spec

POPULATION = st.integers(1, 40)
SETTINGS = st.fixed_dictionaries(
    {
        "n_population": POPULATION,
        "n_sequences": POPULATION,
        "rows_per_sequence": st.integers(1, 6),
        "first_position": st.integers(0, 2),
        "sequences_per_chunk": st.integers(1, 4),
        "chunks_per_shard": st.integers(1, 4),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
).filter(lambda drawn: drawn["n_sequences"] <= drawn["n_population"])


@settings(max_examples=30)
@given(SETTINGS)
def test_shards_partition_the_harvested_tokens(drawn: dict):
    spec = small_spec(**drawn)
    rows = [spec.rows_of(shard) for shard in range(spec.n_shards)]
    tokens = [t for s, p in rows for t in zip(s.tolist(), p.tolist(), strict=True)]
    sequences = {sequence for sequence, _ in tokens}
    last = spec.first_position + spec.rows_per_sequence
    assert len(sequences) == spec.n_sequences
    assert max(sequences) < spec.n_population
    assert sorted(tokens) == sorted(
        (s, p) for s in sequences for p in range(spec.first_position, last)
    )


@settings(max_examples=30)
@given(SETTINGS)
def test_shard_and_chunk_ranges_tile_the_rows(drawn: dict):
    spec = small_spec(**drawn)
    for n, span in ((spec.n_shards, spec.shard_range), (spec.n_chunks, spec.chunk_range)):
        edges = [span(i) for i in range(n)]
        assert edges[0][0] == 0
        assert edges[-1][1] == spec.n_rows
        assert all(stop == after for (_, stop), (after, _) in pairwise(edges))
    assert -(-spec.n_chunks // spec.chunks_per_shard) == spec.n_shards


def test_a_smaller_store_holds_the_head_of_a_larger_ones_sequences():
    small = small_spec(n_sequences=6, sequences_per_chunk=2, chunks_per_shard=3)
    large = small_spec(n_sequences=40, sequences_per_chunk=2, chunks_per_shard=3)
    np.testing.assert_array_equal(small.sequences_of(0), large.sequences_of(0))


def test_rows_of_a_shard_are_permuted_and_each_shard_differently():
    spec = small_spec()
    assert not np.array_equal(spec.permutation_of(0), np.arange(spec.shard_rows))
    assert not np.array_equal(spec.permutation_of(0), spec.permutation_of(1))


def test_draws_are_the_format_and_never_change():
    layers = layer_draw(11, np.arange(12), np.arange(12) % 4, 2, (3, 5, 8))
    assert layers.tolist() == [3, 5, 5, 3, 3, 3, 5, 8, 5, 5, 5, 8]
    assert permutation(10, 11, Stream.SHARD_ROWS, 4).tolist() == [4, 0, 7, 1, 6, 8, 3, 5, 9, 2]
    assert small_spec().sequences_of(2).tolist() == [1, 8, 9, 10, 33, 37]
    assert small_spec().digest == "2cc6d38e"


def test_the_hash_is_the_documented_one():
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    seed, sequence, position, group, layers = 11, 123456, 789, 2, (3, 5, 8)
    state = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    for value in (Stream.LAYER, sequence, position, group):
        state = mix(((state ^ value) + 0x9E3779B97F4A7C15) % 2**64)
    drawn = layer_draw(seed, np.array([sequence]), np.array([position]), group, layers)
    assert drawn[0] == layers[(state >> 32) * len(layers) >> 32]


@settings(max_examples=40)
@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(2, 40), st.integers(0, 30), st.integers(0, 2**31)
)
def test_layer_draw_is_uniform_for_every_seed_and_group(
    seed: int, n_layers: int, group: int, first: int
):
    """By the chi-squared statistic, whose mean is n - 1 and whose deviation sqrt(2 (n - 1))."""
    sequence, position = (a.ravel() for a in np.meshgrid(first + np.arange(50), np.arange(128)))
    drawn = layer_draw(seed, sequence, position, group, tuple(range(n_layers)))
    expected = len(drawn) / n_layers
    counts = np.bincount(drawn, minlength=n_layers)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = n_layers - 1
    assert chi_squared < freedom + 8 * np.sqrt(2 * freedom) + 16


def test_layer_draw_is_uniform_and_independent_between_groups_and_positions():
    sequence, position = (a.ravel() for a in np.meshgrid(np.arange(300), np.arange(200)))
    layers = (2, 4, 5, 9)
    draws = [layer_draw(0, sequence, position, group, layers) for group in (0, 1)]
    n = len(sequence)
    for drawn in draws:
        counts = np.array([(drawn == layer).sum() for layer in layers])
        assert np.abs(counts - n / 4).max() < 5 * np.sqrt(n * 3 / 16)
    pairs = np.unique(np.stack(draws), axis=1, return_counts=True)[1]
    assert len(pairs) == 16
    assert np.abs(pairs - n / 16).max() < 5 * np.sqrt(n * 15 / 256)
    neighbours = (draws[0][1:] == draws[0][:-1]).mean()
    assert abs(neighbours - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n)


def test_spec_survives_json():
    spec = small_spec(groups=((0, 2), (1,)), scales=(0.5, 1.0, 2.0**-9), dtype="bfloat16")
    assert StoreSpec.from_json(spec.to_json()) == spec
    assert spec.arrays == ("groups/0", "groups/1")
    assert spec.layers_of("groups/0") == (0, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_sequences": 41}, "n_sequences is 41 of a population of 40"),
        ({"n_sequences": 0}, "n_sequences is 0"),
        ({"layers": (2, 1, 0)}, "layers are"),
        ({"layers": (0, 1, 256)}, "layers are"),
        ({"groups": ((0, 1), (1, 2))}, "each layer in exactly one group"),
        ({"groups": ((0, 1, 2), ())}, "no group empty"),
        ({"dtype": "float64"}, "float16, bfloat16, float32"),
        ({"scales": (1.0, 3.0, 1.0)}, "power of two"),
        ({"scales": (1.0,)}, "3 layers"),
        ({"rows_per_sequence": 65536}, "65535"),
        ({"chunks_per_shard": 0}, "at least 1"),
    ],
)
def test_an_impossible_store_is_refused(changes: dict, named: str):
    with pytest.raises(StoreError, match=named):
        small_spec(**changes)


def test_unknown_arrays_and_shards_are_named():
    with pytest.raises(StoreError, match=r"layers/0, layers/1, layers/2"):
        small_spec().layers_of("groups/0")
    with pytest.raises(StoreError, match="shards 0 to 3"):
        small_spec().shard_range(4)
