"""How far a run is, in a small file that others may read: `progress.json` of a run directory."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.progress import StageProgress
from orchestrator.redaction import redacted
from orchestrator.run_directory import RunDirectory, write_json

WRITE_EVERY_SECONDS = 1.0


class ProgressFile:
    """Writes down how the stages of one call go on, at most once a second (`Watcher`)."""

    def __init__(self, run: RunDirectory) -> None:
        """Write that the call has begun."""
        self._file = run.progress
        self._data: dict[str, Any] = {
            "version": 1,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began": _now(),
            "stage": None,
            "error": None,
        }
        self._write()

    @classmethod
    @contextmanager
    def kept(cls, run: RunDirectory) -> Iterator["ProgressFile"]:
        """One for the time inside; what ends it is its last line."""
        file = cls(run)
        try:
            yield file
        except KeyboardInterrupt:  # no error: it was asked to end
            raise
        except BaseException as error:
            file._data["error"] = redacted(str(error)) or type(error).__name__
            raise
        finally:
            file._write()

    def moved(self, progress: StageProgress) -> None:
        """Note where a stage is."""
        figures = progress.figures
        self._data["stage"] = {
            "title": progress.title,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "per_second": round(progress.rate, 3),
            "seconds": round(progress.seconds, 3),
            "note": progress.note,
            "megabytes": round(figures.n_bytes / 1e6, 3),
            "queues": figures.queues,
            "trials": figures.trials,
            "limit": figures.limit,
        }
        if time.monotonic() - self._written >= WRITE_EVERY_SECONDS or not progress.done:
            self._write()

    def ended(self, progress: StageProgress) -> None:
        """Note where it ended."""
        self.moved(progress)
        self._write()

    def _write(self) -> None:
        self._data["updated"] = _now()
        write_json(self._file, self._data)
        self._written = time.monotonic()


def _now() -> float:
    return round(time.time(), 3)
