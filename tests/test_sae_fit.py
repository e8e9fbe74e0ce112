import dataclasses
import math

import pytest
import torch

from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder, load_fit, save_fit
from sae.losses import auxk_size

CONFIGS = {
    "dense jumprelu": {"selection": "jumprelu"},
    "nested jumprelu": {"selection": "jumprelu", "prefixes": (16, 32, 64)},
    "kron jumprelu": {"encoder": KronShape(h=8, m=2, n=4), "selection": "jumprelu"},
    "dense topk": {},
    "dense batch": {"selection": "batch_topk", "scaling": "token_standardize"},
    "kron topk": {"encoder": KronShape(h=8, m=2, n=4)},
    "kron nested batch": {
        "encoder": KronShape(h=8, m=2, n=4),
        "selection": "batch_topk",
        "prefixes": (16, 32, 64),
    },
}


def make(name="dense topk", n_steps=40, cfg=None, **sizes):
    sae_cfg = SaeConfig(**{"d_model": 12, "d_sae": 64, "k": 4, **CONFIGS[name], **sizes})
    sae = SparseAutoencoder(sae_cfg, {0: 2.0, 3: 0.5})
    cfg = cfg or FitConfig(lr=3e-3, dead_after_tokens=400)
    return Fit(sae, cfg, n_steps, seed=5)


def batches(n, d_model=12, rows=100):
    generator = torch.Generator().manual_seed(3)
    dictionary = torch.randn(30, d_model, generator=generator)
    for _ in range(n):
        code = torch.rand(rows, 30, generator=generator)
        x = (code * (code > 0.9)) @ dictionary + 1.0
        layer = torch.randint(0, 2, (rows,), generator=generator) * 3
        yield torch.where(layer[:, None] == 3, 4 * x, x), layer


def trained(fit, data):
    return [fit.step(x, layer) for x, layer in data]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_error_and_keeps_unit_rows(name):
    fit = make(name, n_steps=120)
    data = list(batches(120))
    fit.initialise(*data[0])
    reports = trained(fit, data)
    early = sum(r.fvu for r in reports[:10]) / 10
    late = sum(r.fvu for r in reports[-10:]) / 10
    assert late < 0.7 * early
    norms = torch.linalg.vector_norm(fit.sae.w_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones(64))
    assert reports[-1].l0 <= 4 + 1e-6 or "jumprelu" in name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fit_stopped_and_resumed_equals_an_unbroken_one_bit_for_bit(name, tmp_path):
    data = list(batches(12))
    whole = make(name)
    whole.initialise(*data[0])
    first = trained(whole, data[:6])
    save_fit(tmp_path, whole, {"cursor": [0, 6]})
    rest = trained(whole, data[6:])

    resumed = make(name)
    assert load_fit(tmp_path, resumed) == {"cursor": [0, 6]}
    assert trained(resumed, data[6:]) == rest
    assert first[-1].step == 6
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_a_saved_state_is_untouched_by_further_steps():
    data = list(batches(3))
    fit = make()
    fit.initialise(*data[0])
    trained(fit, data[:2])
    state = fit.state_dict()
    copy = {name: tensor.clone() for name, tensor in state.items()}
    trained(fit, data[2:])
    assert all(torch.equal(state[name], copy[name]) for name in state)


def test_initialise_puts_b_dec_at_the_mean_of_the_scaled_batch():
    fit = make()
    x, layer = next(batches(1))
    fit.initialise(x, layer)
    factor = torch.where(layer == 3, 0.5, 2.0)[:, None]
    torch.testing.assert_close(fit.sae.b_dec.detach(), (x * factor).mean(0))


def test_reported_fvu_is_in_the_models_own_units():
    for name in ("dense topk", "dense batch"):
        fit = make(name)
        x, layer = next(batches(1))
        fit.initialise(x, layer)
        fit.sae.train()
        with torch.no_grad():
            units = fit.sae.scaling.units(x, layer)
            x_hat = units.restore(fit.sae(units.scale(x)))
        expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert fit.step(x, layer).fvu == pytest.approx(float(expected), rel=1e-5)


def test_one_step_equals_adam_with_projected_and_clipped_gradients_written_out():
    cfg = FitConfig(
        lr=1e-2, warmup_fraction=0.0, decay_fraction=0.0, auxk_coefficient=0.0, grad_clip=0.01
    )
    fit, x, layer = make(cfg=cfg), *next(batches(1))
    fit.initialise(x, layer)
    twin = make(cfg=cfg).sae
    twin.load_state_dict(fit.sae.state_dict())
    scaled = x * torch.where(layer == 3, 0.5, 2.0)[:, None]
    error = (scaled - twin(scaled)).square().sum()
    (error / (scaled - scaled.mean(0)).square().sum()).backward()
    w, g = twin.w_dec.data, twin.w_dec.grad
    assert g is not None
    g -= (g * w).sum(1, keepdim=True) * w
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.optim.Adam(twin.parameters(), lr=1e-2).step()
    w /= w.norm(dim=1, keepdim=True)

    report = fit.step(x, layer)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for (name, ours), (_, theirs) in zip(
        fit.sae.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["dense topk", "kron topk"])
def test_auxk_moves_encoder_and_decoder_of_dead_latents_towards_the_residual(name):
    fit, x, layer = make(name, cfg=FitConfig(dead_after_tokens=400)), *next(batches(1))
    fit.initialise(x, layer)
    fit.firing.tokens_since[:16] = 400
    dead = fit.firing.dead(400)
    scaled, _ = fit._scaled(x, layer)
    with torch.no_grad():
        residual = scaled - fit.sae(scaled)
    loss = fit._auxk(scaled, residual, dead, torch.ones(len(fit.sae.w_dec)))
    loss.backward()
    w_dec = fit.sae.w_dec
    assert w_dec.grad is not None
    assert w_dec.grad[:16].any()
    assert not w_dec.grad[16:].any()
    assert fit.sae.encoder.w_enc.grad is not None
    assert fit.sae.encoder.w_enc.grad.any()
    assert fit.sae.b_dec.grad is None
    # Downhill is towards the residual, not away from it.
    acts = fit.sae.encoder.reference(scaled, fit.sae.b_dec).detach()
    k_aux = min(auxk_size(12), 16)
    best = acts[:, :16].topk(k_aux, dim=1)
    code = torch.zeros_like(acts[:, :16]).scatter(1, best.indices, best.values)
    rows = w_dec[:16].detach().requires_grad_()
    variance = (residual - residual.mean(0)).square().sum()
    expected = (residual - code @ rows).square().sum() / variance
    torch.testing.assert_close(loss, expected * min(16 / auxk_size(12), 1))
    (grad,) = torch.autograd.grad(expected * min(16 / auxk_size(12), 1), rows)
    torch.testing.assert_close(w_dec.grad[:16], grad, rtol=1e-4, atol=1e-6)


def test_auxk_revives_dead_latents():
    cfg = FitConfig(lr=3e-3, dead_after_tokens=300, grad_clip=float("inf"))
    data = list(batches(80))
    dead = {}
    for coefficient in (0.0, 1 / 32):
        fit = make(cfg=dataclasses.replace(cfg, auxk_coefficient=coefficient), n_steps=80)
        fit.initialise(*data[0])
        with torch.no_grad():
            fit.sae.encoder.b_enc[:32] = -6.0
        dead[coefficient] = trained(fit, data)[-1].dead_fraction
    assert dead[1 / 32] < dead[0.0]


def test_auxk_size_is_the_power_of_two_nearest_half_the_width():
    assert [auxk_size(d) for d in (1, 2, 128, 768, 1024, 2304)] == [1, 1, 64, 512, 512, 1024]


def test_size_weights_favour_large_prefixes_and_have_mean_one():
    fit = make("kron nested batch", cfg=FitConfig(prefix_weights="size"))
    weights = fit._prefix_weights(3)
    assert weights.mean() == pytest.approx(1.0)
    assert weights.tolist() == pytest.approx([16 * 3 / 112, 32 * 3 / 112, 64 * 3 / 112])


def test_nested_loss_sums_the_fvu_of_every_prefix():
    cfg = FitConfig(auxk_coefficient=0.0)
    fit, x, layer = make("kron nested batch", cfg=cfg), *next(batches(1))
    fit.initialise(x, layer)
    scaled, _ = fit._scaled(x, layer)
    fit.sae.train()
    with torch.no_grad():
        latents = fit.sae.encode(scaled).dense()
        parts = [latents[:, :p] @ fit.sae.w_dec[:p] + fit.sae.b_dec for p in (16, 32, 64)]
        variance = (scaled - scaled.mean(0)).square().sum()
        expected = sum(float((scaled - part).square().sum() / variance) for part in parts)
    assert fit.step(x, layer).loss == pytest.approx(expected, rel=1e-5)


def test_threshold_follows_the_smallest_kept_value():
    fit = make("dense batch")
    data = list(batches(2))
    fit.initialise(*data[0])
    smallest = []
    for x, layer in data:
        fit.sae.train()
        scaled, _ = fit._scaled(x, layer)
        with torch.no_grad():
            smallest.append(float(fit.sae.encode(scaled).values.min()))
        fit.step(x, layer)
    expected = 0.99 * smallest[0] + 0.01 * smallest[1]
    assert float(fit.sae.threshold) == pytest.approx(expected, rel=1e-5)


def test_learning_rate_rises_stays_and_falls():
    cfg = FitConfig(warmup_fraction=0.1, decay_fraction=0.2)
    rates = [cfg.lr_at(step, 100, 2**14) for step in range(100)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == rates[50] == rates[79] == pytest.approx(2e-4)
    assert rates[99] == pytest.approx(1e-5)
    assert FitConfig().lr_at(50, 100, 2**16) == pytest.approx(1e-4)


def test_a_bad_batch_is_refused_and_changes_nothing():
    fit, x, layer = make(), *next(batches(1))
    fit.initialise(x, layer)
    fit.step(x, layer)
    before = fit.state_dict()
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 100 rows of x hold NaN or infinity"):
        fit.step(bad, layer)
    with pytest.raises(ValueError, match=r"layers \[7\] have no scale"):
        fit.step(x, torch.full_like(layer, 7))
    with pytest.raises(ValueError, match=r"takes \(tokens, 12\)"):
        fit.step(x[:, :5], layer)
    assert all(torch.equal(before[name], tensor) for name, tensor in fit.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_zero_rows_and_constant_batches_never_give_nan(name):
    fit, x, layer = make(name), *next(batches(1))
    x[:50] = 0
    fit.initialise(x, layer)
    trained(fit, [(x, layer)] * 2)
    for constant in (torch.zeros_like(x), torch.ones_like(x)):
        report = fit.step(constant, torch.zeros_like(layer))
        assert all(math.isfinite(value) for value in dataclasses.astuple(report))
    assert all(p.isfinite().all() for p in fit.sae.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_fraction": 0.9, "decay_fraction": 0.2},
        {"sparsity_coefficient": -1.0},
        {"lr": 0.0},
        {"dead_after_tokens": 0},
        {"threshold_momentum": 1.0},
        {"auxk_coefficient": -1.0},
        {"grad_clip": 0.0},
    ],
)
def test_impossible_training_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitConfig(**wrong)


def test_a_state_of_another_shape_is_refused(tmp_path):
    save_fit(tmp_path, make())
    with pytest.raises(ValueError, match="resumes with the configuration it began with"):
        load_fit(tmp_path, make(k=5))
