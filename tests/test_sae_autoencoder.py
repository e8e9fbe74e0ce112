import pytest
import torch

from sae import KronShape, SaeConfig, SparseAutoencoder


def make(layer_scale=None, **kw):
    cfg = SaeConfig(**{"d_model": 10, "d_sae": 48, "k": 5, **kw})
    return SparseAutoencoder(cfg, {0: 1.0, 4: 3.0} if layer_scale is None else layer_scale)


ENCODERS = ["dense", KronShape(h=6, m=2, n=4)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_threshold_inference_keeps_what_exceeds_it_token_by_token(encoder):
    sae = make(encoder=encoder, selection="batch_topk")
    sae.threshold.fill_(0.8)
    x = torch.randn(40, 10)
    layer = torch.zeros(40, dtype=torch.long)
    acts = sae.encoder.reference(x, sae.b_dec)
    together = sae.reconstruct(x, layer)
    torch.testing.assert_close(
        together.latents.dense(), torch.where(acts > 0.8, acts, 0.0).detach()
    )
    alone = torch.cat([sae.reconstruct(x[i : i + 1], layer[:1]).x_hat for i in range(40)])
    torch.testing.assert_close(together.x_hat, alone)
    assert torch.equal(sae.eval().encode(x).dense(), together.latents.dense())


def test_batch_top_k_without_a_threshold_refuses_inference():
    sae = make(selection="batch_topk")
    with pytest.raises(ValueError, match="has no inference threshold"):
        sae.reconstruct(torch.randn(3, 10), torch.zeros(3, dtype=torch.long))


def test_layer_scale_reads_each_layer_in_its_own_units():
    sae = make()
    x = torch.randn(6, 10)
    first = sae.reconstruct(x, torch.full((6,), 0)).x_hat
    second = sae.reconstruct(x / 3, torch.full((6,), 4)).x_hat
    torch.testing.assert_close(first, 3 * second)


def test_token_standardize_forgets_scale_and_mean_and_restores_them():
    sae = make(scaling="token_standardize", layer_scale={})
    x = torch.randn(6, 10)
    layer = torch.arange(6)
    plain, moved = sae.reconstruct(x, layer).x_hat, sae.reconstruct(7 * x + 2, layer).x_hat
    torch.testing.assert_close(moved, 7 * plain + 2, rtol=1e-3, atol=1e-3)


def test_a_mixed_batch_equals_its_layers_apart():
    sae = make()
    x, layer = torch.randn(8, 10), torch.tensor([0, 4] * 4)
    mixed = sae.reconstruct(x, layer).x_hat
    for which in (0, 4):
        rows = layer == which
        torch.testing.assert_close(mixed[rows], sae.reconstruct(x[rows], layer[rows]).x_hat)


def test_top_k_uses_k_latents_of_each_token():
    latents = make().encode(torch.randn(7, 10))
    assert latents.l0().tolist() == [5] * 7
    assert latents.offsets.tolist() == list(range(0, 40, 5))
    assert (latents.n_tokens, latents.d_sae) == (7, 48)


def test_the_same_seed_draws_the_same_weights():
    one, two = make(), make()
    assert torch.equal(one.w_dec, two.w_dec)
    torch.testing.assert_close(torch.linalg.vector_norm(one.w_dec, dim=1), torch.ones(48))
    assert torch.equal(one.encoder.w_enc, one.w_dec)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.randn(4, 9), r"x has shape \(4, 9\); this autoencoder takes \(tokens, 10\)"),
        (torch.randn(0, 10), r"x has shape \(0, 10\)"),
        (torch.full((4, 10), float("nan")), "4 of 4 rows of x hold NaN or infinity"),
        (torch.full((4, 10), float("-inf")), "first: row 0"),
    ],
)
def test_activations_it_cannot_read_are_refused(x, says):
    sae = make()
    with pytest.raises(ValueError, match=says):
        sae.encode(x)
    with pytest.raises(ValueError, match=says):
        sae.reconstruct(x, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize("scale", [{}, {0: 0.0}, {0: float("nan")}, {0: float("inf")}])
def test_layer_scale_needs_positive_factors(scale):
    with pytest.raises(ValueError, match="needs a positive finite factor"):
        make(layer_scale=scale)


def test_a_layer_without_a_scale_is_refused():
    with pytest.raises(ValueError, match=r"layers \[2\] have no scale; .* layers \[0, 4\]"):
        make().reconstruct(torch.randn(2, 10), torch.tensor([0, 2]))


@pytest.mark.parametrize("scaling", ["layer_scale", "token_standardize"])
def test_zero_rows_reconstruct_to_finite_rows(scaling):
    out = make(scaling=scaling).reconstruct(torch.zeros(3, 10), torch.zeros(3, dtype=torch.long))
    assert out.x_hat.isfinite().all()
