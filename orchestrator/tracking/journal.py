"""What MLflow is to know of a run as a whole, kept in the run directory so that it can be told again."""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.run_directory import read_json, write_json


class Journal:
    """`mlflow.json` of a run directory.

    A figure keeps the time at which it was first noted, and MLflow takes the same figure of the
    same time only once: telling everything again changes nothing.
    """

    def __init__(self, file: Path) -> None:
        """Open the journal, or begin it with a key that no other run has.

        Raises:
            UserError: If it is damaged.
        """
        self._file = file
        if file.is_file():
            self._data = read_json(file)
        else:
            self._data = {"key": uuid.uuid4().hex, "stages": {}, "metrics": {}}
            write_json(file, self._data)

    def settle(self) -> None:
        """Note where the run lies.

        One that was moved keeps its key; a copy, beside which the first is still there, gets one of its own.
        """
        here, before = str(self._file.parent), self._data.get("run_dir")
        if before == here:
            return
        first, key = Path(before or here, self._file.name), self.key
        self._data["run_dir"] = here
        if before and _key_of(first) == key and not first.samefile(self._file):
            self._data["key"] = uuid.uuid4().hex
            write_json(self._file, self._data)
            if _key_of(first) != key:  # the same folder, mounted twice
                self._data["key"] = key
        write_json(self._file, self._data)

    @property
    def key(self) -> str:
        """By which the run is found in MLflow, whatever its directory is called."""
        return self._data["key"]

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Per finished stage: `params`, `metrics` and `timestamp_ms`."""
        return self._data["stages"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of one figure each, of the whole run: `step`, `timestamp_ms` and the figure."""
        return [
            {"step": 0, "timestamp_ms": taken, name: value}
            for name, (value, taken) in self._data["metrics"].items()
        ]

    def metric(self, name: str) -> float:
        """A figure of the whole run as it was noted last, 0 if it never was."""
        return self._data["metrics"].get(name, [0.0])[0]

    def note_stage(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> dict[str, Any]:
        """Keep what a stage came to; returns its entry, the one that is there if its figures are these."""
        if name not in self.stages or self.stages[name]["metrics"] != metrics:
            self.stages[name] = {
                "params": dict(params),
                "metrics": dict(metrics),
                "timestamp_ms": now_ms(),
            }
            write_json(self._file, self._data)
        return self.stages[name]

    def note_metrics(self, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
        """Keep figures of the whole run; returns their rows."""
        there = self._data["metrics"]
        new = {
            name: value for name, value in metrics.items() if there.get(name, [None])[0] != value
        }
        if new:
            there.update({name: [value, now_ms()] for name, value in new.items()})
            write_json(self._file, self._data)
        return [row for row in self.metrics if row.keys() & metrics.keys()]


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)


def _key_of(file: Path) -> str | None:
    """What another journal says; None if there is none that can be read."""
    try:
        return read_json(file).get("key")
    except (OSError, UserError):
        return None
