"""One autoencoder over several processes, on `torch.distributed` (docs/dictionary_parallel.md)."""

from sae.parallel.ranks import ParallelRanks

__all__ = ["ParallelRanks"]
