"""dictionary_learning 0.1: `config.json` and `ae.pt`, as `utils.load_dictionary` takes them.

What it holds, by the class that the configuration names: `AutoEncoderTopK`; `BatchTopKSAE` and
`MatryoshkaBatchTopKSAE`, which keep latents strictly above one threshold; `JumpReluAutoEncoder`, with a
threshold for each, which does not subtract b_dec first.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape
from sae.formats.affine import affine, oriented, read_config, read_tensors, size, take
from sae.formats.description import Description
from sae.formats.folding import thresholds

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_ARRAYS = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*_LINEAR, "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_PLAIN, "k", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": (*_PLAIN, "threshold"),
}


def refusal(sae: SparseAutoencoder) -> str | None:
    """Why the format can't hold an autoencoder; None if it can."""
    if isinstance(sae.cfg.encoder, KronShape):
        return (
            "a Kronecker encoder is no affine one; use --to sae_lens or safetensors, or give --distil to fit "
            "an affine one to it"
        )
    if sae.cfg.scaling == "token_standardize":
        return (
            "it can't standardize tokens; use --to sae_lens or safetensors, or train with scaling: "
            "layer_scale"
        )
    return None


def dict_class(sae: SparseAutoencoder) -> str:
    """The class of the library that an autoencoder becomes."""
    bounds = thresholds(sae)
    if bounds is None:
        return "AutoEncoderTopK"
    if not bool((bounds == bounds[0]).all()):
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if sae.cfg.prefixes else "BatchTopKSAE"


@torch.no_grad()
def write(folder: Path, sae: SparseAutoencoder, about: Description) -> None:
    """Write an autoencoder of one layer, as `folded` gives it."""
    name, bounds = dict_class(sae), thresholds(sae)
    tensors: dict[str, Tensor]
    w_enc, b_enc, w_dec, b_dec = sae.encoder.w_enc, sae.encoder.b_enc, sae.w_dec, sae.b_dec
    one = -1.0 if bounds is None else float(bounds[0])  # -1: never set, as the library has it
    selection = {
        "k": torch.tensor(sae.cfg.k, dtype=torch.int32),
        "threshold": torch.tensor(one, dtype=torch.float32),
    }
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        tensors = dict(zip((*_LINEAR, "b_dec"), (w_enc, b_enc, w_dec.T, b_dec), strict=True))
        tensors |= selection
    elif name == "MatryoshkaBatchTopKSAE":
        tensors = dict(zip(_PLAIN, (w_enc.T, b_enc, w_dec, b_dec), strict=True)) | selection
        tensors["group_sizes"] = torch.tensor((0, *sae.cfg.prefixes)).diff()
    else:
        b_enc = b_enc.double() - w_enc.double() @ b_dec.double()
        tensors = dict(zip(_PLAIN, (w_enc.T, b_enc.float(), w_dec, b_dec), strict=True))
        assert bounds is not None
        tensors["threshold"] = bounds
    config = {
        "trainer": {
            "trainer_class": "strata",
            "dict_class": name,
            "activation_dim": sae.cfg.d_model,
            "dict_size": sae.cfg.d_sae,
            "k": sae.cfg.k,
            "layer": about.layer,
            "lm_name": about.model,
            "submodule_name": about.module,
        },
        "buffer": {"d_submodule": sae.cfg.d_model, "io": "out", "ctx_len": about.context},
    }
    # A copy each: a view would bring the whole memory it looks at along.
    torch.save(
        {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()},
        folder / WEIGHTS,
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, layer: int) -> SparseAutoencoder:
    """The autoencoder in a folder, as one for `layer`.

    Raises:
        ValueError: If the files are damaged, or of a class that can't be read here.
    """
    file = folder / CONFIG
    trainer: Any = read_config(file).get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if name not in _ARRAYS:
        raise ValueError(
            f"{file} names the class {name!r}; those of dictionary_learning that are read here are "
            f"{', '.join(_ARRAYS)}: give one of these"
        )
    tensors = read_tensors(folder / WEIGHTS)
    found = dict(zip(_ARRAYS[name], take(tensors, _ARRAYS[name], folder / WEIGHTS), strict=True))
    is_linear = "encoder.weight" in found
    w_enc = found["encoder.weight"] if is_linear else found["W_enc"].T
    w_dec = found["decoder.weight"].T if is_linear else found["W_dec"]
    d_sae = len(found["encoder.bias" if is_linear else "b_enc"])
    b_dec = next(found[key] for key in ("b_dec", "bias", "decoder.bias") if key in found)
    threshold = None if name == "AutoEncoderTopK" else found.get("threshold", torch.zeros(()))
    _check_set(name, threshold, file)
    groups = found.get("group_sizes")
    return affine(
        w_enc=oriented("the encoder", w_enc, d_sae, len(b_dec)),
        b_enc=found["encoder.bias" if is_linear else "b_enc"],
        w_dec=oriented("the decoder", w_dec, d_sae, len(b_dec)),
        b_dec=b_dec,
        layer=layer,
        k=size(trainer, "k", file) if threshold is None else None,
        thresholds=threshold,
        subtracts_b_dec=name not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
        prefixes=() if groups is None else tuple(groups.cumsum(0).int().tolist()),
    )


def _check_set(name: str, threshold: Tensor | None, file: Path) -> None:
    if threshold is not None and threshold.ndim == 0 and float(threshold) < 0:
        raise ValueError(
            f"{file} is a {name} whose threshold is {float(threshold)}, so it was never set; it is learnt "
            "after `threshold_start_step` steps of training: train it longer"
        )
