import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import LatentCounts, ReconstructionMetrics, SaeConfig, SparseAutoencoder, ce_recovered


def counted(pieces):
    total = ReconstructionMetrics()
    for x, x_hat in pieces:
        total.update(x, x_hat)
    return total


def test_metrics_equal_their_formulas():
    x, x_hat = torch.randn(50, 6) + 3, torch.randn(50, 6) + 3
    metrics = counted([(x, x_hat)])
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert metrics.explained_variance == pytest.approx(1 - float(fvu), rel=1e-5)
    cosine = torch.cosine_similarity(x, x_hat, dim=1).mean()
    assert metrics.cosine == pytest.approx(float(cosine), rel=1e-5)
    ratio = (x_hat.norm(dim=1) / x.norm(dim=1)).mean()
    assert metrics.norm_ratio == pytest.approx(float(ratio), rel=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 6), st.integers(0, 99))
def test_batches_and_workers_merge_to_the_whole(sizes, cut, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes) + 2, 4, dtype=torch.float64) + 1e4
    x_hat = x + torch.randn_like(x)
    pieces = list(zip(x.split([*sizes, 2]), x_hat.split([*sizes, 2]), strict=True))
    whole = counted([(x, x_hat)])
    merged = counted(pieces[:cut]).merge(counted(pieces[cut:]))
    assert merged.n_tokens == whole.n_tokens
    for name in ("fvu", "explained_variance", "cosine", "norm_ratio", "l0"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_zero_rows_leave_direction_metrics_alone():
    x, x_hat = torch.randn(8, 3), torch.randn(8, 3)
    alone = counted([(x, x_hat)])
    padded = counted([(torch.cat([x, torch.zeros(4, 3)]), torch.cat([x_hat, torch.ones(4, 3)]))])
    assert padded.cosine == pytest.approx(alone.cosine)
    assert padded.norm_ratio == pytest.approx(alone.norm_ratio)
    assert math.isfinite(counted([(x, torch.zeros_like(x))]).cosine)


def test_undefined_metrics_say_so():
    with pytest.raises(ValueError, match="no activations were counted"):
        _ = ReconstructionMetrics().fvu
    with pytest.raises(ValueError, match="are all equal"):
        _ = counted([(torch.ones(3, 2), torch.ones(3, 2))]).fvu
    with pytest.raises(ValueError, match="ablation must cost something"):
        ce_recovered(2.0, 2.0, 2.0)


def test_ce_recovered_is_one_when_lossless_and_zero_at_ablation():
    assert ce_recovered(2.0, 2.0, 6.0) == 1.0
    assert ce_recovered(2.0, 6.0, 6.0) == 0.0
    assert ce_recovered(2.0, 3.0, 6.0) == 0.75


def test_latent_counts_equal_the_dense_code_and_merge():
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=40, k=4), {0: 1.0})
    codes = [sae.encode(torch.randn(n, 6)) for n in (9, 3)]
    dense = torch.cat([code.dense() for code in codes]).detach().double()
    parts = [LatentCounts(40), LatentCounts(40)]
    for part, code in zip(parts, codes, strict=True):
        part.update(code)
    total = parts[0].merge(parts[1])
    assert torch.equal(total.counts, (dense > 0).sum(0))
    torch.testing.assert_close(total.energy, dense.square().sum(0))
    assert total.dead_fraction == float((~(dense > 0).any(0)).double().mean())
    torch.testing.assert_close(total.frequencies, (dense > 0).double().mean(0))
    counts, edges = total.histogram()
    assert int(counts.sum()) == int((total.counts > 0).sum())
    assert len(edges) == len(counts) + 1


def test_l0_counts_latents_in_use_only():
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=40, k=4), {0: 1.0})
    with torch.no_grad():
        sae.encoder.b_enc.fill_(-100.0)
        sae.encoder.b_enc[:2] = 100.0
    x = torch.randn(5, 6)
    metrics = ReconstructionMetrics()
    metrics.update(x, sae(x).detach(), sae.encode(x))
    assert metrics.l0 == 2.0
