import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.selection import MatrixBlock, select_above, select_batch_top_k, top_k_per_row


@settings(max_examples=80)
@given(st.integers(1, 400), st.data())
def test_pruned_top_k_finds_the_values_of_topk(n_columns, data):
    k = data.draw(st.integers(1, n_columns), label="k")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 10, 10**6]), label="distinct values")
    scores = torch.randint(-levels, levels, (7, n_columns)).float()
    values, indices = top_k_per_row(scores, k)
    assert torch.equal(values.sort(1).values, scores.topk(k).values.flip(1))
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(row.unique()) == k for row in indices)


@settings(max_examples=80)
@given(st.data())
def test_batch_top_k_keeps_exactly_the_budget_or_all_that_are_on(data):
    n_tokens, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    budget = data.draw(st.integers(1, n_tokens * width))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 10**6]), label="distinct values")
    scores = torch.randint(-levels, levels, (n_tokens, width)).float()
    piece = data.draw(st.integers(1, width), label="block width")
    ids = torch.arange(width)
    blocks = [
        MatrixBlock(s, i) for s, i in zip(scores.split(piece, 1), ids.split(piece), strict=True)
    ]
    chosen = select_batch_top_k(blocks, n_tokens, budget, width)
    positive = scores[scores > 0]
    expected = positive.topk(min(budget, len(positive))).values
    assert torch.equal(chosen.scores.sort(descending=True).values, expected)
    assert torch.equal(scores[chosen.pattern.rows, chosen.pattern.indices], chosen.scores)
    assert int(chosen.pattern.offsets[-1]) == len(chosen.scores)


@given(st.integers(1, 9), st.integers(1, 70), st.data())
def test_the_lower_bound_of_a_block_is_reached_by_so_many_entries(n_tokens, width, data):
    n = data.draw(st.integers(1, n_tokens * width))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randn(n_tokens, width)
    bound = MatrixBlock(scores, torch.arange(width)).lower_bound(n)
    assert bound is None or int((scores >= bound).sum()) >= n


def test_above_keeps_positive_entries_from_the_bound_on():
    scores = torch.tensor([[1.0, -1.0, 3.0], [0.0, 2.0, 0.5]])
    block = MatrixBlock(scores, torch.tensor([5, 6, 7]))
    chosen = select_above([block], 1.0, 2, 8)
    assert chosen.pattern.indices.tolist() == [5, 7, 6]
    assert chosen.pattern.offsets.tolist() == [0, 2, 3]
    assert chosen.scores.tolist() == [1.0, 3.0, 2.0]
    kept = chosen.keep(chosen.scores > 1)
    assert kept.pattern.indices.tolist() == [7, 6]
    assert kept.pattern.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("budget", [1, 5])
def test_no_positive_score_selects_nothing(budget):
    block = MatrixBlock(-torch.rand(3, 4), torch.arange(4))
    chosen = select_batch_top_k([block], 3, budget, 4)
    assert chosen.pattern.offsets.tolist() == [0, 0, 0, 0]
