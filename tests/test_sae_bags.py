import pytest
import torch

from sae.bags import entry_dots, entry_dots_reference, weighted_sums, weighted_sums_reference
from sae.latents import Transposed

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 4e-2},
}
COUNTS = {"even": [3, 3, 3, 3], "ragged": [0, 5, 1, 0], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("d_model", [1, 16, 33])
def test_weighted_sums_and_entry_dots_equal_their_formulas(counts, d_model, dtype):
    offsets = torch.tensor([0, *COUNTS[counts]]).cumsum(0)
    n_entries = int(offsets[-1])
    table, left = torch.randn(9, d_model, dtype=dtype), torch.randn(4, d_model, dtype=dtype)
    picks = torch.randint(0, 9, (n_entries,))
    weights = torch.rand(n_entries, dtype=dtype)
    rows = torch.arange(4).repeat_interleave(torch.tensor(COUNTS[counts]))
    torch.testing.assert_close(
        weighted_sums(table, picks, weights, offsets),
        weighted_sums_reference(table, picks, weights, offsets),
        **TOLERANCE[dtype],
    )
    torch.testing.assert_close(
        entry_dots(left, table, rows, picks),
        entry_dots_reference(left, table, rows, picks),
        **TOLERANCE[dtype],
    )


def test_transposed_groups_entries_by_key_in_order():
    by_key = Transposed.of(torch.tensor([2, 0, 2, 4]), 5)
    assert by_key.order.tolist() == [1, 0, 2, 3]
    assert by_key.offsets.tolist() == [0, 1, 1, 3, 3, 4]
