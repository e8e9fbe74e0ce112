"""Someone's encoder and decoder as a `SparseAutoencoder`: the common ground of all formats that are read.

Other libraries may not subtract b_dec first, store a matrix the other way round, or let decoder rows
have any norm. None of it is a difference in kind.
"""

import json
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig


@torch.no_grad()
def affine(
    *,
    w_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    layer: int,
    k: int | None = None,
    thresholds: Tensor | None = None,
    subtracts_b_dec: bool = True,
    standardize: bool = False,
    prefixes: tuple[int, ...] = (),
) -> SparseAutoencoder:
    """The autoencoder that someone's affine encoder and decoder are.

    Args:
        w_enc: Row j reads latent j.
        b_enc: Added to it, (d_sae,).
        w_dec: Row j is what latent j writes, of any norm, (d_sae, d_model).
        b_dec: Added to the reconstruction, (d_model,).
        layer: The one that it reads, in the model's units.
        k: The k largest latents of each token are on. Without it, latents above `thresholds`.
        thresholds: One, or one for each latent. Negative ones are 0: a latent that is on is positive.
        subtracts_b_dec: Whether the encoder reads x - b_dec, and not x.
        standardize: Whether each token is brought to mean 0 and deviation 1.
        prefixes: Nested dictionary sizes.

    Raises:
        ValueError: If neither k nor thresholds are given, the sizes contradict each other, or a weight is
            not finite.
    """
    if (k is None) == (thresholds is None):
        raise ValueError("give either k or thresholds: an autoencoder selects by one of the two")
    d_sae, d_model = w_enc.shape
    cfg = SaeConfig(
        d_model=d_model,
        d_sae=d_sae,
        k=1 if k is None else k,
        selection="batch_topk" if k is None else "topk",
        prefixes=prefixes,
        scaling="token_standardize" if standardize else "layer_scale",
    )
    sae = SparseAutoencoder(cfg, {layer: 1.0}, seed=None)
    sae.encoder.w_enc.copy_(sized("the encoder", w_enc, d_sae, d_model))
    sae.w_dec.copy_(sized("the decoder", w_dec, d_sae, d_model))
    sae.b_dec.copy_(sized("b_dec", b_dec, d_model))
    shift = 0.0 if subtracts_b_dec else w_enc.double() @ b_dec.double()
    sae.encoder.b_enc.copy_(sized("b_enc", b_enc, d_sae).double() + shift)
    if thresholds is not None:
        bounds = thresholds.float().clamp(min=0)
        bounds = bounds.expand(d_sae) if bounds.numel() == 1 else bounds
        sae.set_threshold(sized("threshold", bounds, d_sae))
    return sae.eval()


def sized(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """The tensor, if it has this shape and is finite.

    Raises:
        ValueError: If not.
    """
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, and the other weights ask for {shape}; the files belong "
            "to different autoencoders or are damaged: fetch or export them again"
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} holds numbers that are not finite; weights are: it was damaged, or its training diverged; "
            "fetch it again, or give another"
        )
    return tensor


def oriented(name: str, matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix as (rows, columns), turned round if it is stored the other way.

    Square ones are taken as they are.

    Raises:
        ValueError: If it has other sizes.
    """
    if matrix.shape == (rows, columns):
        return matrix
    if matrix.shape == (columns, rows):
        return matrix.T
    raise ValueError(
        f"{name} has shape {tuple(matrix.shape)}, and the configuration beside it says ({rows}, {columns}); "
        "the two belong to different autoencoders: fetch or export it again"
    )


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: If there is none.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} can't be read as JSON ({error}); it is the configuration of an autoencoder: fetch or "
            "export it again"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(  # noqa: TRY004 (of the file, not of an argument)
            f"{file} holds a {type(data).__name__}, not the configuration of an autoencoder; fetch or export "
            "it again"
        )
    return data


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, or of one that `torch.save` wrote; nothing in it is run.

    Raises:
        ValueError: If it is damaged, or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():  # of pickles that torch.save did not write
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is not tensors alone: it is damaged, or a pickle with code in it, which would be run by "
            "reading it; it was refused and nothing of it ran. Save its state_dict with torch.save, or "
            "fetch it again"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        told = str(error).splitlines() or ["it ends too early"]
        raise ValueError(
            f"{file} can't be read ({told[0]}); it must be a whole file of tensors: fetch "
            "or export it again"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(
            f"{file} holds no dictionary of tensors; save the autoencoder's state_dict with torch.save"
        )
    return dict(found)


def take(tensors: Mapping[str, Tensor], needed: Collection[str], file: Path) -> list[Tensor]:
    """The tensors that are needed, in float32.

    Raises:
        ValueError: If one is missing, or one is there that would change the function.
    """
    missing, strange = set(needed) - set(tensors), set(tensors) - set(needed)
    if missing or strange:
        raise ValueError(
            f"{file} holds the tensors {', '.join(sorted(tensors))}, and its configuration asks for "
            f"{', '.join(sorted(needed))}; the file is of another architecture or was damaged: fetch or "
            "export it again"
        )
    if any(tensors[name].is_complex() for name in needed):
        raise ValueError(
            f"{file} holds complex numbers; weights are real: fetch or export it again"
        )
    return [tensors[name].float() for name in needed]


def size(config: Mapping[str, Any], key: str, file: Path) -> int:
    """A whole number of a configuration, from 1.

    Raises:
        ValueError: If it is missing or none.
    """
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{file} has {key}={value!r}; it must be a whole number from 1: fetch or export it again"
        )
    return value
