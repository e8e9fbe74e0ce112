"""Our own format, `sae.safetensors` and `sae.json`, of one layer alone: `sae.load` reads it.

What it holds: every architecture, the Kronecker encoder included.
"""

from dataclasses import asdict
from pathlib import Path

from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.formats.description import Description
from sae.formats.folding import folded

CONFIG, WEIGHTS = "sae.json", "sae.safetensors"


def refusal(sae: SparseAutoencoder) -> str | None:
    """None: it holds every autoencoder."""
    return None


def write(folder: Path, sae: SparseAutoencoder, about: Description) -> None:
    """Write an autoencoder of one layer, as `folded` gives it."""
    checkpoint.save(folder, sae, extra=asdict(about))


def read(folder: Path, layer: int) -> SparseAutoencoder:
    """The autoencoder in a folder, with the scale of `layer` folded, in float32.

    Raises:
        ValueError: If the folder holds none, a damaged one, or one that was not made for the layer.
    """
    sae, _ = checkpoint.load(folder)
    return folded(sae, layer)
