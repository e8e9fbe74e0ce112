"""Runs in the peers' environment: their measures of one autoencoder on given tokens and activations.

`python -m benchmarks.peer_metrics MODEL IN OUT`: MODEL is a GPT-NeoX in a folder saved by transformers; IN holds ids (sequences, context), x (rows, d_model), w_enc and
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


def hooked(model: str) -> Any:
    """The model as TransformerLens has it, which loads by name only models that it knows."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    cfg = theirs.config
    d_head = cfg.hidden_size // cfg.num_attention_heads
    ours = HookedTransformerConfig(
        d_model=cfg.hidden_size,
        d_head=d_head,
        n_heads=cfg.num_attention_heads,
        d_mlp=cfg.intermediate_size,
        n_layers=cfg.num_hidden_layers,
        n_ctx=cfg.max_position_embeddings,
        eps=cfg.layer_norm_eps,
        d_vocab=cfg.vocab_size,
        act_fn=cfg.hidden_act,
        parallel_attn_mlp=cfg.use_parallel_residual,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=round(cfg.rope_parameters["partial_rotary_factor"] * d_head),
        normalization_type="LN",
        default_prepend_bos=False,
        device="cpu",
    )
    found = HookedTransformer(ours)
    found.load_and_process_state_dict(
        convert_neox_weights(theirs, ours),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return found


def sae_lens(model: str, given: dict[str, Tensor]) -> dict[str, Figures]:
    """`run_evals` as it is, over all tokens, without the special ones, and in two batches."""
    from datasets import Dataset
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    runs = hooked(model)
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
            runs,
            sae,
            Dataset.from_dict({"tokens": given["ids"].tolist()}),
            streaming=False,
            store_batch_size_prompts=n_sequences // n_batches,
            total_tokens=n_sequences,
        )
        settings = get_eval_everything_config(n_sequences // n_batches, n_batches, n_batches)
        found, _ = run_evals(
            *(sae, store, runs, ActivationScaler(), settings),
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
