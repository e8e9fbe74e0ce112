"""sparsify 1.3: `cfg.json` and `sae.safetensors`, as `SparseCoder.load_from_disk` takes them.

What it holds: TopK of ReLU(encoder(x - b_dec)), and nothing else. A threshold can't be written.
"""

import json
from pathlib import Path

from sae import tensor_file
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape
from sae.formats.affine import affine, oriented, read_config, read_tensors, size, take
from sae.formats.description import Description
from sae.formats.folding import thresholds

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_ARRAYS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def refusal(sae: SparseAutoencoder) -> str | None:
    """Why the format can't hold an autoencoder; None if it can."""
    if isinstance(sae.cfg.encoder, KronShape):
        topk = "" if thresholds(sae) is None else " and --as-topk, as it selects by a threshold"
        return (
            "a Kronecker encoder is no affine one, and the format holds affine TopK alone; use --to sae_lens "
            f"or safetensors, or give --distil to fit an affine one to it{topk}"
        )
    if sae.cfg.scaling == "token_standardize":
        return (
            "it can't standardize tokens; use --to sae_lens or safetensors, or train with scaling: "
            "layer_scale"
        )
    if thresholds(sae) is not None:
        return (
            f"it holds TopK alone, and {sae.cfg.selection} selects by a threshold; use --to sae_lens, "
            "dictionary_learning or safetensors, or give --as-topk to write TopK with k = its mean L0, "
            "which is another function"
        )
    return None


def write(folder: Path, sae: SparseAutoencoder, about: Description) -> None:
    """Write a TopK autoencoder of one layer, as `folded` gives it."""
    tensors = {
        "encoder.weight": sae.encoder.w_enc,
        "encoder.bias": sae.encoder.b_enc,
        "W_dec": sae.w_dec,
        "b_dec": sae.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.cfg.d_sae // sae.cfg.d_model),
        "normalize_decoder": True,
        "num_latents": sae.cfg.d_sae,
        "k": sae.cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.cfg.d_model,
    }
    contiguous = {n: t.detach().float().contiguous() for n, t in tensors.items()}
    tensor_file.save(contiguous, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, layer: int) -> SparseAutoencoder:
    """The autoencoder in a folder, as one for `layer`.

    Raises:
        ValueError: If the files are damaged, or it is a transcoder or selects otherwise.
    """
    file = folder / CONFIG
    config = read_config(file)
    for key, value in (("activation", "topk"), ("transcode", False), ("skip_connection", False)):
        if config.get(key, value) != value:
            raise ValueError(
                f"{file} has {key}={config[key]!r}; an autoencoder of sparsify that can be read here has "
                f"{value!r}: give one of those"
            )
    tensors = read_tensors(folder / WEIGHTS)
    w_enc, b_enc, w_dec, b_dec = take(tensors, _ARRAYS, folder / WEIGHTS)
    d_model = size(config, "d_in", file)
    d_sae = config.get("num_latents") or d_model * size(config, "expansion_factor", file)
    return affine(
        w_enc=oriented("encoder.weight", w_enc, d_sae, d_model),
        b_enc=b_enc,
        w_dec=oriented("W_dec", w_dec, d_sae, d_model),
        b_dec=b_dec,
        layer=layer,
        k=size(config, "k", file),
    )
