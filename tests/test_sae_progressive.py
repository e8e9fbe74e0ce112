import pytest
import torch

from sae import KronShape, LatentCounts, SaeConfig, SparseAutoencoder
from sae.progressive import (
    decoder_importance,
    decoder_spectrum,
    evaluate_prefixes,
    fit_power_law,
    importance,
    reconstruct_subset,
    rsa,
)

ENCODERS = ["dense", KronShape(h=8, m=2, n=3)]


def make(**kw):
    return SparseAutoencoder(SaeConfig(**{"d_model": 8, "d_sae": 48, "k": 6, **kw}), {0: 1.0})


def data(rows=30):
    return torch.randn(rows, 8), torch.zeros(rows, dtype=torch.long)


def test_a_power_law_is_recovered_from_any_order():
    ranks = torch.arange(1, 201).double()
    law = fit_power_law((3 * ranks**-1.7)[torch.randperm(200)])
    assert law.exponent == pytest.approx(1.7)
    assert law.r_squared == pytest.approx(1)
    assert (law.first_rank, law.last_rank) == (1, 200)
    assert fit_power_law(torch.exp(-ranks / 10)).r_squared < 0.9
    with pytest.raises(ValueError, match="fewer than three"):
        fit_power_law(torch.tensor([1.0, 0.5, 0.0, 0.0]))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_pruning_with_and_without_refill_equals_the_dense_definition(encoder, selection):
    sae = make(encoder=encoder, selection=selection)
    if selection == "batch_topk":
        sae.set_threshold(0.7)
    x, layer = data()
    kept = torch.randperm(48)[:20]
    acts = sae.encoder.reference(x, sae.b_dec).detach()

    def selected(acts):
        if selection == "batch_topk":
            return torch.where(acts > 0.7, acts, 0.0)
        best = acts.topk(6, dim=1)
        return torch.zeros_like(acts).scatter(1, best.indices, best.values)

    mask = torch.zeros(48).index_fill(0, kept, 1.0)
    for refill, expected in [(True, selected(acts * mask)), (False, selected(acts) * mask)]:
        out = reconstruct_subset(sae, x, layer, kept, refill=refill)
        torch.testing.assert_close(out.latents.dense(), expected)
        torch.testing.assert_close(out.x_hat, expected @ sae.w_dec.detach())


def test_prefixes_are_evaluated_at_every_size_and_the_last_is_the_whole():
    sae = make(prefixes=(12, 24, 48))
    x, layer = data()
    results = dict(evaluate_prefixes(sae, x, layer))
    assert list(results) == [12, 24, 48]
    whole = sae.reconstruct(x, layer)
    error = (x - whole.x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert results[48].fvu == pytest.approx(float(error), rel=1e-5)
    assert results[12].l0 < results[24].l0 < results[48].l0


def test_keeping_the_important_latents_beats_keeping_the_others():
    sae = make()
    x, layer = data(200)
    counts = LatentCounts(48)
    counts.update(sae.reconstruct(x, layer).latents)
    order = importance(counts).argsort(descending=True)
    (_, best), (_, worst) = (
        next(iter(evaluate_prefixes(sae, x, layer, o, (24,)))) for o in (order, order.flip(0))
    )
    assert best.l0 > worst.l0
    assert torch.equal(importance(counts, "frequency"), counts.frequencies)


def test_decoder_spectrum_and_importance_follow_the_covariance():
    w_dec = torch.randn(200, 6) * torch.tensor([9.0, 3, 1, 1, 1, 1])
    spectrum = decoder_spectrum(w_dec)
    expected = torch.linalg.eigvalsh(torch.cov(w_dec.double().T, correction=0)).flip(0)
    torch.testing.assert_close(spectrum, expected)
    weights = decoder_importance(w_dec)
    aligned = torch.nn.functional.normalize(w_dec, dim=1)[:, 0].abs()
    assert weights[aligned > 0.99].min() > weights[aligned < 0.3].max()


def test_rsa_is_one_for_a_rotation_and_near_zero_for_noise():
    x, _ = data(60)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert rsa(x, 2 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert abs(rsa(x, torch.randn(60, 8))) < 0.2
    with pytest.raises(ValueError, match="do not vary"):
        rsa(x, torch.ones_like(x))
