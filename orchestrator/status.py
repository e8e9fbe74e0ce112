"""How a run stands, read from its directory alone: whoever works there is neither asked nor disturbed."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from orchestrator import run_lock
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json

Status = dict[str, Any]
"""See `status`."""


def status(cfg: RunConfig) -> Status:
    """What is known of a run.

    Returns:
        `run_dir`; `state`: `running`, `finished`, `failed` (with `error`) or `interrupted` (may be
        continued); `holder`, which process works there (`pid`, `host`), or None; `stage`, where it is,
        or where the last call ended: `title`, `done`, `total`, `unit`, `per_second`, `seconds_left` (None
        unless it is running), `limit` (what takes most of the cluster's time), `queues`, `note`;
        `updated`, seconds since that was written; `trials` by state; `stage_seconds` spent in each
        stage; `error`, that ended the last call, or None.

    Raises:
        UserError: If no run has begun there, or a file of it is damaged.
    """
    run = RunDirectory.of(cfg)
    if not run.config.is_file():
        raise UserError(
            f"{run.path} holds no run: none has begun there; `strata run CONFIG.yaml` begins one"
        )
    try:
        return _status(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.progress} or stage_seconds.json beside it is not what this version of Strata writes ({error!r}); "
            "they say how far the run is and nothing else: delete them, or ask with the version that wrote them"
        ) from None


def _status(run: RunDirectory) -> Status:
    holder = run_lock.holder(run.path)
    told = read_json(run.progress) if run.progress.is_file() else {}
    stage, error = told.get("stage"), told.get("error")
    if holder and holder["pid"] != told.get("pid"):
        stage = error = None  # of the call before
    if holder:
        state = "running"
    elif run.summary.is_file():
        state = "finished"
    else:
        state = "failed" if error else "interrupted"
    return {
        "run_dir": str(run.path),
        "state": state,
        "holder": holder,
        "stage": stage and {**stage, "seconds_left": _seconds_left(stage) if holder else None},
        "updated": round(max(0.0, time.time() - told["updated"]), 1) if told else None,
        "trials": _trials(run, stage, bool(holder)),
        "stage_seconds": run.stage_seconds(),
        "error": error,
    }


def _seconds_left(stage: dict[str, Any]) -> float | None:
    if not stage["done"] or not stage["per_second"]:
        return None
    return round((stage["total"] - stage["done"]) / stage["per_second"], 1)


def _trials(run: RunDirectory, stage: dict[str, Any] | None, at_work: bool) -> dict[str, int]:
    """By state; while no sweep is at work, as their folders say."""
    folders: list[Path] = [path for path in run.trials.glob("*") if path.is_dir()]
    found = Counter(_state(folder) for folder in folders)
    if at_work and stage and stage["title"] == "sweep":
        there: dict[str, int] = stage["trials"]
        ended = Counter({key: n for key, n in found.items() if key in ("done", "given up")})
        found = Counter(there) | ended
    return {state: n for state, n in sorted(found.items()) if n}


def _state(folder: Path) -> str:
    if not (folder / "result.json").is_file():
        return "begun"
    return "given up" if (folder / "stopped.json").is_file() else "done"
