"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, as `SAE.load_from_disk` takes them.

What it holds: pre = (x - b_dec) @ W_enc + b_enc; `topk` keeps the k largest and then takes the ReLU,
`jumprelu` keeps those strictly above `threshold` and 0. The Kronecker encoder is an architecture of our
own, which `kronsae.py` beside the weights makes known to SAELens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import tensor_file
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape, SaeConfig
from sae.formats.affine import affine, oriented, read_config, read_tensors, size, sized, take
from sae.formats.description import Description
from sae.formats.folding import thresholds

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PLUGIN = Path(__file__).parent / "plugin" / "kronsae.py"
VERSION = "6.54.12"
"""Whose `load_from_disk` the files are for. Without one, SAELens takes them for those of version 5."""

_ARRAYS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
    "matryoshka_batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
    "kronsae": ("W_enc", "b_enc", "W_dec", "b_dec"),
}


def refusal(sae: SparseAutoencoder) -> str | None:
    """Why the format can't hold an autoencoder; None if it can."""
    if sae.cfg.scaling == "token_standardize" and sae.cfg.d_model < 2:
        return "its layer_norm has no deviation of a single number; use d_model of at least 2"
    return None


def write(folder: Path, sae: SparseAutoencoder, about: Description) -> None:
    """Write an autoencoder of one layer, as `folded` gives it."""
    bounds = thresholds(sae)
    tensors = {
        "W_enc": sae.encoder.w_enc.T,
        "b_enc": sae.encoder.b_enc,
        "W_dec": sae.w_dec,
        "b_dec": sae.b_dec,
        **({} if bounds is None else {"threshold": bounds}),
    }
    own: dict[str, Any] = {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    shape = sae.cfg.encoder
    if isinstance(shape, KronShape):
        own = {**_kron_fields(shape), "k": sae.cfg.k if bounds is None else 0}
        tensors.setdefault("threshold", torch.zeros(sae.cfg.d_sae))
        shutil.copy(PLUGIN, folder / PLUGIN.name)
    architecture = "kronsae" if isinstance(shape, KronShape) else "topk"
    if architecture == "topk" and bounds is not None:
        architecture, own = "jumprelu", {}
    config = {
        "architecture": architecture,
        "d_in": sae.cfg.d_model,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if sae.cfg.scaling == "token_standardize" else "none",
        "reshape_activations": "none",
        **own,
        "metadata": _metadata(about),
    }
    contiguous = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    tensor_file.save(contiguous, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _kron_fields(shape: KronShape) -> dict[str, Any]:
    return {"h": shape.h, "m": shape.m, "n": shape.n, "activation": shape.activation}


def _metadata(about: Description) -> dict[str, Any]:
    """What SAELens reads to find the activations again (`ActivationsStore.from_sae`)."""
    in_transformer_lens = about.hook_name != about.module
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": about.model,
        "model_class_name": "HookedTransformer" if in_transformer_lens else "AutoModelForCausalLM",
        "hook_name": about.hook_name,
        "hf_hook_name": about.module,
        "hook_head_index": None,
        "context_size": about.context,
        "prepend_bos": about.prepend_bos,
        "seqpos_slice": [None],
        "exclude_special_tokens": list(about.excluded_tokens) or False,
        "dataset_path": about.corpus,
        "model_from_pretrained_kwargs": {},
        "training_architecture": about.selection,
        "training_architecture_details": {"k": about.k, "prefixes": list(about.prefixes)},
        "l0": about.l0,
    }


def read(folder: Path, layer: int) -> SparseAutoencoder:
    """The autoencoder in a folder, as one for `layer`.

    Also reads what SAELens itself writes: ReLU autoencoders and the checkpoints of a training.

    Raises:
        ValueError: If the files are damaged, or of an architecture that is no affine encoder and
            decoder with a threshold or TopK.
    """
    file = folder / CONFIG
    config = read_config(file)
    architecture = config.get("architecture", "standard")
    if architecture not in _ARRAYS:
        raise ValueError(
            f"{file} is of SAELens's architecture {architecture!r}; those read here are "
            f"{', '.join(_ARRAYS)}: export one of these"
        )
    _check_function(config, file)
    tensors = read_tensors(folder / WEIGHTS)
    needed = _ARRAYS[architecture]
    if architecture == "kronsae":
        needed = (*needed, "threshold")
    w_enc, b_enc, w_dec, b_dec, *bounds = take(tensors, needed, folder / WEIGHTS)
    d_model, d_sae = size(config, "d_in", file), size(config, "d_sae", file)
    if architecture == "kronsae":
        return _read_kron(config, file, layer, (w_enc, b_enc, w_dec, b_dec, bounds[0]))
    w_enc, w_dec = (
        oriented("W_enc", w_enc, d_model, d_sae).T,
        oriented("W_dec", w_dec, d_sae, d_model),
    )
    if config.get("rescale_acts_by_decoder_norm", False):
        # Its selection and its code are in units of the decoder rows' norms.
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms[:, None], b_enc * norms, w_dec / norms[:, None]
    k = size(config, "k", file) if architecture == "topk" else None
    threshold = None
    if k is None:
        threshold = bounds[0] if bounds else torch.zeros(())
        _check_set(architecture, threshold, file)
    prefixes = tuple(config.get("matryoshka_widths") or ())
    return affine(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        layer=layer,
        k=k,
        thresholds=threshold,
        subtracts_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        standardize=config.get("normalize_activations") == "layer_norm",
        prefixes=prefixes,
    )


def _check_function(config: dict[str, Any], file: Path) -> None:
    """Refuse settings that change the function in a way that can't be said here."""
    allowed = {
        "normalize_activations": ("none", "layer_norm", None),
        "reshape_activations": ("none", None),
        "activation_fn": ("relu", None),
        "activation_fn_str": ("relu", None),
        "finetuning_scaling_factor": (False, None),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise ValueError(
                f"{file} has {key}={config[key]!r}; here it may be {' or '.join(map(repr, values[:-1]))}: "
                "fold what it does into the weights with SAELens and save it again"
            )


def _check_set(architecture: str, threshold: Tensor, file: Path) -> None:
    if "batchtopk" in architecture and not bool((threshold > 0).all()):
        raise ValueError(
            f"{file} is a BatchTopK whose topk_threshold is {threshold.tolist()}, so it was never set; it is "
            "learnt in training: train it, or save it for inference with SAELens"
        )


def _read_kron(
    config: dict[str, Any], file: Path, layer: int, tensors: tuple[Tensor, ...]
) -> SparseAutoencoder:
    w_enc, b_enc, w_dec, b_dec, bounds = tensors
    shape = KronShape(
        h=size(config, "h", file),
        m=size(config, "m", file),
        n=size(config, "n", file),
        activation=config.get("activation", "mand"),
    )
    d_model, k = size(config, "d_in", file), config.get("k", 0)
    standardized = config.get("normalize_activations") == "layer_norm"
    cfg = SaeConfig(
        d_model=d_model,
        d_sae=size(config, "d_sae", file),
        k=k or 1,
        encoder=shape,
        selection="topk" if k else "batch_topk",
        scaling="token_standardize" if standardized else "layer_scale",
    )
    sae = SparseAutoencoder(cfg, {layer: 1.0}, seed=None)
    with torch.no_grad():
        w_enc = oriented("W_enc", w_enc, d_model, shape.n_rows).T
        sae.encoder.w_enc.copy_(sized("W_enc", w_enc, shape.n_rows, d_model))
        sae.encoder.b_enc.copy_(sized("b_enc", b_enc, shape.n_rows))
        w_dec = oriented("W_dec", w_dec, cfg.d_sae, d_model)
        sae.w_dec.copy_(sized("W_dec", w_dec, cfg.d_sae, d_model))
        sae.b_dec.copy_(sized("b_dec", b_dec, d_model))
    if not k:
        sae.set_threshold(sized("threshold", bounds, cfg.d_sae))
    return sae.eval()
