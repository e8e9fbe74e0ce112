"""Runs in the peers' environment: their measures of one autoencoder on given tokens and activations.

`python -m benchmarks.peer_metrics MODEL IN OUT`: MODEL is a folder saved by transformers, of an
architecture that TransformerLens knows; IN holds ids (sequences, context), x (rows, d_model), w_enc and
w_dec (latents, d_model), b_enc, b_dec, threshold, k, layer and special (token ids). OUT is JSON: by peer
and case the figures as the peer names them.
"""
# pyright: reportMissingImports=false

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Figures = dict[str, float]


def sae_lens(model: str, given: dict[str, Tensor]) -> dict[str, Figures]:
    """`run_evals` as a whole, over all tokens, without the special ones, and in two batches."""
    from datasets import Dataset
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer

    hooked = HookedTransformer.from_pretrained_no_processing(model, device="cpu")
    d_sae, d_model = given["w_enc"].shape
    n_sequences, context = given["ids"].shape
    metadata = SAEMetadata(
        hook_name=f"blocks.{int(given['layer'])}.hook_resid_post",
        hook_head_index=None,
        prepend_bos=False,
        context_size=context,
    )
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=d_model, d_sae=d_sae, apply_b_dec_to_input=True, metadata=metadata)
    )
    with torch.no_grad():
        sae.W_enc.copy_(given["w_enc"].T)
        sae.b_enc.copy_(given["b_enc"])
        sae.W_dec.copy_(given["w_dec"])
        sae.b_dec.copy_(given["b_dec"])
        sae.threshold.copy_(given["threshold"].expand(d_sae))

    def evaluated(n_batches: int, special: list[int]) -> Figures:
        store = ActivationsStore.from_sae(
            hooked,
            sae,
            Dataset.from_dict({"tokens": given["ids"].tolist()}),
            streaming=False,
            store_batch_size_prompts=n_sequences // n_batches,
            total_tokens=n_sequences,
        )
        settings = get_eval_everything_config(n_sequences // n_batches, n_batches, n_batches)
        found, _ = run_evals(
            *(sae, store, hooked, ActivationScaler(), settings),
            exclude_special_tokens=special or False,
        )
        return {name: float(value) for part in found.values() for name, value in part.items()}

    return {
        "all": evaluated(1, []),
        "without_special": evaluated(1, given["special"].tolist()),
        "two_batches": evaluated(2, []),
    }


def sparsify(given: dict[str, Tensor]) -> dict[str, Figures]:
    """The FVU that its coder returns, over all rows and as a mean over two halves."""
    from sparsify import SparseCoder, SparseCoderConfig

    d_sae, d_model = given["w_enc"].shape
    coder = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=int(given["k"])))
    assert coder.W_dec is not None
    with torch.no_grad():
        coder.encoder.weight.copy_(given["w_enc"])
        coder.encoder.bias.copy_(given["b_enc"])
        coder.W_dec.copy_(given["w_dec"])
        coder.b_dec.copy_(given["b_dec"])
        halves = [float(coder(half).fvu) for half in given["x"].chunk(2)]
        return {
            "all": {"fvu": float(coder(given["x"]).fvu)},
            "two_batches": {"fvu": sum(halves) / 2},
        }


def dictionary_learning(given: dict[str, Tensor]) -> dict[str, Figures]:
    """What its `evaluate` finds of activations; losses it asks nnsight for."""
    from dictionary_learning.evaluation import evaluate
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    d_sae, d_model = given["w_enc"].shape
    sae = BatchTopKSAE(d_model, d_sae, int(given["k"]))
    with torch.no_grad():
        sae.encoder.weight.copy_(given["w_enc"])
        sae.encoder.bias.copy_(given["b_enc"])
        sae.decoder.weight.copy_(given["w_dec"].T)
        sae.b_dec.copy_(given["b_dec"])
        sae.threshold.copy_(given["threshold"])
    halves: Any = cycle(given["x"].chunk(2))
    return {
        "all": dict(evaluate(sae, cycle([given["x"]]))),
        "two_batches": dict(evaluate(sae, halves, n_batches=2)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = load_file(sys.argv[2])
    figures = {
        "sae_lens": sae_lens(sys.argv[1], inputs),
        "sparsify": sparsify(inputs),
        "dictionary_learning": dictionary_learning(inputs),
    }
    Path(sys.argv[3]).write_text(json.dumps(figures, indent=1))
