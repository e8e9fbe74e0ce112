"""Counts of latents against sums over the whole matrix of activations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.latent_statistics import N_BINS, LatentStatistics
from sae.latents import Pattern, SparseLatents


def sparse(dense: torch.Tensor) -> SparseLatents:
    """A matrix as a code; zeros are left out."""
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.searchsorted(rows, torch.arange(len(dense) + 1))
    pattern = Pattern(indices=columns, offsets=offsets, d_sae=dense.shape[1])
    return SparseLatents(dense[rows, columns], pattern)


def activations(n_tokens: int, d_sae: int, seed: int) -> torch.Tensor:
    """Of very different sizes, most of them 0, the last latent dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_sae, generator=generator).exp() * 4.0 ** torch.arange(-2, d_sae - 2)
    x = torch.where(torch.rand(n_tokens, d_sae, generator=generator) < 0.3, x, 0.0)
    x[:, -1] = 0
    return x


def counted(batches) -> LatentStatistics:
    statistics = LatentStatistics(6, (3, 5))
    for layer, x in batches:
        statistics.update(sparse(x), layer)
    return statistics


def test_every_statistic_equals_its_formula_over_the_whole_matrix():
    x, y = activations(300, 6, 0), activations(200, 6, 1)
    found, both = counted([(3, x), (5, y)]), torch.cat([x, y])
    assert found.n_tokens.tolist() == [300, 200]
    fired = both > 0
    assert torch.equal(found.frequencies, fired.double().mean(0))
    assert torch.equal(found.maxima, both.amax(0))
    living = slice(0, 5)
    means = both.double().sum(0)[living] / fired.sum(0)[living]
    assert torch.allclose(found.means[living], means, rtol=1e-12)
    assert torch.allclose(
        found.firing_rates, torch.stack([(x > 0).double().mean(0), (y > 0).double().mean(0)])
    )
    activity = torch.stack([x.double().mean(0), y.double().mean(0)])[:, living]
    shares = activity / activity.sum(0)
    assert torch.allclose(found.layer_shares[:, living], shares, rtol=1e-12)
    spread = [2.0 ** -sum(p * np.log2(p) for p in column) for column in shares.T.tolist()]
    assert torch.allclose(found.layer_spread[living], torch.tensor(spread, dtype=torch.float64))
    dead = [found.frequencies[5], found.means[5], found.maxima[5], found.layer_spread[5]]
    assert [float(value) for value in dead] == [0] * 4
    assert not found.layer_shares[:, 5].any()


def test_histograms_are_numpys_over_a_range_that_holds_the_maximum():
    x = activations(500, 6, 2)
    found = counted([(3, part) for part in x.split(7)])
    for latent in range(5):
        values, top = x[:, latent].numpy(), float(found.upper_edges[latent])
        assert values.max() < top <= 2 * values.max()
        wanted, _ = np.histogram(values[values > 0], bins=N_BINS, range=(0, top))
        assert found.histogram[latent].tolist() == wanted.tolist()
    assert not found.histogram[5].any()
    assert float(found.upper_edges[5]) == 0


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_neither_the_cut_into_batches_nor_their_order_changes_what_is_counted(sizes, random):
    x, y = activations(sum(sizes), 6, 3), activations(40, 6, 4)
    whole = counted([(3, x), (5, y)])
    batches = [(3, part) for part in x.split(sizes)] + [(5, y)]
    random.shuffle(batches)
    found = counted(batches)
    for name in ("n_tokens", "counts", "maxima", "histogram", "upper_edges"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert torch.allclose(found.sums, whole.sums, rtol=1e-12)


def test_the_layer_profile_of_planted_latents():
    """Latent 0 fires at layer 3 alone, 1 at both alike, 2 three times as strongly at layer 5."""
    x, y = torch.zeros(10, 6), torch.zeros(20, 6)
    x[:4, 0] = 2.0
    x[:5, 1], y[:10, 1] = 1.0, 1.0  # half of the tokens of each, whose numbers differ
    x[:2, 2], y[:4, 2] = 1.0, 3.0
    found = counted([(3, x), (5, y)])
    for name, wanted in (
        ("layer_shares", [[1, 0], [0.5, 0.5], [0.25, 0.75]]),
        ("firing_rates", [[0.4, 0], [0.5, 0.5], [0.2, 0.2]]),
    ):
        profile = getattr(found, name)[:, :3].T
        assert torch.allclose(profile, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)
    assert found.layer_spread[:2].tolist() == pytest.approx([1, 2])
    assert 1 < float(found.layer_spread[2]) < 2


def test_entries_of_value_0_are_not_in_use():
    pattern = Pattern(indices=torch.tensor([0, 1]), offsets=torch.tensor([0, 2]), d_sae=6)
    statistics = LatentStatistics(6, (3, 5))
    statistics.update(SparseLatents(torch.tensor([0.0, 1.0]), pattern), 3)
    assert statistics.counts.sum(0).tolist() == [0, 1, 0, 0, 0, 0]
    assert int(statistics.histogram.sum()) == 1


def test_a_layer_that_was_not_announced_is_refused():
    with pytest.raises(ValueError, match=r"layer 4 is not counted here, but \[3, 5\] are"):
        counted([(4, activations(3, 6, 0))])
