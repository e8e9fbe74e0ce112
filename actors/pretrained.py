"""Loads what a model's folder or Hub repository holds, with errors that say what to do.

A local folder never touches the network. A Hub name is looked up in the local cache first, and only
then, after one short request that shows whether the Hub answers, downloaded: without that request
transformers would retry for half a minute.
"""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers.utils import logging

from actors.errors import InputError
from actors.model_source import ModelSource

Loaded = TypeVar("Loaded")

_LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises where files are not whole, or hold something else."""

_PROBE_SECONDS = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_pretrained(source: ModelSource, loader: Callable[..., Loaded], **options: Any) -> Loaded:
    """`loader(name, **options)` for a `from_pretrained` of transformers.

    Args:
        source: Whose name and revision are loaded; its dtype is the caller's to pass on.
        loader: Such as `AutoConfig.from_pretrained`.
        options: Further arguments of the loader.

    Raises:
        InputError: If the files are not there, can't be had or can't be understood.
    """
    logging.disable_progress_bar()  # pyright: ignore[reportPrivateImportUsage]
    logging.set_verbosity_error()  # that a model without head leaves the head's weights is no news
    options["revision"] = source.revision
    options["trust_remote_code"] = False  # left out, transformers would ask at the terminal
    if source.is_local:
        _check_folder(Path(source.name))
        return _loaded(source, loader, local_files_only=True, **options)
    if not _HUB_ID.fullmatch(source.name):
        raise InputError(
            f"the model {source.name!r} is no folder that exists, and no name of the Hub "
            "(owner/name) either; correct model.name"
        )
    try:
        return loader(source.name, local_files_only=True, **options)
    except OSError:  # not in the cache, or not all of it
        _check_hub(source)
    return _loaded(source, loader, **options)


def _loaded(source: ModelSource, loader: Callable[..., Loaded], **options: Any) -> Loaded:
    try:
        return loader(source.name, **options)
    except _LOADING_ERRORS as error:
        raise InputError(
            f"the model {source.name} can't be loaded: {_first_line(error)}; it must hold "
            "config.json, safetensors weights and tokenizer.json, whole and of one architecture "
            "that transformers knows: write it with `save_pretrained`, or download it again"
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json, so it is no model; give a folder that "
            "`save_pretrained` wrote or that was downloaded from the Hub"
        )


def check_weights(source: ModelSource) -> None:
    """Refuse a folder without weights before anything is begun; a Hub name is not looked up.

    Raises:
        InputError: If the folder holds no file of weights.
    """
    folder = Path(source.name)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise InputError(
            f"{folder} has no weights (no *.safetensors and no *.bin file); give a whole folder, "
            "as `save_pretrained` writes it"
        )


def check_device_map(source: ModelSource) -> None:
    """Refuse to spread a model over devices without the package that does it.

    Raises:
        InputError: If `device_map` is set and accelerate is not installed.
    """
    if source.device_map is not None and find_spec("accelerate") is None:
        raise InputError(
            f"model.device_map: {source.device_map} is the work of the package accelerate, which is "
            "not installed; install it (`pip install accelerate`), or leave device_map out to use "
            "one device"
        )


def _check_hub(source: ModelSource) -> None:
    """One short request: does the Hub answer, and does it have the model?"""
    try:
        HfApi().model_info(source.name, revision=source.revision, timeout=_PROBE_SECONDS)
    except GatedRepoError as error:
        raise InputError(
            f"the Hub gives {source.name} only to those who accepted its terms; accept them on its "
            "page and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"the Hub's {source.name} has no revision {source.revision}; correct model.revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {source.name}, and no model of that name on the Hub; correct "
            "model.name, or set HF_TOKEN if it is private"
        ) from error
    except Exception as error:  # whatever the HTTP library raises where there is no network
        raise InputError(
            f"{source.name} is not a local folder and the Hub can't be reached "
            f"({_first_line(error)}); download it on a machine that has network "
            f"(`hf download {source.name} --local-dir FOLDER`) and give the folder as model.name"
        ) from error


def _first_line(error: Exception) -> str:
    if "mismatched" in str(error):  # transformers points at a report that it does not show
        return "its weights have other shapes than its config.json says"
    return str(error).strip().split("\n")[0] or type(error).__name__
