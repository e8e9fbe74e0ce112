"""Runs in the peers' environment: their losses and gradients on given weights.

`python -m benchmarks.peer_values IN OUT`: IN holds x, w_enc, w_dec (latents by d_model), b_enc, b_dec,
dead, k and prefixes; OUT gets, per case, the loss and the gradients under our names and shapes.
"""
# pyright: reportMissingImports=false

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Case = tuple[str, Tensor, dict[str, Tensor]]
_DEAD = 10_000_000


def _grads(loss: Tensor, parameters: dict[str, tuple[Tensor, bool]]) -> dict[str, Tensor]:
    """Gradients by our names; True marks a parameter that stands transposed there."""
    tensors = [tensor for tensor, _ in parameters.values()]
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return {
        name: torch.zeros_like(tensor.T if turned else tensor)
        if grad is None
        else (grad.T if turned else grad).contiguous()
        for (name, (tensor, turned)), grad in zip(parameters.items(), grads, strict=True)
    }


def _load(module: torch.nn.Module, parameters: dict[str, tuple[Tensor, bool]], given: dict) -> None:
    with torch.no_grad():
        for name, (tensor, turned) in parameters.items():
            tensor.copy_(given[name].T if turned else given[name])


def sae_lens(given: dict[str, Tensor]) -> Iterator[Case]:
    """TopK, BatchTopK, Matryoshka and AuxK of SAELens."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    d_sae, d_model = given["w_enc"].shape
    k, widths = int(given["k"]), given["prefixes"].tolist()
    sizes = {"d_in": d_model, "d_sae": d_sae, "k": k}
    saes = {
        "topk": TopKTrainingSAE(TopKTrainingSAEConfig(**sizes)),
        "batch_topk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes)),
        "matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=widths)
        ),
    }
    for name, sae in saes.items():
        parameters = {
            "w_enc": (sae.W_enc, True),
            "b_enc": (sae.b_enc, False),
            "w_dec": (sae.W_dec, False),
            "b_dec": (sae.b_dec, False),
        }
        _load(sae, parameters, given)

        def run(dead: Tensor | None, sae: Any = sae) -> Any:
            return sae.training_forward_pass(
                TrainStepInput(
                    sae_in=given["x"],
                    coefficients={},
                    dead_neuron_mask=dead,
                    n_training_steps=0,
                    is_logging_step=False,
                )
            )

        loss = run(None).loss
        yield name, loss, _grads(loss, parameters)
        if name == "topk":
            aux = run(given["dead"].bool()).losses["auxiliary_reconstruction_loss"]
            yield "auxk", aux, _grads(aux, parameters)
        if name == "batch_topk":
            yield "threshold", sae.topk_threshold.float(), {}


def sparsify(given: dict[str, Tensor]) -> Iterator[Case]:
    """TopK and AuxK of sparsify."""
    from sparsify import SparseCoder, SparseCoderConfig

    d_sae, d_model = given["w_enc"].shape
    coder = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=int(given["k"])))
    parameters = {
        "w_enc": (coder.encoder.weight, False),
        "b_enc": (coder.encoder.bias, False),
        "w_dec": (coder.W_dec, False),
        "b_dec": (coder.b_dec, False),
    }
    _load(coder, parameters, given)
    loss = coder(given["x"]).fvu
    yield "topk", loss, _grads(loss, parameters)
    aux = coder(given["x"], dead_mask=given["dead"].bool()).auxk_loss
    yield "auxk", aux, _grads(aux, parameters)
    with torch.no_grad():
        coder.encoder.bias.sub_(given["lowered"])
    loss = coder(given["x"]).fvu
    yield "off", loss, _grads(loss, parameters)


def dictionary_learning(given: dict[str, Tensor]) -> Iterator[Case]:
    """TopK, BatchTopK, Matryoshka and AuxK of dictionary_learning."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    d_sae, d_model = given["w_enc"].shape
    common = {
        "steps": 10_000,
        "activation_dim": d_model,
        "dict_size": d_sae,
        "k": int(given["k"]),
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
    }
    sizes = given["prefixes"].diff(prepend=torch.zeros(1, dtype=torch.long))
    fractions = (sizes / d_sae).tolist()
    makers: dict[str, Callable] = {
        "topk": lambda: TopKTrainer(**common),
        "batch_topk": lambda: BatchTopKTrainer(**common),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainer(**common, group_fractions=fractions),
    }
    for name, make in makers.items():
        trainer = make()
        ae = trainer.ae
        parameters = (
            {
                "w_enc": (ae.W_enc, True),
                "b_enc": (ae.b_enc, False),
                "w_dec": (ae.W_dec, False),
                "b_dec": (ae.b_dec, False),
            }
            if name == "matryoshka"
            else {
                "w_enc": (ae.encoder.weight, False),
                "b_enc": (ae.encoder.bias, False),
                "w_dec": (ae.decoder.weight, True),
                "b_dec": (ae.b_dec, False),
            }
        )
        _load(ae, parameters, given)
        loss = trainer.loss(given["x"], step=0)
        yield name, loss, _grads(loss, parameters)
        if name == "topk":
            trainer.num_tokens_since_fired[given["dead"].bool()] = _DEAD
            f, _, _, acts = ae.encode(given["x"], return_topk=True, use_threshold=False)
            error = (given["x"] - ae.decode(f)).detach()
            aux = trainer.get_auxiliary_loss(error, acts)
            yield "auxk", aux, _grads(aux, parameters)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = load_file(sys.argv[1])
    out = {}
    for peer in (sae_lens, sparsify, dictionary_learning):
        for case, loss, grads in peer(given):
            out[f"{peer.__name__}.{case}.loss"] = loss.detach().reshape(())
            out.update({f"{peer.__name__}.{case}.{name}": grad for name, grad in grads.items()})
    save_file(out, sys.argv[2])
