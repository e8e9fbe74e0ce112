import itertools

import pytest
import torch
from torch.nn import functional as F

from sae.dictionary import cosines, dictionary_mcc, effective_rank, mmcs, nearest_rows


def test_a_shuffled_and_flipped_dictionary_is_the_same():
    rows = torch.randn(20, 8)
    other = -3 * rows[torch.randperm(20)]
    assert dictionary_mcc(rows, other) == pytest.approx(1)
    assert mmcs(rows, other) == pytest.approx(1, abs=1e-6)


def test_mcc_is_the_best_of_all_matchings():
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    table = cosines(a, b)
    best = max(
        float(sum(table[i, j] for i, j in enumerate(p)) / 5)
        for p in itertools.permutations(range(5))
    )
    assert dictionary_mcc(a, b) == pytest.approx(best)
    assert best <= mmcs(a, b)


def test_effective_rank_of_equal_directions_is_their_number():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    with pytest.raises(ValueError, match="all zero"):
        effective_rank(torch.zeros(3, 3))


def test_nearest_rows_are_those_of_a_loop_over_all_pairs(monkeypatch):
    monkeypatch.setattr("sae.dictionary._TABLE_ENTRIES", 50)  # several blocks
    rows = torch.randn(30, 5) * torch.rand(30, 1)
    rows[3] = -rows[4]  # opposite is far
    values, indices = nearest_rows(rows, 4)
    for i in range(30):
        others = {
            j: float(F.cosine_similarity(rows[i], rows[j], dim=0)) for j in range(30) if j != i
        }
        best = sorted(others, key=lambda j: -others[j])[:4]
        assert indices[i].tolist() == best
        assert values[i].tolist() == pytest.approx([others[j] for j in best], abs=1e-5)


def test_nearest_rows_of_few_are_all_others():
    values, indices = nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 8)
    assert (values.tolist(), indices.tolist()) == ([[0.0], [0.0]], [[1], [0]])
    assert nearest_rows(torch.ones(1, 3), 8)[1].shape == (1, 0)
