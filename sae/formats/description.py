"""What an exported autoencoder says of itself, the same in every format: `strata.json` beside its weights."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "strata.json"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Where an exported autoencoder came from, and what it is to be applied to."""

    model: str
    """Name of the model, as it was loaded."""

    revision: str | None
    """Its commit, branch or tag on the Hub; None for a folder."""

    tokenizer: str
    """Fingerprint of its tokenizer."""

    layer: int
    """The layer whose scale is folded into the weights."""

    hook_name: str
    """Where TransformerLens has these activations; the module's path where it has no name for them."""

    module: str
    """Path of the module whose output they are, in the model with its head."""

    trunk_module: str
    """The same path in the model without its head."""

    context: int
    """Tokens of a sequence."""

    prepend_bos: bool
    """Whether a BOS opened every sequence."""

    excluded_tokens: tuple[int, ...]
    """Token ids whose activations it never saw."""

    corpus: str
    """What text it was trained on."""

    trial: str
    """Its name in the run."""

    selection: str
    """How it selected latents in training."""

    k: int
    """Latents kept per token in training, on average with BatchTopK."""

    prefixes: tuple[int, ...]
    """Nested dictionary sizes; empty if there is one."""

    l0: float
    """Mean latents in use per validation row of the layer."""

    config_hash: str
    """Of the run's configuration."""

    mlflow_run: str | None
    """The trial's run in MLflow, if one was made."""

    changes: tuple[str, ...] = ()
    """In what the exported function is not the trained one; empty if it is the same."""


def write_description(folder: Path, about: Description, weights: str) -> None:
    """Write it beside the weights in `folder`, whose file has the name `weights`."""
    vouched = {"weights_sha256": _sha256(folder / weights)}
    text = json.dumps({**asdict(about), **vouched}, indent=1)
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def check_weights(folder: Path, weights: str) -> None:
    """Compare the file of the name `weights` with what was written, where `strata.json` vouches for it.

    Raises:
        ValueError: If it is another.
    """
    written = _read(folder / FILE).get("weights_sha256") if (folder / FILE).is_file() else None
    if written is not None and written != _sha256(folder / weights):
        raise ValueError(
            f"{folder / weights} is not the file that was exported: its SHA-256 is not the one in {FILE} "
            "beside it; it was damaged or changed: fetch or export it again"
        )


def read_description(folder: Path) -> Description | None:
    """What stands beside the weights in `folder`; None if Strata did not write them.

    Raises:
        ValueError: If the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        data = _read(file)
        data |= {name: tuple(data[name]) for name in ("excluded_tokens", "prefixes", "changes")}
        return Description(**{field.name: data[field.name] for field in fields(Description)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); it says what an exported autoencoder is for; export it "
            "again"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
