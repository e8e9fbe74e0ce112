"""What an exported folder computes, read again from its files and worked out as its library's sources have it.

Independent on purpose: it shares no code with the writers nor with the autoencoder, and holds every latent
of every row, so it is for a few rows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Codes = tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_model"]]
"""Latents of every row, and its reconstruction."""


@torch.no_grad()
def by_formula(kind: str, folder: Path, x: Float[Tensor, "rows d_model"]) -> Codes:
    """Latents and reconstructions by the mathematics of a format's library."""
    return _FORMULAS[kind](folder, x)


def _top_k(acts: Tensor, k: int) -> Tensor:
    best = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter_(1, best.indices, best.values)


def _sae_lens(folder: Path, x: Tensor) -> Codes:
    cfg = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    mean, deviation = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(1, keepdim=True)
        deviation = (x - mean).std(1, keepdim=True)
        x = (x - mean) / (deviation + 1e-5)
    x = x - w["b_dec"] * cfg["apply_b_dec_to_input"]
    pre = x @ w["W_enc"] + w["b_enc"]
    if cfg["architecture"] == "topk":
        acts = _top_k(pre, cfg["k"]).relu()
    elif cfg["architecture"] == "jumprelu":
        acts = pre.relu() * (pre > w["threshold"])
    else:
        acts = _kron_latents(pre, cfg)
        acts = _top_k(acts, cfg["k"]) if cfg["k"] else acts * (acts > w["threshold"])
    return acts, (acts @ w["W_dec"] + w["b_dec"]) * deviation + mean


def _kron_latents(pre: Tensor, shape: dict[str, Any]) -> Tensor:
    h, m, n = shape["h"], shape["m"], shape["n"]
    u = pre[:, : h * m].reshape(-1, h, m).relu()
    v = pre[:, h * m :].reshape(-1, h, n).relu()
    product = torch.einsum("thi,thj->thij", u, v).flatten(1)
    return product.sqrt() if shape["activation"] == "mand" else product


def _sparsify(folder: Path, x: Tensor) -> Codes:
    cfg = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae.safetensors")
    pre = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    acts = _top_k(pre, cfg["k"])
    return acts, acts @ w["W_dec"] + w["b_dec"]


def _dictionary_learning(folder: Path, x: Tensor) -> Codes:
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    w = torch.load(folder / "ae.pt", weights_only=True)
    if kind == "JumpReluAutoEncoder":
        pre = x @ w["W_enc"] + w["b_enc"]
        acts = (pre * (pre > w["threshold"])).relu()
        return acts, acts @ w["W_dec"] + w["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        acts = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        acts = acts * (acts > w["threshold"])
        return acts, acts @ w["W_dec"] + w["b_dec"]
    acts = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    acts = acts * (acts > w["threshold"]) if kind == "BatchTopKSAE" else _top_k(acts, int(w["k"]))
    return acts, acts @ w["decoder.weight"].T + w["b_dec"]


def _strata(folder: Path, x: Tensor) -> Codes:
    with safe_open(folder / "sae.safetensors", framework="pt") as file:
        cfg = json.loads(file.metadata()["strata-sae"])["config"]
    w = load_file(folder / "sae.safetensors")
    mean, unit = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if cfg["scaling"] == "token_standardize":
        mean, unit = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        x = (x - mean) / unit
    else:
        unit = unit / w["scaling.factors"]
        x = x / unit
    pre = (x - w["b_dec"]) @ w["encoder.w_enc"].T + w["encoder.b_enc"]
    acts = pre.relu() if cfg["encoder"] == "dense" else _kron_latents(pre, cfg["encoder"])
    if cfg["selection"] == "jumprelu":
        acts = acts * (acts > w["log_thresholds"].exp())
    elif bool((w["threshold"] >= 0).all()):
        acts = acts * (acts > w["threshold"])
    else:
        acts = _top_k(acts, cfg["k"])
    return acts, (acts @ w["w_dec"] + w["b_dec"]) * unit + mean


_FORMULAS: dict[str, Callable[[Path, Tensor], Codes]] = {
    "sae_lens": _sae_lens,
    "sparsify": _sparsify,
    "dictionary_learning": _dictionary_learning,
    "safetensors": _strata,
}
