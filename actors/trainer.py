"""Fits one autoencoder on one group of layers, and survives being killed.

Everything a trial knows lies in its folder: `metrics.jsonl` (a line per report), a checkpoint
(weights, optimizer, statistics, random state, place in the data), `stopped.json` if it was given up, and at
the end the autoencoder and `result.json`, written last. A trainer made anew on the same folder continues from the checkpoint,
bit for bit on a CPU.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from actors.allocator import keep_freed_memory
from actors.fidelity import reconstruction_quality
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape, SaeConfig
from sae.fit import Fit, FitConfig, StepReport
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.files import write_file
from storage.hygiene import RowFilter
from storage.places import Location
from storage.ring import RingReader
from storage.windows import Batch


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

    @property
    def metrics_file(self) -> Path:
        """A JSON object per line: step, timestamp_ms and the metrics."""
        return self.folder / "metrics.jsonl"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What `metrics_file` holds so far."""
        if not self.metrics_file.is_file():
            return []
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    @property
    def stopped_at(self) -> int | None:
        """The step at which it was given up, if it was."""
        file = self.folder / "stopped.json"
        return json.loads(file.read_text())["step"] if file.is_file() else None

    def stop_at(self, step: int) -> None:
        """Give it up: whoever trains it, now or after a crash, goes no further and judges it there."""
        write_file(self.folder / "stopped.json", [json.dumps({"step": step}).encode()])

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


class Trainer:
    """One autoencoder, one group, one device. A plain class: tests call it in process."""

    def __init__(self, trial: Trial, device: str = "cpu", n_threads: int = 1) -> None:
        """Continue the trial from its checkpoint, or begin it."""
        torch.set_num_threads(n_threads)
        self.trial, self._device = trial, device
        self._ring = RingReader(trial.ring, trial.id) if trial.ring else None
        batches = ShuffledBatches(
            ActivationStore.open(trial.train_store),
            f"groups/{trial.group}",
            trial.row_filter,
            batch_rows=trial.fit.batch_tokens,
            window_chunks=trial.window_chunks,
            seed=trial.seed,
            ring=self._ring,
        )
        self._sae = SparseAutoencoder(trial.sae, trial.layer_scale, seed=trial.seed).to(device)
        self._fit = Fit(self._sae, trial.fit, n_steps=trial.n_steps, seed=trial.seed)
        self._cursor, self._seconds, self._waited = Cursor(epoch=0, step=0), 0.0, 0.0
        self._rows: list[dict[str, Any]] = []
        trial.folder.mkdir(parents=True, exist_ok=True)
        resumes = (trial.folder / "fit.safetensors").is_file()
        if resumes:
            self._resume()
        self._stream: Iterator[tuple[Cursor, Batch]] = batches.batches(self._cursor)
        if not resumes:
            self._begin()
        self._saved_at = time.monotonic()
        keep_freed_memory(self._sae.w_dec.nbytes)  # steps make gradients as large, one by one

    @property
    def step(self) -> int:
        """Steps done."""
        return self._fit.step_count

    @property
    def finished(self) -> bool:
        """Whether every step is done, or the trial given up; `finish` is still to be called."""
        return self.step >= self._last_step

    @property
    def _last_step(self) -> int:
        return min(self.trial.n_steps, self.trial.stopped_at or self.trial.n_steps)

    def advance(self, n_steps: int) -> dict[str, Any]:
        """Train for up to `n_steps` more steps; 0 tells where a continued trial stands.

        Returns:
            The newest line of the trial's metrics: `step`, `timestamp_ms`, `fvu` (of the last
            batch, lower is better), `l0`, `dead_fraction`, `loss`, `lr`, `tokens_per_second`,
            `data_wait_fraction` (of the time spent).
        """
        start, waited, rows, report = time.monotonic(), 0.0, 0, None
        for _ in range(min(n_steps, self._last_step - self.step)):
            asked = time.monotonic()
            cursor, batch = next(self._stream)
            batch = batch.to(self._device)
            waited += time.monotonic() - asked
            report = self._fit.step(batch.x, batch.layer)
            rows += len(batch.layer)
            self._cursor = Cursor(epoch=cursor.epoch, step=cursor.step + 1)
        if report is None:
            return self._rows[-1]
        spent = time.monotonic() - start
        self._seconds += spent
        self._waited += waited
        self._record(report, rows / spent, waited / spent)
        if self.finished or time.monotonic() - self._saved_at >= self.trial.checkpoint_seconds:
            self.save()
        return self._rows[-1]

    def save(self) -> None:
        """Write the checkpoint: whatever happens next, training goes on from here."""
        extra = {"cursor": asdict(self._cursor), "seconds": self._seconds, "waited": self._waited}
        checkpoint.save_fit(self.trial.folder, self._fit, extra)
        self._saved_at = time.monotonic()

    def pause(self) -> None:
        """Write the checkpoint and let go of the data; a new trainer goes on."""
        self.save()
        if self._ring:
            self._ring.leave()

    def finish(self) -> dict[str, Any]:
        """Judge the autoencoder on the validation store and write it with its result.

        Returns:
            The trial's settings with `fvu` (mean over the group's layers; lower is better),
            `fvu_per_layer`, `l0`, `dead_fraction` (of latents that no validation row uses in any
            layer), `tokens` trained on, `stopped_at` (the step at which it was given up, or None) and
            `seconds`.
        """
        if self._ring:
            self._ring.leave()
        quality = reconstruction_quality(
            self._sae, self.trial.validation_store, self.trial.layers, self.trial.row_filter
        )
        judged = {
            **self.trial.settings(),
            "fvu": quality.mean_fvu,
            "fvu_per_layer": {str(layer): part.fvu for layer, part in quality.layers.items()},
            "l0": quality.l0,
            "dead_fraction": quality.dead_fraction,
            "tokens": self.step * self.trial.fit.batch_tokens,
            "stopped_at": self.step if self.step < self.trial.n_steps else None,
        }
        # Times stay out of the autoencoder's file, so that the same training gives the same bytes.
        checkpoint.save(self.trial.folder / "sae", self._sae, extra=judged)
        result = {
            **judged,
            "seconds": round(self._seconds, 3),
            "data_wait_fraction": round(self._waited / max(self._seconds, 1e-9), 4),
        }
        write_file(self.trial.result_file, [json.dumps(result, indent=1).encode()])
        return result

    def _begin(self) -> None:
        cursor, batch = next(self._stream)
        self._stream = chain([(cursor, batch)], self._stream)  # it is trained on as well
        batch = batch.to(self._device)
        self._fit.initialise(batch.x, batch.layer)

    def _resume(self) -> None:
        state = checkpoint.load_fit(self.trial.folder, self._fit)
        self._cursor = Cursor(**state["cursor"])
        self._seconds, self._waited = state["seconds"], state["waited"]
        self._rows = [row for row in self.trial.rows if row["step"] <= self.step]

    def _record(self, report: StepReport, rows_per_second: float, waited: float) -> None:
        self._rows.append(
            {
                **asdict(report),
                "timestamp_ms": int(time.time() * 1000),
                "tokens_per_second": round(rows_per_second, 1),
                "data_wait_fraction": round(waited, 4),
            }
        )
        write_file(self.trial.metrics_file, [f"{json.dumps(row)}\n".encode() for row in self._rows])
