"""What is known of where a model comes from: its commit or a fingerprint of its files, and its licence."""

import hashlib
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoConfig

from actors.model_source import ModelSource
from actors.pretrained import load_pretrained

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
SAMPLE_BYTES = 2**20
SAMPLES = 16
"""Of a file of weights; one of a large model is not read whole each time."""


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


def weights(source: ModelSource) -> str | None:
    """Which weights a model has: its commit on the Hub, or a fingerprint of a folder's files.

    The fingerprint is over their names, sizes and samples from begin to end: other weights have another,
    be their shapes the same.

    Raises:
        InputError: If there is no such model.
    """
    if not source.is_local:
        return revision(source)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for pattern in WEIGHT_FILES for p in Path(source.name).glob(pattern)):
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
