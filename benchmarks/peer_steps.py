"""The peers' side of the training benchmark: a step as each library's own trainer does it.

Runs in the peers' environment. Forward, loss, backward, clipping, optimizer, constraint and the
accounting of dead latents; no logging.
"""
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import Held, Step, bytes_held, serve


def sae_lens(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """SAELens: `SAETrainer._train_step`, which clips to 1 and has no decoder constraint.

    (Its selection is scaled by the decoder's norms instead.)
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = {"d_in": first.shape[1], "d_sae": arguments["d_sae"], "k": arguments["k"]}
    if arguments["selection"] == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
    cfg = SAETrainerConfig(
        total_training_samples=10_000 * len(first),
        train_batch_size_samples=len(first),
        lr_end=3e-5,
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))

    def step(x: Tensor) -> float:
        loss = trainer._train_step(sae, x).loss.item()
        trainer.n_training_steps += 1
        return loss

    return step, lambda: bytes_held(sae, trainer.optimizer)


def sparsify(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """sparsify: the lines of `Trainer.fit` around its coder, with its Adam; it doesn't clip."""
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(num_latents=arguments["d_sae"], k=arguments["k"])
    coder = SparseCoder(first.shape[1], cfg)
    coder.b_dec.data = first.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=2e-4 / (arguments["d_sae"] / 2**14) ** 0.5)
    since = torch.zeros(arguments["d_sae"], dtype=torch.long)

    def step(x: Tensor) -> float:
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=None, total_variance=variance)
        fired = torch.zeros(len(since), dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        since.add_(len(x))
        since[fired] = 0
        return out.fvu.item()

    return step, lambda: bytes_held(coder, adam)


def dictionary_learning(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """dictionary_learning: `Trainer.update`, past its first step's geometric median."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = TopKTrainer if arguments["selection"] == "topk" else BatchTopKTrainer
    trainer = kind(
        steps=10_000,
        activation_dim=first.shape[1],
        dict_size=arguments["d_sae"],
        k=arguments["k"],
        layer=0,
        lm_name="none",
        device="cpu",
    )
    trainer.ae.b_dec.data = first.mean(0)
    done = 0

    def step(x: Tensor) -> float:
        nonlocal done
        done += 1
        return trainer.update(done, x)

    return step, lambda: bytes_held(trainer.ae, trainer.optimizer)


PEERS = {
    "sae-lens": sae_lens,
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}


def make(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """The peer that `peer` names."""
    return PEERS[arguments["peer"]](arguments, first)


def smallest(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same kind with 128 latents."""
    return {**arguments, "d_sae": 128, "k": 2}


if __name__ == "__main__":
    serve(make, list(PEERS), smallest)
