"""Every format writes one layer's function and reads it back; what can't be held is refused."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from actors.parity import compare
from sae import KronShape, SaeConfig, SparseAutoencoder
from sae.formats import FORMATS, recognise
from sae.formats.description import Description, check_weights, read_description, write_description
from sae.formats.distillation import distilled
from sae.formats.folding import folded, thresholds
from sae.formats.origin import origin
from sae.formats.selecting import as_topk, calibrated

D_MODEL, D_SAE, K = 16, 64, 4
LAYERS = {3: 0.27, 5: 2.5}
KRON = KronShape(h=4, m=4, n=4)
ABOUT = Description(
    model="owner/model",
    revision=None,
    tokenizer="0123",
    layer=3,
    hook_name="blocks.3.hook_resid_post",
    module="gpt_neox.layers.3",
    trunk_module="layers.3",
    context=32,
    prepend_bos=True,
    excluded_tokens=(0, 1),
    corpus="stdlib",
    trial="g0-k4",
    selection="topk",
    k=K,
    prefixes=(),
    l0=3.9,
    config_hash="abcd",
    mlflow_run=None,
)


def autoencoder(encoder="dense", selection="topk", prefixes=(), scaling="layer_scale", seed=0):
    cfg = SaeConfig(
        d_model=D_MODEL,
        d_sae=D_SAE,
        k=K,
        encoder=encoder,
        selection=selection,
        prefixes=prefixes,
        scaling=scaling,
    )
    sae = SparseAutoencoder(cfg, LAYERS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(D_MODEL, generator=generator))
        sae.encoder.b_enc.copy_(0.1 * torch.randn(len(sae.encoder.b_enc), generator=generator))
        if sae.log_thresholds is not None:
            sae.log_thresholds.copy_((0.2 + torch.rand(D_SAE, generator=generator)).log())
    if selection == "batch_topk":
        sae.set_threshold(0.9)
    return sae.eval()


def rows(n=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(n, D_MODEL, generator=generator) + torch.randn(
        D_MODEL, generator=generator
    )


def assert_same(a, b, x, layer=3):
    """Compute both on the same rows; rounding, under a Kronecker encoder's root too, is not a difference."""
    ids, cut = torch.full((len(x),), layer), thresholds(a)
    ours, theirs = a.reconstruct(x, ids), b.reconstruct(x, ids)
    found = compare(
        (ours.latents.dense(), ours.x_hat),
        (theirs.latents.dense(), theirs.x_hat),
        a.cfg.k if cut is None else cut,
        rooted=isinstance(a.cfg.encoder, KronShape),
    )
    assert found.holds, found
    assert found.at_the_edge <= 1
    assert ours.latents.l0().float().mean() > 1


ARCHITECTURES = [
    ("dense", "topk", ()),
    ("dense", "batch_topk", ()),
    ("dense", "batch_topk", (16, 64)),
    ("dense", "jumprelu", ()),
    (KRON, "topk", ()),
    (KRON, "batch_topk", ()),
    (KRON, "jumprelu", ()),
]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    layer=st.sampled_from(sorted(LAYERS)),
    architecture=st.sampled_from(ARCHITECTURES),
    scaling=st.sampled_from(["layer_scale", "token_standardize"]),
)
def test_a_folded_autoencoder_is_that_of_the_layer(seed, layer, architecture, scaling):
    sae = autoencoder(*architecture, scaling=scaling, seed=seed)
    alone = folded(sae, layer)
    assert set(alone.layer_scale.values()) <= {1.0}
    assert_same(sae, alone, rows(seed=seed), layer)


@pytest.mark.parametrize("scaling", ["layer_scale", "token_standardize"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_format_holds_is_read_back_as_the_same_function(
    tmp_path, kind, architecture, scaling
):
    sae = autoencoder(*architecture, scaling=scaling)
    alone, target = folded(sae, 3), FORMATS[kind]
    if target.refusal(alone):
        refuses = {
            "sae_lens": False,
            "safetensors": False,
            "sparsify": architecture[:2] != ("dense", "topk") or scaling != "layer_scale",
            "dictionary_learning": architecture[0] != "dense" or scaling != "layer_scale",
        }
        assert refuses[kind]
        return
    target.write(tmp_path, alone, ABOUT)
    assert recognise(tmp_path) == kind
    assert_same(sae, target.read(tmp_path, 3), rows())


def test_thresholds_are_passed_on_to_the_last_bit(tmp_path):
    alone = folded(autoencoder("dense", "batch_topk"), 3)
    alone.set_threshold(0.1 + 0.2)
    for kind in ("sae_lens", "dictionary_learning", "safetensors"):
        FORMATS[kind].write(tmp_path, alone, ABOUT)
        found = thresholds(FORMATS[kind].read(tmp_path, 3))
        assert found is not None
        assert torch.equal(found, torch.full((D_SAE,), torch.tensor(0.1 + 0.2).item()))


def test_a_layer_without_a_scale_is_refused():
    with pytest.raises(ValueError, match="layer 4 has no scale"):
        folded(autoencoder(), 4)


def test_calibration_hits_the_mean_l0_of_its_rows():
    alone, x = folded(autoencoder("dense", "batch_topk"), 3), rows(500)
    for l0 in (2.0, 7.5):
        latents = calibrated(alone, x, l0).reconstruct(x, torch.full((500,), 3)).latents
        assert float(latents.l0().float().mean()) == pytest.approx(l0, abs=2e-3)
    with pytest.raises(ValueError, match="no threshold to calibrate"):
        calibrated(folded(autoencoder(), 3), x, 4.0)


def test_as_topk_keeps_the_k_largest_of_the_same_latents():
    sae, x = folded(autoencoder("dense", "jumprelu"), 3), rows()
    latents = as_topk(sae, 5).reconstruct(x, torch.full((len(x),), 3)).latents.dense()
    dense = sae.encoder.reference(x, sae.b_dec)
    kept = torch.zeros_like(dense).scatter(1, dense.topk(5).indices, dense.topk(5).values)
    torch.testing.assert_close(latents, kept)


def test_a_distilled_encoder_comes_nearer_to_the_latents_than_its_start():
    sae, x = folded(autoencoder(KRON, "batch_topk"), 3), rows(3000)
    dense, held_out = distilled(sae, x, seed=0), rows(500, seed=2)
    wanted = sae.encoder.reference(held_out, sae.b_dec)
    base, extension = sae.encoder.rows_of(torch.arange(D_SAE))
    start = (held_out - sae.b_dec) @ sae.encoder.w_enc.T + sae.encoder.b_enc
    start = ((start[:, base] + start[:, extension]) / 2).relu()
    found = dense.encoder.reference(held_out, dense.b_dec)
    assert (found - wanted).square().sum() < 0.75 * (start - wanted).square().sum()
    assert torch.equal(dense.w_dec, sae.w_dec)
    ids = torch.full((3000,), 3)
    counts = [s.reconstruct(x, ids).latents.l0().float().mean() for s in (sae, dense)]
    assert counts[0] == pytest.approx(counts[1], abs=0.01)
    with pytest.raises(ValueError, match="dense already"):
        distilled(dense, x, seed=0)


# What the other libraries write themselves, and we never do.


def sae_lens_folder(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "sae_weights.safetensors")
    basis = {"architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32"}
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.7.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps({**basis, "metadata": metadata, **config}))
    return folder


def weights():
    generator = torch.Generator().manual_seed(3)
    return {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "W_dec": 3 * torch.randn(D_SAE, D_MODEL, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
    }


def test_a_relu_autoencoder_that_does_not_subtract_b_dec_and_has_long_decoder_rows(tmp_path):
    w, x = weights(), rows()
    folder = sae_lens_folder(tmp_path, w, apply_b_dec_to_input=False)
    assert origin("sae_lens", folder).layer == 7
    found = FORMATS["sae_lens"].read(folder, 7).reconstruct(x, torch.full((len(x),), 7))
    acts = (x @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(found.latents.dense(), acts, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.x_hat, acts @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-3)


def test_matrices_that_are_stored_the_other_way_round(tmp_path):
    w = weights()
    straight = FORMATS["sae_lens"].read(sae_lens_folder(tmp_path / "a", w), 7)
    turned = sae_lens_folder(tmp_path / "b", {**w, "W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    assert_same(straight, FORMATS["sae_lens"].read(turned, 7), rows(), 7)


def test_a_topk_whose_selection_counts_decoder_norms(tmp_path):
    w, x = weights(), rows()
    folder = sae_lens_folder(
        tmp_path, w, architecture="topk", k=K, rescale_acts_by_decoder_norm=True
    )
    found = FORMATS["sae_lens"].read(folder, 7).reconstruct(x, torch.full((len(x),), 7))
    norms = w["W_dec"].norm(dim=1)
    acts = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    best = acts.topk(K)
    acts = torch.zeros_like(acts).scatter(1, best.indices, best.values.relu())
    torch.testing.assert_close(found.latents.dense(), acts, rtol=1e-4, atol=1e-3)
    wanted = acts @ (w["W_dec"] / norms[:, None]) + w["b_dec"]
    torch.testing.assert_close(found.x_hat, wanted, rtol=1e-4, atol=1e-3)


def test_negative_thresholds_let_no_negative_latent_through(tmp_path):
    w, x = weights(), rows()
    w["threshold"] = torch.linspace(-1, 1, D_SAE)
    folder = sae_lens_folder(tmp_path, w, architecture="jumprelu")
    latents = FORMATS["sae_lens"].read(folder, 7).reconstruct(x, torch.full((len(x),), 7)).latents
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    wanted = pre.relu() * (pre > w["threshold"])
    torch.testing.assert_close(latents.dense(), wanted, rtol=1e-5, atol=1e-4)


# Bad input.


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys):
    FORMATS["dictionary_learning"].write(tmp_path, folded(autoencoder(), 3), ABOUT)
    for content in (pickle.dumps({"W_enc": Evil()}), None):
        if content is None:
            torch.save({"W_enc": Evil()}, tmp_path / "ae.pt")
        else:
            (tmp_path / "ae.pt").write_bytes(content)
        with pytest.raises(ValueError, match="it was refused and nothing of it ran"):
            FORMATS["dictionary_learning"].read(tmp_path, 3)
    assert "ran" not in capsys.readouterr().out


def spoil(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_was_cut_short_is_named(tmp_path, kind):
    target = FORMATS[kind]
    for name in (target.WEIGHTS, target.CONFIG):
        if (kind, name) == ("safetensors", "sae.json"):
            continue  # it is for people; the weights hold what it says
        target.write(tmp_path, folded(autoencoder(), 3), ABOUT)
        spoil(tmp_path, name)
        with pytest.raises(ValueError, match=str(tmp_path / name)):
            target.read(tmp_path, 3)


@pytest.mark.parametrize("kind", ["sae_lens", "sparsify", "dictionary_learning"])
def test_a_configuration_of_another_kind_is_told(tmp_path, kind):
    target = FORMATS[kind]
    target.write(tmp_path, folded(autoencoder(), 3), ABOUT)
    for text in ("[]", "{}", '{"trainer": 3}', '{"architecture": "gated"}', '{"d_in": "x"}'):
        (tmp_path / target.CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r";|:"):
            target.read(tmp_path, 3)


def test_a_strange_tensor_is_refused(tmp_path):
    FORMATS["sae_lens"].write(tmp_path, folded(autoencoder(), 3), ABOUT)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": torch.ones(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="of another architecture"):
        FORMATS["sae_lens"].read(tmp_path, 3)


@pytest.mark.parametrize("name", ["b_enc", "b_dec", "W_dec", "threshold"])
@pytest.mark.parametrize("encoder", ["dense", KRON], ids=str)
def test_weights_of_another_size_or_not_finite_are_refused(tmp_path, name, encoder):
    FORMATS["sae_lens"].write(tmp_path, folded(autoencoder(encoder, "jumprelu"), 3), ABOUT)
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match="again"):
        FORMATS["sae_lens"].read(tmp_path, 3)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, file)
    with pytest.raises(ValueError, match="not finite"):
        FORMATS["sae_lens"].read(tmp_path, 3)


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match=r"holds model\.bin, and no autoencoder"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        recognise(tmp_path / "model.bin")


def test_a_description_survives_and_damage_is_told(tmp_path):
    assert read_description(tmp_path) is None
    (tmp_path / "weights").write_bytes(b"as exported")
    write_description(tmp_path, ABOUT, "weights")
    assert read_description(tmp_path) == ABOUT
    check_weights(tmp_path, "weights")
    (tmp_path / "weights").write_bytes(b"as exportee")
    with pytest.raises(ValueError, match="weights is not the file that was exported"):
        check_weights(tmp_path, "weights")
    (tmp_path / "strata.json").write_text('{"model": "x"}')
    with pytest.raises(ValueError, match="is damaged"):
        read_description(tmp_path)
