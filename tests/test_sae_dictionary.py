import itertools

import pytest
import torch

from sae.dictionary import cosines, dictionary_mcc, effective_rank, mmcs


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
