"""Streamed layer distances and norms against a naive reference over the same rows."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from actors.errors import InputError
from actors.grouper import DistanceReport, Grouper, distances
from actors.grouping import GroupConfig, checked, choose
from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from tests.stores import encoded

LAYERS = (0, 1, 2, 5)
SEPARATOR = 7
MASSIVE = 40.0


def spec_of(**changes):
    settings = {
        "d_model": 6,
        "layers": LAYERS,
        "split": "train",
        "n_population": 20,
        "n_sequences": 11,
        "rows_per_sequence": 5,
        "first_position": 1,
        "sequences_per_chunk": 2,
        "chunks_per_shard": 2,
        "seed": 3,
        "dtype": "float32",
        "scales": (1.0,) * len(LAYERS),
    }
    return StoreSpec(**{**settings, **changes})


def filled_store(path, spec):
    """A store of layers that drift apart, far from the origin, with separators and massive rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((spec.n_rows, len(spec.layers), spec.d_model)).cumsum(axis=1)
    x += 3 * rng.standard_normal(spec.d_model)
    x = x.astype(np.float32)
    x[[4, 20], 1] *= MASSIVE
    token_id = rng.integers(0, 6, spec.n_rows).astype(np.uint32)
    token_id[::9] = SEPARATOR
    store = ActivationStore.create(path, spec)
    for shard in store.missing():
        start, stop = spec.shard_range(shard)
        sequence, position = spec.rows_of(shard)
        columns = {"sequence": sequence, "position": position, "token_id": token_id[start:stop]}
        arrays = {name: x[start:stop, i].copy() for i, name in enumerate(spec.arrays)}
        store.write_shard(shard, encoded(spec, shard, arrays), columns)
    return x, token_id


def naive_distance(a, b):
    angles = [
        math.acos(min(1, max(-1, u @ v / np.linalg.norm(u) / np.linalg.norm(v)))) / math.pi
        for u, v in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]
    return sum(angles) / len(angles)


def work(arguments, method, jobs):
    """In process, and the last job first."""
    return [(job, getattr(Grouper(*arguments), method)(*job)) for job in reversed(list(jobs))]


def measured(path, center: bool, row_filter: RowFilter | None = None) -> DistanceReport:
    return distances(path, row_filter, Grouper(path).median_norms(), center, work)


def hygiene_of(path):
    return RowFilter(Hygiene(), (SEPARATOR,), Grouper(path).median_norms())


@pytest.mark.parametrize("center", [False, True], ids=["raw", "centered"])
def test_streamed_distances_equal_those_taken_token_by_token(tmp_path, center):
    x, _ = filled_store(tmp_path / "pilot", spec_of())
    report = measured(tmp_path / "pilot", center)

    x = x.astype(np.float64)
    if center:
        x -= x.mean(axis=0)
    for i, j in itertools.product(range(len(LAYERS)), repeat=2):
        expected = 0.0 if i == j else naive_distance(x[:, i], x[:, j])
        assert report.matrix[i, j] == pytest.approx(expected, abs=1e-12)
    assert report.n_rows == report.n_stored == len(x)
    assert report.layers == LAYERS
    assert report.centered == center
    np.testing.assert_array_equal(checked(report.matrix), report.matrix)


def test_rows_that_the_filter_drops_in_any_layer_count_in_no_pair(tmp_path):
    x, token_id = filled_store(tmp_path / "pilot", spec_of())
    report = measured(tmp_path / "pilot", True, hygiene_of(tmp_path / "pilot"))

    keep = token_id != SEPARATOR
    keep[[4, 20]] = False
    assert report.n_rows == keep.sum() < report.n_stored
    kept = x[keep].astype(np.float64)
    kept -= kept.mean(axis=0)
    assert report.matrix[0, 3] == pytest.approx(naive_distance(kept[:, 0], kept[:, 3]), abs=1e-12)


def test_norms_of_a_layer_are_those_of_its_own_kept_rows(tmp_path):
    x, token_id = filled_store(tmp_path / "pilot", spec_of())
    report = measured(tmp_path / "pilot", False, hygiene_of(tmp_path / "pilot"))

    norms = np.linalg.norm(x.astype(np.float64), axis=-1)
    text = token_id != SEPARATOR
    assert text[[4, 20]].all(), "the massive rows are dropped for their norm alone"
    quiet = text.copy()
    quiet[[4, 20]] = False
    assert report.mean_norm[0] == pytest.approx(norms[text, 0].mean(), rel=1e-6)
    assert report.mean_norm[1] == pytest.approx(norms[quiet, 1].mean(), rel=1e-6)
    assert report.median_norm[1] == pytest.approx(np.median(norms[:, 1]), rel=1e-6)
    assert report.median_norm == Grouper(tmp_path / "pilot").median_norms()


def test_distances_do_not_depend_on_how_the_store_is_cut(tmp_path):
    # Another shard size permutes the rows, so only the shape of the chunks differs here.
    matrices = []
    for name, chunk in {"small": 1, "large": 4}.items():
        spec = spec_of(sequences_per_chunk=chunk, chunks_per_shard=4 // chunk)
        filled_store(tmp_path / name, spec)
        matrices.append(measured(tmp_path / name, True).matrix)
    np.testing.assert_allclose(*matrices, rtol=1e-12)


def test_the_same_activation_in_two_layers_is_at_distance_zero_and_its_opposite_at_one(tmp_path):
    spec = spec_of(layers=(0, 1, 2), scales=(1.0,) * 3, n_sequences=2)
    rows = np.random.default_rng(1).standard_normal((spec.n_rows, 6)).astype(np.float32)
    store = ActivationStore.create(tmp_path / "pilot", spec)
    sequence, position = spec.rows_of(0)
    columns = {"sequence": sequence, "position": position, "token_id": np.zeros(10, np.uint32)}
    arrays = {"layers/0": rows, "layers/1": 2 * rows, "layers/2": -rows}
    store.write_shard(0, encoded(spec, 0, arrays), columns)

    report = measured(tmp_path / "pilot", False)

    assert report.matrix[0, 1] == pytest.approx(0, abs=1e-8)  # arccos(1 - 1e-16) is 1.5e-8
    assert report.matrix[0, 2] == pytest.approx(1, abs=1e-8)


def test_an_activation_of_length_zero_counts_as_orthogonal(tmp_path):
    spec = spec_of(layers=(0, 1), scales=(1.0,) * 2, n_sequences=1)
    store = ActivationStore.create(tmp_path / "pilot", spec)
    sequence, position = spec.rows_of(0)
    columns = {"sequence": sequence, "position": position, "token_id": np.zeros(5, np.uint32)}
    ones = np.ones((5, 6), np.float32)
    arrays = encoded(spec, 0, {"layers/0": ones, "layers/1": 0 * ones})
    store.write_shard(0, arrays, columns)

    assert measured(tmp_path / "pilot", False).matrix[0, 1] == 0.5


def test_a_report_is_plain_numbers_and_can_be_grouped(tmp_path):
    filled_store(tmp_path / "pilot", spec_of())
    report = measured(tmp_path / "pilot", True)
    grouping = choose(report.matrix, GroupConfig(n_groups=2), report.layers)
    assert json.loads(json.dumps(asdict(report)))["distances"] == report.matrix.tolist()
    assert sorted(layer for group in grouping.groups for layer in group.layers) == [0, 1, 2]


def test_a_filter_that_keeps_nothing_is_reported(tmp_path):
    filled_store(tmp_path / "pilot", spec_of())
    medians = Grouper(tmp_path / "pilot").median_norms()
    drop_all = RowFilter(Hygiene(), range(10), medians)
    with pytest.raises(InputError, match=r"keeps none of the 55 tokens .* loosen the hygiene"):
        measured(tmp_path / "pilot", True, drop_all)


def test_an_unfinished_pilot_is_not_measured(tmp_path):
    ActivationStore.create(tmp_path / "pilot", spec_of())
    with pytest.raises(StoreError, match=r"shard \d .* is not committed"):
        measured(tmp_path / "pilot", True)
