"""Sparse autoencoders: the mathematics, in torch alone."""

from sae.autoencoder import Reconstruction, SparseAutoencoder
from sae.checkpoint import load, load_fit, save, save_fit
from sae.config import KronShape, SaeConfig
from sae.fit import Fit, FitConfig, StepReport
from sae.latents import SparseLatents
from sae.metrics import LatentCounts, ReconstructionMetrics, ce_recovered

__all__ = [
    "Fit",
    "FitConfig",
    "KronShape",
    "LatentCounts",
    "Reconstruction",
    "ReconstructionMetrics",
    "SaeConfig",
    "SparseAutoencoder",
    "SparseLatents",
    "StepReport",
    "ce_recovered",
    "load",
    "load_fit",
    "save",
    "save_fit",
]
