"""The gate of an export: what was written, opened again and compared on held-out rows with what was trained."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from actors.errors import InputError
from actors.parity import ACTIVATION_TOLERANCE, RECONSTRUCTION_TOLERANCE, Parity, compare
from actors.target_formula import Codes, by_formula
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape
from sae.formats import FORMATS
from sae.formats.folding import thresholds

LATENTS_AT_ONCE = 2**24
"""Latents of all rows compared: 64 MiB of them."""


def rows_to_check(d_sae: int) -> int:
    """Rows that a check looks at: at least 64, at most 4096."""
    return min(4096, max(64, LATENTS_AT_ONCE // d_sae))


@torch.no_grad()
def check_files(
    kind: str,
    folder: Path,
    sae: SparseAutoencoder,
    layer: int,
    x: Float[Tensor, "rows d_model"],
) -> dict[str, Parity]:
    """Compare an exported folder with the autoencoder it came from, without the format's library.

    Args:
        kind: Its format.
        folder: Where it lies.
        sae: What it must be, with the layer's scale.
        layer: The layer exported.
        x: Held-out rows of it, in the model's units.

    Returns:
        Parity `formula`, by an independent implementation of the library's mathematics from the files,
        and `read_back`, by the reader that `strata evaluate --sae` uses.

    Raises:
        InputError: If it computes another function.
    """
    ours = _codes(sae, layer, x)
    found = {
        "formula": _compared(sae, ours, by_formula(kind, folder, x)),
        "read_back": _compared(sae, ours, _codes(FORMATS[kind].read(folder, layer), layer, x)),
    }
    _refuse(kind, f"the mathematics of {kind}", found["formula"])
    _refuse(kind, "reading it back", found["read_back"])
    return found


@torch.no_grad()
def check_library(
    kind: str,
    library: str,
    codes: Codes,
    sae: SparseAutoencoder,
    layer: int,
    x: Float[Tensor, "rows d_model"],
) -> Parity:
    """Compare what the library itself computed from an exported folder.

    Args:
        kind: The format.
        library: The library's name and version.
        codes: What it computed of x.
        sae: As in `check_files`.
        layer: As there.
        x: As there.

    Raises:
        InputError: If it is another function.
    """
    found = _compared(sae, _codes(sae, layer, x), codes)
    _refuse(kind, library, found)
    return found


def _refuse(kind: str, who: str, parity: Parity) -> None:
    if not parity.holds:
        raise InputError(
            f"the export to {kind} is not the autoencoder that was trained: by {who}, latents differ by "
            f"{parity.activation_delta:.1e} ({ACTIVATION_TOLERANCE:.0e} was allowed), reconstructions by "
            f"{parity.reconstruction_delta:.1e} ({RECONSTRUCTION_TOLERANCE:.0e}), and {parity.wrong} "
            f"latents of {parity.n_rows} rows are on in one alone (0); nothing was kept: choose another "
            "format, such as safetensors"
        )


def _compared(sae: SparseAutoencoder, ours: Codes, theirs: Codes) -> Parity:
    bounds, shape = thresholds(sae), sae.cfg.encoder
    rooted = isinstance(shape, KronShape) and shape.activation == "mand"
    return compare(ours, theirs, sae.cfg.k if bounds is None else bounds, rooted)


def _codes(sae: SparseAutoencoder, layer: int, x: Tensor) -> Codes:
    found = sae.reconstruct(x, torch.full((len(x),), layer, dtype=torch.int64))
    return found.latents.dense(), found.x_hat
