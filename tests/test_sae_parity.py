"""The fast autoencoder against its full-width formula: values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.encoders
import sae.kron
from sae import KronShape, SaeConfig, SparseAutoencoder
from sae.decoding import decode_segments
from sae.latents import SparseLatents
from sae.selection import batch_top_k_reference, top_k_reference

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
}
ENCODERS = {
    "dense": "dense",
    "kron": KronShape(h=12, m=2, n=4),
    "tall": KronShape(h=4, m=8, n=3),
    "product": KronShape(h=12, m=2, n=4, activation="relu_product"),
}


def autoencoder(cfg, dtype=torch.float64):
    sae = SparseAutoencoder(cfg, {0: 1.0}, seed=1).to(dtype)
    with torch.no_grad():
        for p in (sae.encoder.b_enc, sae.b_dec):
            p.copy_(0.3 * torch.randn_like(p))
    return sae


def reference(sae, x):
    """encode and decode as the formulas have it, all of them (tokens, d_sae) wide."""
    acts = sae.encoder.reference(x, sae.b_dec)
    if sae.cfg.selection == "topk":
        latents = top_k_reference(acts, sae.cfg.k)
    else:
        latents = batch_top_k_reference(acts, sae.cfg.k * len(x))
    sizes = sae.cfg.prefixes or (sae.cfg.d_sae,)
    return latents, torch.stack([latents[:, :p] @ sae.w_dec[:p] + sae.b_dec for p in sizes])


def ours(sae, x):
    latents = sae.encode(x)
    if not sae.cfg.prefixes:
        return latents.dense(), sae.decode(latents)[None]
    return latents.dense(), decode_segments(latents, sae.w_dec, sae.cfg.prefixes).cumsum(
        0
    ) + sae.b_dec


def values_and_grads(fn, sae, x):
    x = x.clone().requires_grad_()
    latents, x_hat = fn(sae, x)
    cotangents = [
        torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        for out in (latents, x_hat)
    ]
    grads = torch.autograd.grad((latents, x_hat), (x, *sae.parameters()), cotangents)
    return (latents, x_hat), dict(zip(["x", *dict(sae.named_parameters())], grads, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prefixes", [(), (24, 72, 96)], ids=["one", "nested"])
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("k", [1, 7, 20, 96])
def test_values_and_gradients_equal_the_full_width_form(encoder, selection, prefixes, k, dtype):
    cfg = SaeConfig(
        d_model=11, d_sae=96, k=k, encoder=ENCODERS[encoder], selection=selection, prefixes=prefixes
    )
    sae = autoencoder(cfg, dtype)
    x = torch.randn(9, 11, dtype=dtype)
    values, grads = values_and_grads(ours, sae, x)
    expected, expected_grads = values_and_grads(reference, sae, x)
    torch.testing.assert_close(values, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(grads, expected_grads, **TOLERANCE[dtype])


@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_bfloat16_keeps_the_values_of_the_full_width_form(encoder, selection):
    cfg = SaeConfig(d_model=16, d_sae=96, k=8, encoder=ENCODERS[encoder], selection=selection)
    sae = autoencoder(cfg, torch.bfloat16)
    x = torch.randn(20, 16, dtype=torch.bfloat16)
    (latents, x_hat), grads = values_and_grads(ours, sae, x)
    full = sae.encoder.reference(x, sae.b_dec)
    kept = latents > 0
    # Entries that stand are those of the formula, to bfloat16's 8 bits; none that fell beats one.
    torch.testing.assert_close(latents[kept], full[kept], rtol=2e-2, atol=1e-6)
    if selection == "topk":
        fell = full.masked_fill(kept, 0).amax(1)
        assert (fell <= latents.masked_fill(~kept, torch.inf).amin(1) * 1.01).all()
    torch.testing.assert_close(
        x_hat[0].float(),
        latents.float() @ sae.w_dec.float() + sae.b_dec.float(),
        rtol=2e-2,
        atol=6e-2,
    )
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads.values())


@settings(max_examples=60)
@given(st.data())
def test_any_kronecker_shape_and_any_blocking_equal_the_full_width_form(data):
    h, m, n = (data.draw(st.integers(1, top), label=s) for s, top in [("h", 9), ("m", 4), ("n", 5)])
    k = data.draw(st.one_of(st.integers(1, h * m * n), st.just(h * m * n)), label="k")
    encoder = data.draw(st.sampled_from(["dense", KronShape(h=h, m=m, n=n)]), label="encoder")
    selection = data.draw(st.sampled_from(["topk", "batch_topk"]), label="selection")
    n_tokens = data.draw(st.integers(1, 9), label="tokens")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    cfg = SaeConfig(d_model=5, d_sae=h * m * n, k=k, encoder=encoder, selection=selection)
    sae = autoencoder(cfg)
    x = torch.randn(n_tokens, 5, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        elements = data.draw(st.sampled_from([1, 40, 1 << 20]), label="block elements")
        patch.setattr(sae_encoders, "BLOCK_ELEMENTS", elements)
        for module in (sae_encoders, sae_kron):
            patch.setattr(module, "BLOCK_LATENTS", data.draw(st.sampled_from([1, 7, 1 << 10])))
        values, grads = values_and_grads(ours, sae, x)
    expected, expected_grads = values_and_grads(reference, sae, x)
    torch.testing.assert_close(values, expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(grads, expected_grads, **TOLERANCE[torch.float64])


sae_encoders, sae_kron = sae.encoders, sae.kron


def kept_multiset(latents, selection):
    rows = latents if selection == "topk" else latents.reshape(1, -1)
    return rows.sort(1).values


@settings(max_examples=60)
@given(st.data())
def test_with_ties_the_kept_values_are_the_same_multiset_and_their_gradients_the_formulas(data):
    encoder = data.draw(st.sampled_from(["dense", KronShape(h=6, m=2, n=3)]), label="encoder")
    selection = data.draw(st.sampled_from(["topk", "batch_topk"]), label="selection")
    k = data.draw(st.integers(1, 36), label="k")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    sae = autoencoder(SaeConfig(d_model=3, d_sae=36, k=k, encoder=encoder, selection=selection))
    with torch.no_grad():
        sae.b_dec.zero_()
        for p in sae.encoder.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    x = torch.randint(-1, 2, (5, 3)).double()
    values, grads = values_and_grads(ours, sae, x)
    full, _ = reference(sae, x)
    torch.testing.assert_close(
        kept_multiset(values[0], selection), kept_multiset(full, selection), rtol=1e-9, atol=1e-9
    )
    kept = values[0] > 0

    def with_our_choice(sae, x):
        latents = torch.where(kept, sae.encoder.reference(x, sae.b_dec), 0.0)
        return latents, (latents @ sae.w_dec + sae.b_dec)[None]

    expected, expected_grads = values_and_grads(with_our_choice, sae, x)
    torch.testing.assert_close(values, expected, **TOLERANCE[torch.float64])
    torch.testing.assert_close(grads, expected_grads, **TOLERANCE[torch.float64])


def as_rounded(exact, rounded):
    """The value of `rounded`, with the gradient of `exact`."""
    return exact + (rounded.double() - exact).detach()


@settings(max_examples=60)
@given(st.data())
def test_bfloat16_gradients_of_pruned_heads_are_those_of_the_full_width_form(data):
    h, m, n = (data.draw(st.integers(1, top), label=s) for s, top in [("h", 9), ("m", 4), ("n", 5)])
    k = data.draw(st.one_of(st.integers(1, h * m * n), st.just(h * m * n)), label="k")
    selection = data.draw(st.sampled_from(["topk", "batch_topk"]), label="selection")
    activation = data.draw(st.sampled_from(["mand", "relu_product"]), label="activation")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    shape = KronShape(h=h, m=m, n=n, activation=activation)
    cfg = SaeConfig(d_model=5, d_sae=h * m * n, k=k, encoder=shape, selection=selection)
    sae, x = autoencoder(cfg, torch.bfloat16), torch.randn(9, 5).bfloat16().requires_grad_()
    latents = sae.encode(x)
    # Not negative, so that the only sums that cancel are those over tokens.
    slopes = torch.rand(latents.values.shape).bfloat16()
    weights = (sae.encoder.w_enc, sae.encoder.b_enc, sae.b_dec)
    grads = torch.autograd.grad(latents.values, (x, *weights), slopes)

    # The same bfloat16 numbers in float64, rounded where bfloat16 rounds them.
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    wide_x, w_enc, b_enc, b_dec = wide
    centred = as_rounded(wide_x - b_dec, x - sae.b_dec)
    with torch.no_grad():
        rounded = torch.nn.functional.linear(x - sae.b_dec, *weights[:2])
    pre_acts = as_rounded(centred @ w_enc.T + b_enc, rounded)
    u = pre_acts[:, : h * m].unflatten(1, (h, m, 1)).relu()
    v = pre_acts[:, h * m :].unflatten(1, (h, 1, n)).relu()
    products = (u * v).flatten(1)
    choose = top_k_reference if selection == "topk" else batch_top_k_reference
    naive = choose(products, k if selection == "topk" else 9 * k)
    kept = latents.dense() > 0
    ours = torch.where(kept, products, 0.0)
    assert torch.equal(kept_multiset(ours, selection), kept_multiset(naive, selection))
    acts = torch.where(kept, products, 1.0)
    acts = torch.where(kept, acts.sqrt() if activation == "mand" else acts, 0.0)
    torch.testing.assert_close(latents.dense().double(), acts.detach(), rtol=4e-3, atol=1e-9)

    cotangent = SparseLatents(slopes, latents.pattern).dense().double()
    grad_acts, *expected = torch.autograd.grad(acts, (pre_acts, *wide), cotangent)
    terms = [  # Sums of the absolute values of what each gradient adds up.
        grad_acts @ w_enc.abs(),
        grad_acts.T @ centred.abs(),
        grad_acts.sum(0),
        grad_acts.sum(0) @ w_enc.abs(),
    ]
    for grad, formula, size in zip(grads, expected, terms, strict=True):
        assert grad.dtype == torch.bfloat16
        assert ((grad.double() - formula).abs() <= 2e-2 * size + 1e-9).all()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_when_every_latent_is_off_nothing_is_nan(encoder, selection):
    cfg = SaeConfig(d_model=11, d_sae=96, k=5, encoder=ENCODERS[encoder], selection=selection)
    sae = autoencoder(cfg)
    with torch.no_grad():
        sae.encoder.b_enc.fill_(-1e3)
    (latents, x_hat), grads = values_and_grads(ours, sae, torch.randn(4, 11, dtype=torch.float64))
    assert not latents.any()
    torch.testing.assert_close(x_hat[0], sae.b_dec.expand(4, -1))
    encoder_grads = [g for name, g in grads.items() if name.startswith("encoder")]
    assert all(not g.any() for g in encoder_grads)


def test_heads_that_are_off_get_no_gradient_and_the_others_do():
    shape = KronShape(h=6, m=2, n=3)
    sae = autoencoder(SaeConfig(d_model=8, d_sae=36, k=36, encoder=shape))
    with torch.no_grad():
        sae.encoder.b_enc[:4] = -1e3  # P of heads 0 and 1
    x = torch.randn(30, 8, dtype=torch.float64)
    sae(x).sum().backward()
    grad = sae.encoder.w_enc.grad
    off = torch.tensor([*range(4), *range(12, 18)])
    assert not grad[off].any()
    assert grad[4:12].any(1).all()
    assert grad[18:].any(1).all()
