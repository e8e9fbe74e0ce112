import pytest
import torch

from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder
from sae.jumprelu import BANDWIDTH, jump


def test_values_and_straight_through_gradients_are_the_papers():
    t = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    near = BANDWIDTH / 4
    acts = torch.tensor([0.9, 0.5 + near, 0.5 - near, 0.1], dtype=torch.float64).requires_grad_()
    values, gates = jump(acts, t)
    assert values.tolist() == pytest.approx([0.9, 0.5 + near, 0, 0])
    assert gates.tolist() == [1, 1, 0, 0]
    grad_acts, grad_t = torch.autograd.grad(values.sum(), (acts, t))
    assert grad_acts.tolist() == [1, 1, 0, 0]
    assert grad_t.tolist() == pytest.approx([0, -0.5 / BANDWIDTH, -0.5 / BANDWIDTH, 0])
    (grad_t,) = torch.autograd.grad(gates.sum(), t)
    assert grad_t.tolist() == pytest.approx([0, -1 / BANDWIDTH, -1 / BANDWIDTH, 0])


@pytest.mark.parametrize("encoder", ["dense", KronShape(h=8, m=2, n=3)])
def test_every_latent_has_its_own_threshold_in_training_and_at_inference(encoder):
    cfg = SaeConfig(d_model=7, d_sae=48, k=4, encoder=encoder, selection="jumprelu")
    sae = SparseAutoencoder(cfg, {0: 1.0})
    assert sae.log_thresholds is not None
    thresholds = torch.rand(48) + 0.2
    sae.log_thresholds.data.copy_(thresholds.log())
    x = torch.randn(30, 7)
    acts = sae.encoder.reference(x, sae.b_dec).detach()
    expected = torch.where(acts > sae.log_thresholds.exp(), acts, 0.0).detach()
    torch.testing.assert_close(sae.train().encode(x).dense().detach(), expected)
    at_rest = sae.reconstruct(x, torch.zeros(30, dtype=torch.long)).latents
    torch.testing.assert_close(at_rest.dense(), expected)
    assert (at_rest.values > 0).all()


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_a_higher_price_buys_a_lower_l0(penalty):
    torch.manual_seed(0)
    x, layer = torch.randn(200, 7) @ torch.randn(7, 7), torch.zeros(200, dtype=torch.long)
    l0 = []
    for price in (0.0, 1.0):
        sae = SparseAutoencoder(SaeConfig(d_model=7, d_sae=48, k=4, selection="jumprelu"), {0: 0.5})
        assert sae.log_thresholds is not None
        sae.log_thresholds.data.fill_(-2.0)
        cfg = FitConfig(
            lr=3e-2, sparsity_coefficient=price, sparsity_penalty=penalty, decay_fraction=0.0
        )
        fit = Fit(sae, cfg, 100)
        reports = [fit.step(x, layer) for _ in range(100)]
        l0.append(reports[-1].l0)
    assert l0[1] < 0.8 * l0[0]
