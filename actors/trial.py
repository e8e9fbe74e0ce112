"""A trial of a sweep: one autoencoder to fit on one group of layers.

Everything it knows lies in its folder: `metrics.jsonl` (a line per report), a checkpoint (weights, optimizer, statistics,
random state, place in the data) until it has ended, `stopped.json` if it was given up, and at the end the autoencoder and
`result.json`, written last.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from actors.errors import InputError
from sae.config import KronShape, SaeConfig
from sae.fit import FitConfig
from storage.errors import StoreError
from storage.files import read_json_lines, write_file
from storage.hygiene import RowFilter
from storage.places import Location
from storage.seal import opened, sealed


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate: an autoencoder to fit, and on what."""

    id: str
    """Unique in the run and the same in every call, for instance `g0-k16-dense-topk`."""

    group: int
    layers: tuple[int, ...]
    sae: SaeConfig
    fit: FitConfig
    n_steps: int
    seed: int

    layer_scale: dict[int, float]
    """Factor per layer that brings its mean norm to sqrt(d_model)."""

    window_chunks: int
    checkpoint_seconds: float

    train_store: Location
    validation_store: Location
    row_filter: RowFilter
    folder: Path
    """Of this trial alone."""

    ring: Location | None = None
    """Where readers ask for shards, if the training store holds only those that are needed next."""

    @property
    def result_file(self) -> Path:
        """Exists when the trial is finished."""
        return self.folder / "result.json"

    def forget_result_without_autoencoder(self) -> None:
        """Somebody has deleted that, so that it is trained again."""
        if not (self.folder / "sae" / "sae.safetensors").is_file():
            self.result_file.unlink(missing_ok=True)

    @property
    def checkpoint_file(self) -> Path:
        """Exists while there is a step to go on from."""
        return self.folder / "fit.safetensors"

    @property
    def metrics_file(self) -> Path:
        """A JSON object per line: step, timestamp_ms and the metrics."""
        return self.folder / "metrics.jsonl"

    @property
    def save_request(self) -> Path:
        """Exists while the driver asks for a checkpoint; whoever has written it removes this file."""
        return self.folder / "save_now"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What `metrics_file` holds so far.

        Raises:
            InputError: If it is damaged.
        """
        try:
            return read_json_lines(self.metrics_file)
        except StoreError as error:  # that one file's fault, and no reason to leave this machine
            raise InputError(str(error)) from error

    @property
    def stopped_at(self) -> int | None:
        """The step at which it was given up, if it was."""
        return self._stopped.get("step")

    @property
    def diverged(self) -> bool:
        """Whether it was given up as its loss or gradient was not finite."""
        return self._stopped.get("diverged", False)

    @property
    def _stopped(self) -> dict[str, Any]:
        file = self.folder / "stopped.json"
        if not file.is_file():
            return {}
        try:
            return opened(dict(json.loads(file.read_text())))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file} is damaged ({error}); it says where the trial was given up: delete the whole folder, "
                "and `strata run` trains it from its begin"
            ) from error

    def stop_at(self, step: int, diverged: bool = False) -> None:
        """Give it up: whoever trains it, now or after a crash, goes no further and judges it there."""
        text = json.dumps(sealed({"step": step, "diverged": diverged}))
        write_file(self.folder / "stopped.json", [text.encode()])

    def settings(self) -> dict[str, Any]:
        """What tells this trial from others, flat."""
        return {
            "trial": self.id,
            "group": self.group,
            "layers": list(self.layers),
            **encoder_settings(self.sae.encoder),
            "k": self.sae.k,
            "selection": self.sae.selection,
            "d_sae": self.sae.d_sae,
            "prefixes": list(self.sae.prefixes),
            "scaling": self.sae.scaling,
            **asdict(self.fit),
            "betas": list(self.fit.betas),
            "lr": self.fit.peak_lr(self.sae.d_sae),
            "n_parameters": self.sae.n_parameters,
            "encoder_parameters": self.sae.n_encoder_parameters,
            "encoder_flops_per_token": self.sae.encoder_flops_per_token,
        }


def encoder_settings(encoder: Literal["dense"] | KronShape) -> dict[str, Any]:
    """What tells an encoder from others, flat."""
    kron = encoder if isinstance(encoder, KronShape) else None
    return {
        "encoder": "kron" if kron else "dense",
        "h": kron.h if kron else None,
        "m": kron.m if kron else None,
        "n": kron.n if kron else None,
        "activation": kron.activation if kron else None,
    }
