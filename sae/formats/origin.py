"""What the files of someone's autoencoder say of where it belongs: each library notes it elsewhere."""

import re
from dataclasses import dataclass
from pathlib import Path

from sae.formats import FORMATS
from sae.formats.affine import read_config
from sae.formats.description import check_weights, read_description

_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|layer|h)\.(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known; None where nothing was noted."""

    model: str | None = None
    """Name of the model it was trained on."""

    revision: str | None = None
    """Its commit on the Hub."""

    tokenizer: str | None = None
    """Fingerprint of its tokenizer; Strata alone notes it."""

    layer: int | None = None
    """The layer it reads."""

    file: Path
    """Where the name of the model stands."""


def origin(kind: str, folder: Path) -> Origin:
    """What the files of a folder of this format say.

    Raises:
        ValueError: If they are damaged, or the weights are others than those that Strata wrote there.
    """
    about = read_description(folder)
    check_weights(folder, FORMATS[kind].WEIGHTS)
    file = folder / FORMATS[kind].CONFIG
    if about is not None:
        return Origin(
            model=about.model,
            revision=about.revision,
            tokenizer=about.tokenizer,
            layer=about.layer,
            file=folder / "strata.json",
        )
    config = read_config(file)
    if kind == "sae_lens":
        # Before version 6 these stood at the top.
        noted = {**config, **(config.get("metadata") or {})}
        hook = noted.get("hook_name") or noted.get("hf_hook_name")
        return Origin(model=noted.get("model_name"), layer=_layer_of(hook), file=file)
    if kind == "dictionary_learning":
        noted = config.get("trainer") or {}
        layer = noted.get("layer")
        return Origin(
            model=noted.get("lm_name"), layer=layer if isinstance(layer, int) else None, file=file
        )
    if kind == "sparsify":  # the folder is named after the hook point, and nothing else is noted
        return Origin(layer=_layer_of(folder.resolve().name), file=file)
    layers = (config.get("layer_scale") or {}).keys()
    return Origin(layer=int(next(iter(layers))) if len(layers) == 1 else None, file=file)


def _layer_of(hook: object) -> int | None:
    found = _LAYER.search(hook) if isinstance(hook, str) else None
    return int(found[1]) if found else None
