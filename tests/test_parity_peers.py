"""Losses and gradients against SAELens, sparsify and dictionary_learning on the same weights.

Where a peer's definition is the paper's, both agree to 1e-5 (theirs times a constant where they
minimise another multiple of the same loss). Where it isn't, the test names the slip and shows it.
"""

import math
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from sae import SaeConfig, SparseAutoencoder
from sae.decoding import decode, decode_segments
from sae.latents import SparseLatents
from sae.losses import auxk_loss, auxk_size, fvu_loss, nested_loss, total_variance
from sae.selection import select_top_k

N_TOKENS, D_MODEL, D_SAE, K = 48, 16, 128, 6
PREFIXES = (16, 48, 128)
N_DEAD = 24
LOWERED = 7.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not peers.ready(), reason="needs the peers' environment: python -m benchmarks.peers"
    ),
]


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize
    w_enc = unit(torch.randn(D_SAE, D_MODEL), dim=1)
    dead = torch.arange(D_SAE) % (D_SAE // N_DEAD) == 0
    return {
        "x": 3 * torch.randn(N_TOKENS, D_MODEL) + torch.randn(D_MODEL),
        "w_enc": w_enc,
        "w_dec": unit(w_enc + 0.3 * torch.randn(D_SAE, D_MODEL), dim=1),
        "b_enc": 0.2 * torch.randn(D_SAE) - 3.0 * dead,
        "b_dec": 0.5 * torch.randn(D_MODEL),
        "dead": dead.long(),
        "k": torch.tensor(K),
        "prefixes": torch.tensor(PREFIXES),
        "lowered": torch.tensor(LOWERED),
    }


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    save_file(given, folder / "given.safetensors")
    subprocess.run(
        [
            *(peers.PYTHON, "-m", "benchmarks.peer_values"),
            *(folder / "given.safetensors", folder / "values.safetensors"),
        ],
        cwd=peers.ROOT,
        env={**os.environ, **peers.VARIABLES},
        check=True,
        capture_output=True,
    )
    flat = load_file(folder / "values.safetensors")
    cases = {}
    for name, tensor in flat.items():
        case, _, field = name.rpartition(".")
        cases.setdefault(case, {})[field] = tensor
    return cases


def autoencoder(given, selection="topk", prefixes=()):
    cfg = SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=K, selection=selection, prefixes=prefixes)
    sae = SparseAutoencoder(cfg, {0: 1.0}, seed=None)
    with torch.no_grad():
        for parameter, name in [
            (sae.encoder.w_enc, "w_enc"),
            (sae.encoder.b_enc, "b_enc"),
            (sae.w_dec, "w_dec"),
            (sae.b_dec, "b_dec"),
        ]:
            parameter.copy_(given[name])
    return sae.train()


def loss_and_grads(sae, loss):
    parameters = {
        "w_enc": sae.encoder.w_enc,
        "b_enc": sae.encoder.b_enc,
        "w_dec": sae.w_dec,
        "b_dec": sae.b_dec,
    }
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    out = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(parameters.items(), grads, strict=True)
    }
    return {"loss": loss.detach(), **out}


def ours(given, case):
    if case == "matryoshka":
        sae = autoencoder(given, "batch_topk", PREFIXES)
        latents = sae.encode(given["x"])
        segments = decode_segments(latents, sae.w_dec, PREFIXES)
        loss, _ = nested_loss(given["x"], segments, sae.b_dec, torch.ones(len(PREFIXES)))
        return loss_and_grads(sae, loss)
    sae = autoencoder(given, case)
    return loss_and_grads(sae, fvu_loss(given["x"], sae(given["x"])))


def our_auxk(given):
    """AuxK as `Fit` computes it, with the dead latents given."""
    sae, x = autoencoder(given), given["x"]
    residual = (x - sae(x)).detach()
    b_dec, ids = sae.b_dec.detach(), given["dead"].nonzero().flatten()
    blocks = sae.encoder.blocks(x - b_dec, only=ids)
    chosen = select_top_k(blocks, len(x), auxk_size(D_MODEL), D_SAE)
    values = sae.encoder.values(chosen, x, b_dec)
    explained = decode(SparseLatents(values, chosen.pattern), sae.w_dec)
    return residual, loss_and_grads(sae, auxk_loss(residual, explained))


def assert_equal(found, expected, factor=1.0, only=("loss", "w_enc", "b_enc", "w_dec", "b_dec")):
    for name in only:
        torch.testing.assert_close(
            factor * found[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
        )


def mean_to_fvu(x):
    """From the mean over tokens of the squared error, which SAELens and dictionary_learning
    minimise, to its share of the batch's variance."""
    return len(x) / total_variance(x)


@pytest.mark.parametrize("case", ["topk", "batch_topk", "matryoshka"])
def test_sae_lens_has_our_loss_and_gradients(given, theirs, case):
    assert_equal(theirs[f"sae_lens.{case}"], ours(given, case), mean_to_fvu(given["x"]))


def test_sparsify_has_our_loss_and_gradients(given, theirs):
    assert_equal(theirs["sparsify.topk"], ours(given, "topk"))


@pytest.mark.parametrize("case", ["topk", "batch_topk"])
def test_dictionary_learning_has_our_loss_and_gradients(given, theirs, case):
    assert_equal(theirs[f"dictionary_learning.{case}"], ours(given, case), mean_to_fvu(given["x"]))


def test_dictionary_learning_divides_the_nested_sum_by_the_prefixes_twice(given, theirs):
    # The paper's sum has weight 1 per prefix. Theirs weighs each 1/n and then takes the mean, so
    # AuxK, added after, counts n^2 times as much beside it.
    factor = mean_to_fvu(given["x"]) * len(PREFIXES) ** 2
    assert_equal(theirs["dictionary_learning.matryoshka"], ours(given, "matryoshka"), factor)


def test_dictionary_learning_has_our_auxk(given, theirs):
    _, expected = our_auxk(given)
    # b_dec apart: there AuxK also moves the bias through the encoder's centring, which the living
    # latents share.
    found = theirs["dictionary_learning.auxk"]
    assert_equal(found, expected, only=("loss", "w_enc", "b_enc", "w_dec"))
    assert found["b_dec"].any()
    assert not expected["b_dec"].any()


def test_auxk_of_sparsify_never_reaches_the_encoder_of_a_dead_latent_and_ours_does(given, theirs):
    # Its fused encoder drops the gradient of the pre-activations that AuxK reads.
    dead = given["dead"].bool()
    residual, expected = our_auxk(given)
    found = theirs["sparsify.auxk"]
    assert not found["w_enc"].any()
    assert expected["w_enc"][dead].any()
    # What is left is the paper's but for the denominator: x's variance, not the residual's.
    factor = total_variance(given["x"]) / total_variance(residual)
    assert_equal(found, expected, factor, only=("loss", "w_dec"))


def test_auxk_of_sae_lens_lets_dead_latents_be_negative_and_ours_does_not(given, theirs):
    # It selects among pre-activations before the ReLU, so a dead latent may enter with a negative
    # value that it can't have once alive.
    residual, expected = our_auxk(given)
    found = theirs["sae_lens.auxk"]["loss"] * N_TOKENS / total_variance(residual)
    ids = given["dead"].nonzero().flatten()
    scores = (given["x"] - given["b_dec"]) @ given["w_enc"][ids].T + given["b_enc"][ids]
    best = scores.topk(auxk_size(D_MODEL), dim=1)
    assert (best.values < 0).any()
    for values, loss in [(best.values, found), (best.values.relu(), expected["loss"])]:
        explained = (values[:, :, None] * given["w_dec"][ids[best.indices]]).sum(1)
        torch.testing.assert_close(auxk_loss(residual, explained), loss, rtol=1e-5, atol=1e-5)


def test_sparsify_moves_latents_that_are_off_and_ours_do_not(given, theirs):
    # Where fewer than k latents are on, its TopK fills up with latents that the ReLU holds at 0
    # and its backward sends them a gradient all the same.
    lowered = {**given, "b_enc": given["b_enc"] - LOWERED}
    expected, found = ours(lowered, "topk"), theirs["sparsify.off"]
    acts = ((given["x"] - given["b_dec"]) @ given["w_enc"].T + lowered["b_enc"]).relu()
    assert ((acts > 0).sum(1) < K).any()
    off = (acts == 0).all(0)
    assert off.any()
    assert_equal(found, expected, only=("loss", "w_dec"))
    assert found["b_enc"][off].any()
    assert not expected["b_enc"][off].any()


def test_threshold_of_sae_lens_starts_at_0_and_ours_at_the_first_batch(given, theirs):
    # An average that starts at 0 with rate 0.01 is a hundredth of the value after a step.
    smallest = autoencoder(given, "batch_topk").encode(given["x"]).values.min().detach()
    assert math.isclose(theirs["sae_lens.threshold"]["loss"], 0.01 * smallest, rel_tol=1e-4)
