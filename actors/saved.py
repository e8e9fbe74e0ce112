"""An autoencoder as a trial has left it."""

from pathlib import Path

from actors.errors import InputError
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.integrity import DamagedError


def load_autoencoder(folder: Path, device: str, d_model: int) -> SparseAutoencoder:
    """The autoencoder in a folder.

    Raises:
        InputError: If it is damaged or not there, or was made for activations of another width.
    """
    try:
        sae, _ = checkpoint.load(folder, device)
    except DamagedError as error:
        raise InputError(
            f"{error}: where it is of a trial of a run, delete it, and the command that made it makes it again"
        ) from error
    except ValueError as error:
        raise InputError(str(error)) from error
    if sae.d_model != d_model:
        raise InputError(
            f"the autoencoder in {folder} reads activations of width {sae.d_model}, and those of the "
            f"run's model have {d_model}; use it with the model it was trained on"
        )
    return sae
