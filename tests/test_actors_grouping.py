"""Clustering of layer distances: against brute force, by hand, and against published figures."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import is_monotonic, is_valid_linkage
from scipy.spatial.distance import squareform

from actors.errors import InputError
from actors.grouping import (
    GroupConfig,
    amad,
    choose,
    complete_linkage,
    contiguous_linkage,
    optimal,
)

METHODS = ["complete", "contiguous", "optimal"]
CUTS = {"complete": complete_linkage, "contiguous": contiguous_linkage, "optimal": optimal}
# Four layers: 0 and 1 are close, 2 and 3 are close, the pairs are far apart.
BY_HAND = np.array(
    [
        [0.00, 0.10, 0.40, 0.50],
        [0.10, 0.00, 0.30, 0.45],
        [0.40, 0.30, 0.00, 0.20],
        [0.50, 0.45, 0.20, 0.00],
    ]
)


@st.composite
def matrices(draw, tied):
    n = draw(st.integers(1, 8), label="layers")
    n_pairs = n * (n - 1) // 2
    if tied:
        pairs = draw(st.lists(st.sampled_from([0, 1, 2, 4]), min_size=n_pairs, max_size=n_pairs))
    else:
        pairs = draw(st.permutations(range(1, n_pairs + 1)))
    return squareform(np.array(pairs) / 32) if n > 1 else np.zeros((1, 1))


def runs(n, n_groups):
    for inner in itertools.combinations(range(1, n), n_groups - 1):
        edges = [0, *inner, n]
        yield tuple(tuple(range(a, b)) for a, b in itertools.pairwise(edges))


def naive_linkage(distances, n_groups, neighbours_only):
    groups = [(row,) for row in range(len(distances))]
    while len(groups) > n_groups:
        pairs = itertools.pairwise(groups) if neighbours_only else itertools.combinations(groups, 2)
        left, right = min(pairs, key=lambda pair: distances[np.ix_(*pair)].max())
        groups = sorted([*(set(groups) - {left, right}), tuple(sorted(left + right))])
    return tuple(groups)


def published(shared, model):
    document = json.loads((shared / "reference" / f"group_sae_pythia-{model}.json").read_text())
    partitions = {
        int(g): tuple(
            sorted(tuple(np.flatnonzero(np.array(labels) == c).tolist()) for c in set(labels))
        )
        for g, labels in document["labels"].items()
    }
    return {int(g): value for g, value in document["amad"].items()}, partitions


@pytest.fixture
def pythia_1b(shared):
    document = json.loads((shared / "reference/group_sae_pythia-1b_distances.json").read_text())
    lower = np.zeros((16, 16))
    for row, values in enumerate(document["lower_triangle"]):
        lower[row, : len(values)] = values
    return lower + lower.T


def test_amad_of_a_partition_worked_by_hand():
    assert amad(BY_HAND, ((0, 1), (2, 3))) == pytest.approx((0.10 + 0.20) / 2)
    assert amad(BY_HAND, ((0, 1, 2), (3,))) == pytest.approx((0.40 + 0) / 2)
    assert amad(BY_HAND, ((0, 1, 2, 3),)) == 0.50
    assert amad(BY_HAND, ((0,), (1,), (2,), (3,))) == 0


def test_groups_of_a_matrix_worked_by_hand():
    grouping = choose(BY_HAND, GroupConfig(threshold=0.2, last_layer="grouped"))

    assert [group.layers for group in grouping.groups] == [(0, 1), (2, 3)]
    assert [group.max_distance for group in grouping.groups] == [0.1, 0.2]
    assert grouping.amad_curve == pytest.approx({1: 0.5, 2: 0.15, 3: 0.1 / 3, 4: 0})
    assert grouping.amad == grouping.amad_curve[2]
    assert grouping.linkage == ((0, 1, 0.1, 2), (2, 3, 0.2, 2), (4, 5, 0.5, 4))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(data=st.data())
def test_exactly_as_many_groups_as_asked_for_come_out(method, tied, data):
    distances = data.draw(matrices(tied))
    for n_groups in range(1, len(distances) + 1):
        partition = CUTS[method](distances, n_groups)
        assert len(partition) == n_groups
        assert sorted(itertools.chain(*partition)) == list(range(len(distances)))
        if method != "complete":
            assert list(itertools.chain(*partition)) == list(range(len(distances)))


def test_equal_distances_still_give_every_number_of_groups():
    distances = 0.25 * (1 - np.eye(6))
    for method, n_groups in itertools.product(METHODS, range(1, 7)):
        assert len(CUTS[method](distances, n_groups)) == n_groups


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
@settings(max_examples=60)
@given(data=st.data())
def test_optimal_has_the_least_amad_of_all_contiguous_partitions(tied, data):
    distances = data.draw(matrices(tied))
    for n_groups in range(1, len(distances) + 1):
        least = min(amad(distances, partition) for partition in runs(len(distances), n_groups))
        assert amad(distances, optimal(distances, n_groups)) == least


@pytest.mark.parametrize("method", ["complete", "contiguous"])
@settings(max_examples=40)
@given(data=st.data())
def test_linkage_equals_merging_the_closest_pair_again_and_again(method, data):
    distances = data.draw(matrices(tied=False))
    for n_groups in range(1, len(distances) + 1):
        expected = naive_linkage(distances, n_groups, method == "contiguous")
        assert CUTS[method](distances, n_groups) == expected


@pytest.mark.parametrize("method", ["complete", "contiguous"])
@settings(max_examples=40)
@given(distances=matrices(tied=True))
def test_merges_are_a_linkage_that_scipy_can_draw(method, distances):
    grouping = choose(distances, GroupConfig(method=method, last_layer="grouped"))
    if len(distances) > 1:
        merges = np.array(grouping.linkage)
        assert is_valid_linkage(merges)
        assert is_monotonic(merges)


def test_an_optimal_partition_has_no_linkage():
    assert choose(BY_HAND, GroupConfig(method="optimal")).linkage is None


@settings(max_examples=40)
@given(distances=matrices(tied=True), threshold=st.sampled_from([0.01, 0.05, 0.1, 1.0]))
def test_the_fewest_groups_below_the_threshold_are_chosen(distances, threshold):
    grouping = choose(distances, GroupConfig(threshold=threshold, last_layer="grouped"))
    n_groups = len(grouping.groups)
    assert grouping.amad_curve[n_groups] < threshold
    assert all(grouping.amad_curve[fewer] >= threshold for fewer in range(1, n_groups))


def test_an_amad_equal_to_the_threshold_does_not_pass():
    distances = np.array([[0, 0.25], [0.25, 0]])
    assert len(choose(distances, GroupConfig(threshold=0.25, last_layer="grouped")).groups) == 2
    assert len(choose(distances, GroupConfig(threshold=0.26, last_layer="grouped")).groups) == 1


@pytest.mark.parametrize(
    ("last_layer", "expected"),
    [("exclude", [(4, 5), (6,)]), ("alone", [(4, 5), (6,), (7,)]), ("grouped", [(4, 5), (6, 7)])],
)
def test_the_last_layer_is_left_out_or_stands_alone_or_joins(last_layer, expected):
    cfg = GroupConfig(n_groups=2, last_layer=last_layer)
    grouping = choose(BY_HAND, cfg, layers=(4, 5, 6, 7))
    assert [group.layers for group in grouping.groups] == expected
    assert [group.id for group in grouping.groups] == list(range(len(expected)))
    assert grouping.amad == grouping.amad_curve[2]


def test_a_grouping_survives_json():
    grouping = choose(BY_HAND, GroupConfig())
    for group in grouping.groups:
        assert all(type(layer) is int for layer in group.layers)
    assert json.loads(json.dumps(grouping.linkage)) == [list(row) for row in grouping.linkage]


def test_published_distances_of_pythia_1b_give_six_groups(pythia_1b):
    grouping = choose(pythia_1b, GroupConfig())  # 0.2, last layer excluded: as published

    assert len(grouping.groups) == 6
    for n_groups, value in {5: 0.222, 6: 0.172, 7: 0.150}.items():
        assert round(grouping.amad_curve[n_groups], 3) == value
    runs_of_layers = list(itertools.chain(*(group.layers for group in grouping.groups)))
    assert runs_of_layers == list(range(15)), "contiguous, though nothing asked for it"


def test_published_partitions_have_their_published_amad(shared, pythia_1b):
    values, partitions = published(shared, "1b")
    for n_groups, partition in partitions.items():
        assert len(partition) == n_groups
        # The published matrix is rounded to two decimals, so its mean of maxima is off by 0.005.
        assert amad(pythia_1b, partition) == pytest.approx(values[n_groups], abs=0.005)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_worse_than_the_published_partition_at_the_chosen_size(
    shared, pythia_1b, method
):
    _, partitions = published(shared, "1b")
    ours = choose(pythia_1b, GroupConfig(method=method, n_groups=6))
    assert ours.amad < amad(pythia_1b, partitions[6])


@pytest.mark.parametrize(("model", "n_groups"), [("160m", 6), ("410m", 9), ("1b", 6)])
def test_the_rule_of_choice_picks_the_published_number_of_groups(shared, model, n_groups):
    values, partitions = published(shared, model)
    assert min(g for g, value in values.items() if value < GroupConfig().threshold) == n_groups
    assert len(partitions[n_groups]) == n_groups


def test_optimal_spends_groups_on_single_layers(pythia_1b):
    # Least AMAD is not even groups: a single layer counts as 0. docs/grouping.md warns of it.
    linked = choose(pythia_1b, GroupConfig(n_groups=6))
    least = choose(pythia_1b, GroupConfig(n_groups=6, method="optimal"))
    assert least.amad < linked.amad
    assert max(g.max_distance for g in least.groups) > max(g.max_distance for g in linked.groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(0, 1): 0.3}, "differs from its mirror image"),
        ({(2, 2): 0.1}, "compares a layer with itself"),
        ({(0, 3): 1.5, (3, 0): 1.5}, "lies outside"),
        ({(0, 3): np.nan, (3, 0): np.nan}, "rows 0 and 3 is nan, which is not finite"),
    ],
)
def test_what_is_no_matrix_of_angular_distances_is_refused(change, message):
    distances = BY_HAND.copy()
    for at, value in change.items():
        distances[at] = value
    with pytest.raises(InputError, match=message):
        choose(distances, GroupConfig())


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(InputError, match=r"shape \(3, 4\)"):
        choose(BY_HAND[:3], GroupConfig())


def test_layers_must_name_every_row():
    with pytest.raises(InputError, match="3 layers are named for a distance matrix of 4 rows"):
        choose(BY_HAND, GroupConfig(), layers=(0, 1, 2))


@pytest.mark.parametrize("n_groups", [4, 9])
def test_more_groups_than_layers_are_refused(n_groups):
    with pytest.raises(InputError, match=f"3 of 4 layers .* does not make {n_groups} groups"):
        choose(BY_HAND, GroupConfig(n_groups=n_groups))


def test_one_layer_that_is_excluded_leaves_nothing_to_group():
    with pytest.raises(InputError, match="0 of 1 layers"):
        choose(np.zeros((1, 1)), GroupConfig())


@pytest.mark.parametrize(
    ("field", "value"), [("threshold", 0.0), ("threshold", 1.5), ("n_groups", 0)]
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: {value}"):
        GroupConfig(**{field: value})
