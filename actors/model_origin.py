"""What is known of a model: its commit or a fingerprint of its files, and its licence."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoConfig

from actors.errors import InputError
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
SAMPLE_BYTES = 2**20
SAMPLES = 16
"""Of a file of weights; one of a large model is not read whole each time."""

_SAYS_NOTHING = ("_name_or_path", "architectures", "transformers_version", "use_cache")
"""Of a model's configuration: who saved it, for what head, and how text is made with it."""


def revision(source: ModelSource) -> str | None:
    """The commit of a model on the Hub; None for a folder.

    Raises:
        InputError: If there is no such model.
    """
    if source.is_local:
        return None
    load_pretrained(source, AutoConfig.from_pretrained)
    # Now the cache has it, in its commit's folder.
    found = hf_hub_download(
        source.name, "config.json", revision=source.revision, local_files_only=True
    )
    return Path(found).parent.name


def identity(source: ModelSource) -> str | None:
    """Which model it is: its commit on the Hub, or a fingerprint of a folder's weights and one of its configuration.

    That of the weights is over their names, sizes and samples from begin to end: others have another,
    be their shapes the same. The same weights compute something else with another configuration.

    Raises:
        InputError: If there is no such model, or its configuration can't be read.
    """
    if not source.is_local:
        return revision(source)
    folder = Path(source.name)
    try:
        config = dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} can't be read ({error}), and must hold a model's configuration; "
            "put the model's own file there"
        ) from error
    said = {name: value for name, value in config.items() if name not in _SAYS_NOTHING}
    said["dtype"] = said.pop("torch_dtype", said.get("dtype"))  # its name before transformers 5
    text = json.dumps(said, sort_keys=True).encode()
    return f"{_weights(folder)}-{hashlib.blake2b(text, digest_size=8).hexdigest()}"


def is_same(found: str | None, noted: str | None) -> bool:
    """Whether a model's `identity` is one that was noted, of its weights alone by older versions."""
    return noted == found or (found is not None and noted == found.partition("-")[0])


def _weights(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for pattern in WEIGHT_FILES for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        last = max(0, size - SAMPLE_BYTES)
        with path.open("rb") as file:
            for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def licence(source: ModelSource) -> str | None:
    """The licence that the model's card names; None if it has no card, or the card can't be had."""
    try:
        if source.is_local:
            card = Path(source.name, "README.md")
        else:
            card = Path(hf_hub_download(source.name, "README.md", revision=source.revision))
        return ModelCard.load(card).data.get("license")
    except Exception:  # noqa: BLE001 (no card, no network, a card that is no card: not known)
        return None
