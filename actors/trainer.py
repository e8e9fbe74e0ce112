"""Fits one autoencoder on one group of layers, and survives being killed.

A trainer made anew on a trial's folder (`actors.trial`) continues from the checkpoint there, bit for bit on a CPU.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from actors.allocator import keep_freed_memory
from actors.errors import InputError
from actors.feed import Feed, Given
from actors.fidelity import reconstruction_quality
from actors.trial import Trial
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.fit import DivergenceError, Fit, StepReport
from sae.integrity import DamagedError
from sae.ranks import ALONE, Ranks
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.chunk_source import ChunkSource
from storage.files import write_file
from storage.ring import RingReader
from storage.seal import sealed
from storage.windows import READING_ORDER


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Time that went into steps."""

    seconds: float = 0.0
    """Those of trials beside this one included."""

    waited: float = 0.0
    """Seconds of these in which the next batch, or its copy to the device, was waited for."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(seconds=self.seconds + other.seconds, waited=self.waited + other.waited)


def feed_of(
    trial: Trial, device: str, shared: ChunkSource | None = None, ranks: Ranks = ALONE
) -> Feed:
    """The batches that a trial trains on; `shared` is asked first for what is not read in place.

    Each of `ranks` reads for itself, and is a reader of its own where the store is a ring.
    """
    reader = f"{trial.id}-rank{ranks.number}" if ranks.number else trial.id
    ring = RingReader(trial.ring, reader) if trial.ring else None
    batches = ShuffledBatches(
        ActivationStore.open(trial.train_store, shared=shared),
        f"groups/{trial.group}",
        trial.row_filter,
        batch_rows=trial.fit.batch_tokens,
        window_chunks=trial.window_chunks,
        seed=trial.seed,
        ring=ring,
    )
    return Feed(batches, device, ring)


class Trainer:
    """One autoencoder, one group, one device. `actors.bundle` has it take its steps.

    Where ranks share the autoencoder each has a trainer, and all call the same of it in the same order.
    What is read from clocks and files is what the first one reads; it alone writes, checkpoints apart.
    """

    def __init__(
        self,
        trial: Trial,
        feed: Feed,
        device: str = "cpu",
        n_threads: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        """Continue the trial from its checkpoint, or begin it.

        Args:
            trial: What to train.
            feed: The batches; others may train on the same ones.
            device: Where.
            n_threads: Of the CPU.
            ranks: Who shares it.
        """
        torch.set_num_threads(n_threads)
        self.trial, self._ranks = trial, ranks
        self._feed = feed
        self._feed.join()
        self._sae = SparseAutoencoder(
            trial.sae, trial.layer_scale, seed=trial.seed, ranks=ranks
        ).to(device)
        self._fit = Fit(self._sae, trial.fit, n_steps=trial.n_steps, seed=trial.seed)
        self._spent = Spent()
        """In all."""
        self.cursor = Cursor(epoch=0, step=0)
        """Of the batch for the next step."""
        self._rows: list[dict[str, Any]] = []
        self._newest: StepReport | None = None
        """Of the steps since the last report."""
        self._since = Spent()
        """On them."""
        self._n_rows = 0
        """That they have seen."""
        self._goes_on = False
        """Whether some of them were taken here, and not before a restart alone."""
        trial.folder.mkdir(parents=True, exist_ok=True)
        if ranks.of_first(trial.checkpoint_file.is_file()):
            self._resume()
        else:
            self._fit.initialise(*self._given().rows)  # it is trained on as well
        keep_freed_memory(self._sae.w_dec.nbytes)  # steps make gradients as large, one by one

    @property
    def step(self) -> int:
        """Steps done."""
        return self._fit.step_count

    @property
    def last_step(self) -> int:
        """The step to end at: of its whole training, or where it was given up (a file says so)."""
        last = min(self.trial.n_steps, self.trial.stopped_at or self.trial.n_steps)
        return self._ranks.of_first(last)

    @property
    def finished(self) -> bool:
        """Whether every step is done, or the trial given up; `finish` is still to be called."""
        return self.step >= self.last_step

    def train(self) -> bool:
        """Take one step; a trial that diverges is given up before it, and the answer is no."""
        given = self._given()
        try:
            self._newest = self._fit.step(*given.rows)
        except DivergenceError:
            if not self.step:
                raise  # the data's fault, not the training's
            if self._writes:
                self.trial.stop_at(self.step, diverged=True)
            return False
        self._n_rows += given.n_rows
        self._goes_on = True
        self.cursor = given.following
        return True

    def spend(self, spent: Spent) -> None:
        """Count what the newest steps took."""
        self._spent += spent
        self._since += spent

    def report(self) -> dict[str, Any] | None:
        """Note what came of the steps since the last report, if there were some.

        Returns:
            The newest line of the trial's metrics: `step`, `timestamp_ms`, `fvu` (of the last
            batch, lower is better), `l0`, `dead_fraction`, `loss`, `auxk_loss`, `grad_norm`, `lr`,
            `tokens_per_second`, `data_wait_fraction` (of the time spent). None before the first.
        """
        if self._newest is not None and (self._goes_on or self.finished):
            since = self._since
            self._record(self._newest, self._n_rows / since.seconds, since.waited / since.seconds)
            self._newest, self._since, self._n_rows, self._goes_on = None, Spent(), 0, False
        return self._rows[-1] if self._rows else None

    def save(self) -> None:
        """Write the checkpoint: whatever happens next, training goes on from here."""
        extra = {
            "trial": self.trial.id,
            "training": self._training,
            "cursor": asdict(self.cursor),
            "reading_order": READING_ORDER,
            **asdict(self._spent),
            "newest": self._rows[-1:],
            "unreported": self._newest
            and {
                "step": asdict(self._newest),
                "n_rows": self._n_rows,
                "since": asdict(self._since),
            },
        }
        checkpoint.save_fit(self.trial.folder, self._fit, extra)
        if self._writes:
            self.trial.save_request.unlink(missing_ok=True)

    def pause(self) -> None:
        """Write the checkpoint and let go of the data; a new trainer goes on."""
        self.save()
        self._feed.leave()

    def finish(self) -> dict[str, Any]:
        """Judge the autoencoder on the validation store, write it with its result, and drop the checkpoint.

        Returns:
            The trial's settings with `fvu` (mean over the group's layers; lower is better;
            infinite if it diverged beyond all numbers), `fvu_per_layer`, `l0`, `dead_fraction` (of latents that no validation row uses in any
            layer), `tokens` trained on, `stopped_at` (the step at which it was given up, or None) and
            `seconds`.
        """
        self._feed.leave()
        quality = reconstruction_quality(
            self._sae, self.trial.validation_store, self.trial.layers, self.trial.row_filter
        )
        judged = {
            **self.trial.settings(),
            "fvu": quality.mean_fvu if math.isfinite(quality.mean_fvu) else math.inf,
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
            "seconds": round(self._spent.seconds, 3),
            "data_wait_fraction": round(self._spent.waited / max(self._spent.seconds, 1e-9), 4),
        }
        if self._writes:
            write_file(self.trial.result_file, [json.dumps(sealed(result), indent=1).encode()])
            self.trial.checkpoint_file.unlink(missing_ok=True)  # it has three times the bytes
        return result

    @property
    def _writes(self) -> bool:
        return self._ranks.number == 0

    @property
    def _training(self) -> dict[str, Any]:
        """What it is trained by, beside what the autoencoder's configuration says, as JSON has it."""
        trial = self.trial
        return {
            **asdict(trial.fit),
            "betas": list(trial.fit.betas),
            "n_steps": trial.n_steps,
            "seed": trial.seed,
            "layers": list(trial.layers),
            "window_chunks": trial.window_chunks,
        }

    def _given(self) -> Given:
        """This rank's part of the batch for the next step."""
        return self._feed.at(self.cursor).part_of(self._ranks)

    def _resume(self) -> None:
        try:
            state = checkpoint.load_fit(self.trial.folder, self._fit)
        except DamagedError as error:
            raise InputError(
                f"{error.path} is damaged ({error.fault}); the trial {self.trial.id} would go on from there; "
                "delete that file, and the same command trains it from its begin"
            ) from error
        if state.get("trial", self.trial.id) != self.trial.id:
            raise InputError(
                f"{self.trial.checkpoint_file} is of the trial {state['trial']}, and was copied to the "
                f"folder of {self.trial.id}; delete that file, and the same command trains it from its begin"
            )
        now = self._training
        changed = {
            key: was for key, was in state.get("training", {}).items() if now.get(key, was) != was
        }
        if changed:
            raise InputError(
                f"{self.trial.checkpoint_file} is of a training with other settings ({changed} there); restore them, "
                "or delete that file, and the same command trains the trial from its begin"
            )
        if state.get("reading_order", 1) != READING_ORDER:
            raise InputError(
                f"{self.trial.checkpoint_file} is of a version of Strata that reads rows in another order, so training "
                "can't go on from there; delete that file, and the same command trains the trial from its begin"
            )
        self.cursor = Cursor(**state["cursor"])
        self._spent = Spent(seconds=state["seconds"], waited=state["waited"])
        # Without the curve, which somebody may have deleted, training goes on as well.
        noted = [row for row in self.trial.rows if row["step"] <= self.step]
        self._rows = noted or state.get("newest", [])
        if state.get("unreported"):  # it was saved between two reports
            unreported = state["unreported"]
            self._newest, self._n_rows = StepReport(**unreported["step"]), unreported["n_rows"]
            self._since = Spent(**unreported["since"])
        elif self.step and not self._rows and "newest" not in state:  # of an older version
            raise InputError(
                f"{self.trial.metrics_file} is gone, and fit.safetensors beside it does not say what it held last; "
                "delete that file too, and the same command trains the trial from its begin"
            )

    def _record(self, report: StepReport, rows_per_second: float, waited: float) -> None:
        self._rows.append(
            {
                **asdict(report),
                "timestamp_ms": int(time.time() * 1000),
                "tokens_per_second": round(rows_per_second, 1),
                "data_wait_fraction": round(waited, 4),
            }
        )
        if self._writes:
            lines = [f"{json.dumps(row)}\n".encode() for row in self._rows]
            write_file(self.trial.metrics_file, lines)
