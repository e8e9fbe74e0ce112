import json

import pytest
import torch
from safetensors.torch import save_file

from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder, load, load_fit, save

VARIANTS = [
    {},
    {"encoder": KronShape(h=6, m=2, n=4), "prefixes": (16, 48)},
    {"selection": "batch_topk", "scaling": "token_standardize"},
]


def make(**kw):
    cfg = SaeConfig(**{"d_model": 10, "d_sae": 48, "k": 5, **kw})
    sae = SparseAutoencoder(cfg, {0: 1.25, 7: 0.3}, seed=3)
    sae.threshold.fill_(0.5)
    return sae


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded_bit_for_bit(variant, tmp_path):
    sae = make(**variant)
    save(tmp_path / "new" / "folder", sae, {"layers": [0, 7]})
    again, extra = load(tmp_path / "new" / "folder")
    assert extra == {"layers": [0, 7]}
    assert again.cfg == sae.cfg
    assert not again.training
    assert all(torch.equal(again.state_dict()[n], t) for n, t in sae.state_dict().items())
    x, layer = torch.randn(5, 10), torch.tensor([0, 7, 0, 7, 7])
    assert torch.equal(again.reconstruct(x, layer).x_hat, sae.reconstruct(x, layer).x_hat)


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
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(tmp_path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="was not written by Strata"):
        load(tmp_path)
    save_file({"w": torch.ones(2)}, path, {"strata-sae": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="version 99; this Strata reads up to 1"):
        load(tmp_path)
