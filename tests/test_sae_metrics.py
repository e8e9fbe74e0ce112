import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import LatentCounts, ReconstructionMetrics, SaeConfig, SparseAutoencoder, ce_recovered
from sae.latents import Pattern, SparseLatents
from sae.metrics import DENSE_FREQUENCY, kl_divergence, next_token_losses


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
    bias = np.square(x_hat.numpy()).sum() / np.vdot(x.numpy(), x_hat.numpy())
    assert metrics.relative_bias == pytest.approx(float(bias), rel=1e-5)
    np.testing.assert_allclose(metrics.mean.numpy(), x.numpy().mean(0), rtol=1e-5)


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
    for name in ("fvu", "explained_variance", "cosine", "norm_ratio", "relative_bias", "l0"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9)
    torch.testing.assert_close(merged.mean, whole.mean)


def test_zero_rows_leave_direction_metrics_alone():
    x, x_hat = torch.randn(8, 3), torch.randn(8, 3)
    alone = counted([(x, x_hat)])
    padded = counted([(torch.cat([x, torch.zeros(4, 3)]), torch.cat([x_hat, torch.ones(4, 3)]))])
    assert padded.cosine == pytest.approx(alone.cosine)
    assert padded.norm_ratio == pytest.approx(alone.norm_ratio)
    assert math.isfinite(counted([(x, torch.zeros_like(x))]).cosine)


def test_relative_bias_is_what_the_best_multiple_of_a_reconstruction_divides_by():
    x = torch.randn(200, 5, dtype=torch.float64)
    x_hat = 0.7 * x + 0.1 * torch.randn_like(x)
    bias = counted([(x, x_hat)]).relative_bias
    errors = {
        c: float((x - c * x_hat).square().sum()) for c in (0.999 / bias, 1 / bias, 1.001 / bias)
    }
    assert min(errors, key=lambda c: errors[c]) == 1 / bias
    assert counted([(x, 0.5 * x)]).relative_bias == pytest.approx(0.5)
    assert counted([(x, 0 * x)]).relative_bias is None


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


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 99))
def test_dense_latents_and_the_histogram_equal_a_count_by_hand(tens, seed):
    n_tokens, rng = 10 * tens, np.random.default_rng(seed)
    share = 10.0 ** rng.uniform(-3, 0, size=30)
    used = rng.random((n_tokens, 30)) < share
    used[:, :3] = np.arange(n_tokens)[:, None] % 10 == 0  # exactly at the threshold: not above
    rows, columns = used.nonzero()
    offsets = np.concatenate([[0], used.sum(1).cumsum()])
    pattern = Pattern(
        indices=torch.from_numpy(columns), offsets=torch.from_numpy(offsets), d_sae=30
    )
    counts = LatentCounts(30)
    counts.update(SparseLatents(torch.ones(len(rows)), pattern))
    frequency = used.sum(0) / n_tokens
    assert counts.dense_fraction == pytest.approx((frequency > DENSE_FREQUENCY).mean())
    found, edges = counts.histogram()
    alive = np.log10(frequency[frequency > 0])
    assert found.tolist() == np.histogram(alive, edges.numpy())[0].tolist()
    np.testing.assert_allclose(edges.diff().numpy(), 0.5)
    assert int(found.sum()) == len(alive)


def test_losses_and_divergence_equal_their_formulas():
    clean, changed = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    ids = torch.randint(11, (7,))

    def probabilities(logits):
        powers = np.exp(logits.double().numpy())
        return powers / powers.sum(1, keepdims=True)

    p, q = probabilities(clean), probabilities(changed)
    told = [-math.log(p[t, int(ids[t + 1])]) for t in range(6)]
    np.testing.assert_allclose(next_token_losses(clean, ids).numpy(), told, rtol=1e-5)
    divergence = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(kl_divergence(clean, changed).numpy(), divergence, rtol=1e-4)
    assert float(kl_divergence(clean, clean).abs().max()) < 1e-6
    assert not kl_divergence(clean, changed).allclose(kl_divergence(changed, clean))


def test_l0_counts_latents_in_use_only():
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=40, k=4), {0: 1.0})
    with torch.no_grad():
        sae.encoder.b_enc.fill_(-100.0)
        sae.encoder.b_enc[:2] = 100.0
    x = torch.randn(5, 6)
    metrics = ReconstructionMetrics()
    metrics.update(x, sae(x).detach(), sae.encode(x))
    assert metrics.l0 == 2.0
