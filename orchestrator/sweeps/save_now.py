"""What an interrupted sweep does before it ends: has the trials under way write their checkpoints."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from actors.trial import Trial

PATIENCE_SECONDS = 10.0
"""Batch systems and Kubernetes wait 30 before they kill."""


def save_now(trials: Sequence[Trial], actors: Sequence[Any]) -> None:
    """Ask trials for their checkpoints, and wait until they are written, but not for ever.

    Args:
        trials: Those under way. Who is in the midst of a call finds a file in the trial's folder.
        actors: Of Ray, `TuneTrial`s that train them. Who waits for a call gets this one.
    """
    asked = [trial for trial in trials if trial.folder.is_dir()]
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        for actor in actors:
            actor.save_checkpoint.remote("")
        with suppress(OSError):  # the disk is full: perhaps why it is interrupted
            for trial in asked:
                trial.save_request.touch()
        while any(map(_is_open, asked)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for trial in asked:
            trial.save_request.unlink(missing_ok=True)


def _is_open(trial: Trial) -> bool:
    return trial.save_request.exists() and not trial.result_file.exists()
