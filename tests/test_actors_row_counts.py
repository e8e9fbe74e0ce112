import numpy as np
import pytest

from actors.row_counts import count_rows
from storage.hygiene import Hygiene, RowFilter
from tests.stores import filled_store, small_spec

HYGIENE = Hygiene(drop_first_positions=2, max_norm_ratio=1.05)


@pytest.mark.parametrize("groups", [(), ((0, 2), (1,))], ids=["layers", "groups"])
def test_every_row_is_counted_once_as_used_or_for_what_it_is_dropped_for(tmp_path, groups):
    spec = small_spec(groups=groups)
    store = filled_store(tmp_path / "s", spec)
    row_filter = RowFilter(HYGIENE, (0, 7), dict.fromkeys(range(3), 1.62))
    counts = count_rows(store.place.folder, row_filter)
    assert list(counts) == list(spec.arrays)
    token_id, position = (store.column(n, 0, spec.n_rows) for n in ("token_id", "position"))
    for array, count in counts.items():
        norm = store.column(f"{array}/norm", 0, spec.n_rows)
        special = np.isin(token_id, (0, 7))
        first = ~special & (position < 2)
        massive = ~special & ~first & (norm > 1.05 * 1.62)
        assert min(special.sum(), first.sum(), massive.sum()) > 0
        assert count == {
            "stored": spec.n_rows,
            "used": spec.n_rows - special.sum() - first.sum() - massive.sum(),
            "special_tokens": special.sum(),
            "first_positions": first.sum(),
            "massive_norms": massive.sum(),
        }
        layers = store.row_layers(array, 0, spec.n_rows)
        assert count["used"] == row_filter.keep(token_id, position, layers, norm).sum()


def test_special_tokens_count_as_used_where_they_are_kept(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    hygiene = Hygiene(drop_special_tokens=False, max_norm_ratio=1e6)
    row_filter = RowFilter(hygiene, (0, 7), dict.fromkeys(range(3), 1.0))
    for count in count_rows(store.place.folder, row_filter).values():
        assert count["used"] == count["stored"]
        assert count["special_tokens"] == 0
