"""Sparse autoencoders: the mathematics, in torch alone."""

from sae.autoencoder import Reconstruction, SparseAutoencoder
from sae.checkpoint import load, load_fit, save, save_fit
from sae.config import KronShape, SaeConfig
from sae.dictionary import dictionary_mcc, effective_rank, mmcs
from sae.fit import DivergenceError, Fit, FitConfig, StepReport
from sae.latents import SparseLatents
from sae.metrics import LatentCounts, ReconstructionMetrics, ce_recovered
from sae.progressive import (
    evaluate_prefixes,
    fit_power_law,
    importance,
    reconstruct_prefixes,
    reconstruct_subset,
    rsa,
)

__all__ = [
    "DivergenceError",
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
    "dictionary_mcc",
    "effective_rank",
    "evaluate_prefixes",
    "fit_power_law",
    "importance",
    "load",
    "load_fit",
    "mmcs",
    "reconstruct_prefixes",
    "reconstruct_subset",
    "rsa",
    "save",
    "save_fit",
]
