"""What is known of where a model comes from: its commit, and the licence of its weights."""

from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoConfig

from actors.model_source import ModelSource
from actors.pretrained import load_pretrained


def revision(source: ModelSource) -> str | None:
    """The commit of a model on the Hub; None for a folder.

    Raises:
        InputError: If there is no such model.
    """
    if source.is_local:
        return None
    config = load_pretrained(source, AutoConfig.from_pretrained)
    return getattr(config, "_commit_hash", None) or source.revision


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
