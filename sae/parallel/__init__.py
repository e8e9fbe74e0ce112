"""One autoencoder over several processes, on `torch.distributed` (docs/dictionary_parallel.md)."""

from sae.parallel.ranks import ParallelRanks, RefusedElsewhereError

__all__ = ["ParallelRanks", "RefusedElsewhereError"]
