"""Autoencoders on disk: safetensors and JSON, versioned, without pickle.

`sae.safetensors` alone is a whole checkpoint: its metadata holds the configuration, so a file is
either there with all of it or not there. `sae.json` says the same for people.

Where ranks share an autoencoder, all of them call these functions, each writes and reads its rows, and
the files are those of one process: either can go on with what the other saved.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sae import integrity, row_file, tensor_file
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape, SaeConfig
from sae.fit import Fit
from sae.integrity import DamagedError
from sae.ranks import ALONE, Ranks
from sae.row_file import HeldRows

FORMAT = "strata-sae"
VERSION = 1
_PER_LATENT = frozenset({"w_dec", "log_thresholds", "threshold", "tokens_since"})


def save(
    folder: Path | str, sae: SparseAutoencoder, extra: Mapping[str, Any] | None = None
) -> None:
    """Write an autoencoder into a folder, atomically; an older one there is replaced.

    Args:
        folder: Made if absent.
        sae: The autoencoder.
        extra: Anything JSON can hold: where it came from, how it was trained. Of ranks the first's counts.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": config_to_json(sae.cfg),
        "layer_scale": sae.layer_scale,
        "dtype": str(sae.b_dec.dtype).removeprefix("torch."),
        "extra": dict(extra or {}),
    }
    folder = Path(folder)
    _write(folder / "sae.safetensors", sae, sae.state_dict(), header)
    if sae.ranks.number:
        return
    partial = folder / "sae.json.partial"
    partial.write_text(json.dumps(header, indent=2) + "\n")
    os.replace(partial, folder / "sae.json")


def load(
    folder: Path | str, device: torch.device | str = "cpu", ranks: Ranks = ALONE
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The autoencoder of a folder, in eval mode, and the `extra` it was saved with.

    Args:
        folder: Where it was saved.
        device: Where it is wanted.
        ranks: Who shares it from now on; each reads its own rows.

    Raises:
        ValueError: If the folder holds none, a damaged one (`DamagedError`), or one of a later version.
    """
    folder = Path(folder)
    path = folder / "sae.safetensors"
    with ranks.together(), _opened(path, device) as file:
        header = _header(file.metadata() or {}, path)
        scale = {int(layer): factor for layer, factor in header["layer_scale"].items()}
        cfg = config_from_json(header["config"])
        with torch.device("meta"):
            sae = SparseAutoencoder(cfg, scale, seed=None, ranks=ranks)
        held = _held(sae, _shapes(file))
        tensors = row_file.read(file, held)
    integrity.check_tensors(header, tensors, held, ranks, path)
    if "threshold" in tensors:  # one value, or one for each latent
        sae.threshold = torch.empty_like(tensors["threshold"], device="meta")
    try:
        sae.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the tensors of {folder} do not fit the configuration saved with them; a checkpoint "
            f"holds both; fetch it again ({error})"
        ) from error
    return sae.eval(), header["extra"]


def save_fit(folder: Path | str, fit: Fit, extra: Mapping[str, Any] | None = None) -> None:
    """Write the state of a training into `fit.safetensors`, atomically.

    Args:
        folder: Made if absent.
        fit: The training.
        extra: Anything JSON can hold that must be of the same moment: the data's cursor. Of ranks the
            first's counts.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": config_to_json(fit.sae.cfg),
        "extra": dict(extra or {}),
    }
    _write(Path(folder) / "fit.safetensors", fit.sae, fit.state_dict(), header)


def load_fit(folder: Path | str, fit: Fit) -> dict[str, Any]:
    """Put a saved training state into `fit`; returns the `extra` it was saved with.

    Raises:
        ValueError: If the folder holds none, a damaged one (`DamagedError`), or one of another
            configuration or version.
    """
    folder = Path(folder)
    path, device, ranks = folder / "fit.safetensors", fit.sae.b_dec.device, fit.sae.ranks
    with ranks.together(), _opened(path, device) as file:
        header = _header(file.metadata() or {}, path)
        saved = config_from_json(header["config"])
        if saved != fit.sae.cfg:
            raise ValueError(
                f"the training state in {folder} is of {saved}, this fit is of {fit.sae.cfg}; a fit "
                "resumes with the configuration it began with; restore that, or start anew"
            )
        held = _held(fit.sae, _shapes(file))
        tensors = row_file.read(file, held)
    integrity.check_tensors(header, tensors, held, ranks, path)
    fit.load_state_dict(tensors)
    return header["extra"]


def config_to_json(cfg: SaeConfig) -> dict[str, Any]:
    """The configuration as JSON holds it."""
    return asdict(cfg)


def config_from_json(data: Mapping[str, Any]) -> SaeConfig:
    """The configuration that `config_to_json` wrote."""
    encoder = data["encoder"]
    return SaeConfig(
        **{
            **data,
            "encoder": KronShape(**encoder) if isinstance(encoder, Mapping) else encoder,
            "prefixes": tuple(data["prefixes"]),
        }
    )


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _held(sae: SparseAutoencoder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, HeldRows]:
    """Rows that a rank holds of the tensors of a saved autoencoder, or of a saved training.

    Tensors are known by their names; scalars, and what is not named after latents, all ranks hold.
    """
    if sae.ranks.n_dictionary == 1:
        return {}
    of_encoder = HeldRows(rows=sae.encoder.rows, n_rows=sae.encoder.n_rows)
    of_latents = HeldRows(rows=[sae.held], n_rows=sae.cfg.d_sae)
    held = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if shape and "encoder" in parts:
            held[name] = of_encoder
        elif shape and not _PER_LATENT.isdisjoint(parts):
            held[name] = of_latents
    return held


def _write(
    path: Path,
    sae: SparseAutoencoder,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    ranks = sae.ranks
    held = _held(sae, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    # One entry: safetensors writes several in any order.
    metadata = {FORMAT: integrity.sealed(header, tensors, held, ranks)}
    if ranks.n_dictionary * ranks.n_batch > 1:
        row_file.write(path, tensors, held, metadata, ranks)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    tensor_file.save(contiguous, partial, metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a saved autoencoder is a folder with that file; check the path"
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise DamagedError(path, f"it is not a whole safetensors file: {error}") from error


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} was not written by Strata: its metadata has no '{FORMAT}'; "
            "only Strata's own format is read here; convert it first"
        )
    header = integrity.opened(metadata[FORMAT], path)
    version = str(header.get("version"))
    if not version.isdigit():
        raise DamagedError(path, f"its version is {version}, not a number")
    if int(version) > VERSION:
        raise ValueError(
            f"{path} is of format version {version}; this Strata reads up to {VERSION}; "
            "update Strata"
        )
    if "config" not in header:
        raise DamagedError(path, "it lacks the configuration")
    return header
