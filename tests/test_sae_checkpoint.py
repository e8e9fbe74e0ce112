import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae import (
    Fit,
    FitConfig,
    KronShape,
    SaeConfig,
    SparseAutoencoder,
    load,
    load_fit,
    save,
    save_fit,
)
from sae.integrity import DamagedError
from sae.progressive import evaluate_prefixes

ENCODERS = {
    "dense": "dense",
    "mand": KronShape(h=6, m=2, n=4),
    "relu product": KronShape(h=6, m=2, n=4, activation="relu_product"),
}


def make(**kw):
    cfg = SaeConfig(**{"d_model": 10, "d_sae": 48, "k": 5, **kw})
    sae = SparseAutoencoder(cfg, {0: 1.25, 7: 0.3}, seed=3)
    sae.threshold.fill_(0.5)
    return sae


@pytest.mark.parametrize("scaling", ["layer_scale", "token_standardize"])
@pytest.mark.parametrize("prefixes", [(), (16, 48)], ids=["one", "nested"])
@pytest.mark.parametrize("selection", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_was_trained_and_saved_is_loaded_bit_for_bit(
    encoder, selection, prefixes, scaling, tmp_path
):
    sae = make(encoder=ENCODERS[encoder], selection=selection, prefixes=prefixes, scaling=scaling)
    x, layer = torch.randn(20, 10), torch.tensor([0, 7, 0, 7, 7] * 4)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    Fit(sae, FitConfig(lr=1e-2), n_steps=1).step(x, layer)
    save(tmp_path / "new" / "folder", sae, {"layers": [0, 7]})
    again, extra = load(tmp_path / "new" / "folder")
    assert extra == {"layers": [0, 7]}
    assert again.cfg == sae.cfg
    assert not again.training
    assert all(torch.equal(again.state_dict()[n], t) for n, t in sae.state_dict().items())
    assert not torch.equal(before["w_dec"], again.w_dec)
    ours, theirs = sae.reconstruct(x, layer), again.reconstruct(x, layer)
    assert torch.equal(theirs.x_hat, ours.x_hat)
    assert torch.equal(theirs.latents.dense(), ours.latents.dense())
    sizes, metrics = zip(*evaluate_prefixes(again, x, layer), strict=True)
    assert sizes == (prefixes or (48,))
    assert [m.fvu for m in metrics] == [m.fvu for _, m in evaluate_prefixes(sae, x, layer)]


def test_saving_again_replaces_and_leaves_no_partial_file(tmp_path):
    save(tmp_path, make())
    save(tmp_path, make(k=7), {"second": True})
    assert load(tmp_path)[0].cfg.k == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae.json", "sae.safetensors"]
    assert json.loads((tmp_path / "sae.json").read_text())["config"]["k"] == 7


def test_dtype_survives(tmp_path):
    save(tmp_path, make().bfloat16())
    assert load(tmp_path)[0].w_dec.dtype == torch.bfloat16


def test_folders_without_a_readable_autoencoder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_fit(tmp_path, Fit(make(), FitConfig(), 1))
    path = tmp_path / "sae.safetensors"
    save(tmp_path, make())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        load(tmp_path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="was not written by Strata"):
        load(tmp_path)
    save_file({"w": torch.ones(2)}, path, {"strata-sae": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="version 99; this Strata reads up to 1"):
        load(tmp_path)


def test_who_may_read_the_description_may_read_the_weights(tmp_path):
    save(tmp_path, make(), {})
    modes = [(tmp_path / name).stat().st_mode for name in ("sae.json", "sae.safetensors")]
    assert modes[0] == modes[1]


def test_a_bit_that_has_turned_over_is_found_or_changes_nothing(tmp_path):
    """In the file's head, in its checksums, in weights: 300 bits drawn at random, and many of the header."""
    save_fit(tmp_path, trained(), {"cursor": {"epoch": 0, "step": 3}})
    path = tmp_path / "fit.safetensors"
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    right = resumed(tmp_path)
    places = np.random.default_rng(0).integers(0, len(whole) * 8, 300)
    found = 0
    for bit in (*range(0, head * 8, 11), *places.tolist()):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            state = resumed(tmp_path)
        except ValueError:
            found += 1
            continue
        assert bit < head * 8, "a bit of a tensor"
        assert state == right, bit
    assert found > len(places)


def test_files_from_before_there_were_checksums_are_read(tmp_path):
    save(tmp_path, make(), {"old": 1})
    path = tmp_path / "sae.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["strata-sae"])
    del header["integrity"]
    save_file(load_file(path), path, {"strata-sae": json.dumps(header)})
    again, extra = load(tmp_path)
    assert extra == {"old": 1}
    assert torch.equal(again.w_dec, make().w_dec)


def trained() -> Fit:
    fit = Fit(make(), FitConfig(lr=1e-2), n_steps=4)
    fit.step(torch.randn(20, 10), torch.tensor([0, 7] * 10))
    return fit


def resumed(folder) -> tuple[dict, dict[str, bytes]]:
    fit = Fit(make(), FitConfig(lr=1e-2), n_steps=4)
    extra = load_fit(folder, fit)
    return extra, {name: tensor.numpy().tobytes() for name, tensor in fit.state_dict().items()}
