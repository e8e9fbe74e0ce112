"""Stand-ins that sleep where a GPU would work; all else of a harvester and a trial is there. Ray's workers import them."""

import json
import math
import os
import time
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from actors.trial import Trial
from orchestrator.sweeps.rank_process import Workplace
from orchestrator.sweeps.tune_trial import TuneTrial, reports
from storage.activations import ActivationStore
from storage.encoding import EncodedRows
from storage.files import write_file


def meet(folder: Path) -> None:
    """Wait until as many processes are here as the file `wanted` says: their start is not what is measured."""
    here, wanted = folder / f"here-{os.getpid()}", int((folder / "wanted").read_text())
    if not here.exists():  # a process comes once, whatever it does afterwards
        here.touch()
    while sum(1 for _ in folder.glob("here-*")) < wanted:
        time.sleep(0.02)


def met(folder: Path) -> float:
    """When as many were there as are wanted, in seconds since 1970."""
    came = sorted(file.stat().st_mtime for file in folder.glob("here-*"))
    return came[int((folder / "wanted").read_text()) - 1]


class SleepingHarvester:
    """Sleeps for a shard, one at a time as a GPU, and writes and commits it beside the next."""

    def __init__(self, store: Path, seconds: float) -> None:
        """Of a store whose rows are all zero."""
        self._store, self._seconds, self._gpu = ActivationStore.open(store), seconds, Lock()

    def begin(self, folder: Path) -> None:
        """Be there, with all libraries."""
        meet(folder)

    def harvest(self, shard: int) -> None:
        """One shard."""
        with self._gpu:
            time.sleep(self._seconds)
        spec = self._store.spec
        sequence, position = spec.rows_of(shard)
        rows = torch.zeros(len(sequence), spec.d_model)
        self._store.write_shard(
            shard,
            {array: EncodedRows.of(spec, array, shard, rows) for array in spec.arrays},
            {
                "sequence": sequence,
                "position": position,
                "token_id": torch.zeros(len(sequence), dtype=torch.uint32).numpy(),
            },
        )


class SleepingBundle:
    """What `TuneTrial` asks of a `Bundle`: one trial, whose metrics and result are written as a trainer does."""

    failures: dict[str, Exception] = {}  # noqa: RUF012 - there are none

    def __init__(self, trial: Trial, seconds: float) -> None:
        """Of a trial that has not begun; `seconds` between two reports."""
        self._trial, self._seconds, self.step, self.is_over = trial, seconds, 0, False
        trial.folder.mkdir(parents=True, exist_ok=True)

    def advance(self, n_steps: int) -> dict[str, dict[str, Any]]:
        """Sleep through the steps."""
        time.sleep(self._seconds)
        self.step += n_steps
        row = {
            "step": self.step,
            "timestamp_ms": time.time_ns() // 10**6,
            "fvu": 0.5,
            "l0": 8.0,
            "dead_fraction": 0.0,
            "loss": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 1e3,
            "data_wait_fraction": 0.0,
        }
        with self._trial.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        report: dict[str, Any] = {self._trial.id: row}
        if self.step >= self._trial.n_steps:
            self.is_over = True
            layers = {str(layer): 0.5 for layer in self._trial.layers}
            result = {**self._trial.settings(), "fvu_per_layer": layers, "stopped_at": None}
            result |= {"fvu": 0.5, "l0": 8.0, "dead_fraction": 0.0, "seconds": 1.0}
            result["data_wait_fraction"] = 0.0
            result["tokens"] = self.step * self._trial.fit.batch_tokens
            write_file(self._trial.result_file, [json.dumps(result).encode()])
            report[self._trial.id] = {**row, "result": result}
        return report

    def pause(self) -> None:
        """Nothing is kept: nobody pauses."""


class SleepingTrial(TuneTrial):
    """A `TuneTrial` of a `SleepingBundle`; how long it sleeps says the file `seconds` beside the trials."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        config: dict[str, Any],
        workplace: Workplace,
        gpus: float,
    ) -> None:
        """Begin when all are there."""
        workplace.storage.check()
        [trial] = config["trials"]
        beside = trial.folder.parent
        self._stride = math.ceil(trial.n_steps / reports(trial.n_steps))
        self._bundle = SleepingBundle(trial, float((beside / "seconds").read_text()))  # pyright: ignore
        self._continues = False
        meet(beside)
