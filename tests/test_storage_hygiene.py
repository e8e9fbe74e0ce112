import json

import numpy as np
import pytest

from storage.errors import StoreError
from storage.hygiene import Hygiene, RowFilter

TOKEN = np.array([5, 2, 5, 5, 5], np.uint32)
POSITION = np.array([0, 1, 2, 3, 4], np.uint16)
LAYER = np.array([1, 1, 1, 3, 3], np.uint8)
NORM = np.array([1, 1, 21, 21, 101], np.float32)
MEDIANS = {1: 2.0, 3: 10.0}


def kept(**rules) -> list[bool]:
    row_filter = RowFilter(Hygiene(**rules), (2, 3), MEDIANS)
    return row_filter.keep(TOKEN, POSITION, LAYER, NORM).tolist()


def test_special_tokens_and_massive_norms_are_dropped_by_default():
    assert kept() == [True, False, False, True, False]


def test_each_rule_drops_its_own_rows():
    assert kept(drop_special_tokens=False) == [True, True, False, True, False]
    assert kept(max_norm_ratio=100.0) == [True, False, True, True, True]
    assert kept(drop_first_positions=4, max_norm_ratio=100.0) == [False, False, False, False, True]


def test_a_norm_at_the_limit_is_kept():
    limit = np.full(5, 20, np.float32)
    row_filter = RowFilter(Hygiene(), (), MEDIANS)
    assert row_filter.keep(TOKEN, POSITION, np.full(5, 1, np.uint8), limit).all()


def test_a_norm_that_is_no_number_is_dropped():
    norm = np.full(5, np.nan, np.float32)
    assert not RowFilter(Hygiene(), (), MEDIANS).keep(TOKEN, POSITION, LAYER, norm).any()


def test_filter_survives_json():
    row_filter = RowFilter(Hygiene(drop_first_positions=2), (3, 2), MEDIANS)
    again = RowFilter.from_json(json.loads(json.dumps(row_filter.to_json())))
    assert again.to_json() == row_filter.to_json()
    np.testing.assert_array_equal(
        again.keep(TOKEN, POSITION, LAYER, NORM), row_filter.keep(TOKEN, POSITION, LAYER, NORM)
    )


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_layer_without_a_median_norm_is_named(layer: int):
    with pytest.raises(StoreError, match=rf"layers \[1, 3\].*layer \[{layer}\]"):
        RowFilter(Hygiene(), (), MEDIANS).keep(TOKEN, POSITION, np.full(5, layer), NORM)


@pytest.mark.parametrize("rules", [{"drop_first_positions": -1}, {"max_norm_ratio": 1.0}])
def test_rules_that_drop_everything_are_refused(rules: dict):
    with pytest.raises(ValueError, match=next(iter(rules))):
        Hygiene(**rules)
