"""One autoencoder that several processes share: each holds a part of its latents.

    torchrun --standalone --nproc-per-node 2 -m examples.parallel OUT

Trains on made-up activations, with gloo where there is no GPU and NCCL where there are, and writes an ordinary
autoencoder, which `sae.load` reads in one process. docs/dictionary_parallel.md says how it works.
"""

import os
import sys

import torch
import torch.distributed as dist

from sae import Fit, FitConfig, SaeConfig, SparseAutoencoder, save
from sae.parallel import ParallelRanks

N_STEPS, D_MODEL = 60, 64


def main(folder: str) -> None:
    """Train and save; every rank runs this."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # All share the latents. Of four, ParallelRanks(2) would make two pairs that share the batch.
    ranks = ParallelRanks()

    cfg = SaeConfig(d_model=D_MODEL, d_sae=512, k=8, selection="batch_topk")
    sae = SparseAutoencoder(cfg, {0: 1.0}, ranks=ranks).to(ranks.device)
    fit = Fit(sae, FitConfig(lr=3e-3), n_steps=N_STEPS)

    # The same seed everywhere, as ranks that share latents see the same tokens.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(128, D_MODEL, generator=generator)
    layer = torch.zeros(512, dtype=torch.int64, device=ranks.device)
    codes = torch.rand(N_STEPS, 512, 128, generator=generator)
    batches = ((codes * (codes > 0.95)) @ directions).to(ranks.device)
    fit.initialise(batches[0], layer)
    reports = [fit.step(x, layer) for x in batches]

    save(folder, sae)
    if dist.get_rank() == 0:
        share = f"latents {sae.held.start} to {sae.held.stop - 1} of {cfg.d_sae}"
        print(f"rank 0 holds {share}; fvu {reports[-1].fvu:.4f}; saved in {folder}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
