"""How a run stands, read from its directory alone: whoever works there is neither asked nor disturbed."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from orchestrator import run_lock
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json

Status = dict[str, Any]
"""See `status`."""


Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What `progress.json` says of a stage, and is used here."""

    title: str
    done: int
    total: int
    unit: str
    per_second: Number
    note: str
    queues: dict[str, int]
    trials: dict[str, int]
    limit: str
    megabytes: Number


@dataclass(frozen=True, kw_only=True)
class _Told:
    """The same of a call."""

    pid: int
    updated: Number
    stage: _Stage | None
    error: str | None


def status(cfg: RunConfig) -> Status:
    """What is known of a run.

    Returns:
        `run_dir`; `state`: `running`, `finished`, `failed` (with `error`) or `interrupted` (may be
        continued); `holder`, which process works there (`pid`, `host`), or None; `stage`, where it is,
        or where the last call ended: `title`, `done`, `total`, `unit`, `per_second`, `megabytes` (written to stores), `seconds_left` (None
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
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{run.progress} is not what this version of Strata writes ({where}: {fault['msg']}); it says how far "
            "the run is and nothing else: delete it, or ask with the version that wrote it"
        ) from None


def _status(run: RunDirectory) -> Status:
    holder = run_lock.holder(run.path)
    told = _told(run.progress)
    stage, error = (told.stage, told.error) if told else (None, None)
    if told and holder and holder["pid"] != told.pid:
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
        "stage": stage
        and {**asdict(stage), "seconds_left": _seconds_left(stage) if holder else None},
        "updated": round(max(0.0, time.time() - told.updated), 1) if told else None,
        "trials": _trials(run, stage, bool(holder)),
        "stage_seconds": run.stage_seconds(),
        "error": error,
    }


def _told(file: Path) -> _Told | None:
    return TypeAdapter(_Told).validate_python(read_json(file)) if file.is_file() else None


def _seconds_left(stage: _Stage) -> float | None:
    if not stage.done or not stage.per_second:
        return None
    return round((stage.total - stage.done) / stage.per_second, 1)


def _trials(run: RunDirectory, stage: _Stage | None, at_work: bool) -> dict[str, int]:
    """By state; while no sweep is at work, as their folders say."""
    folders: list[Path] = [path for path in run.trials.glob("*") if path.is_dir()]
    found = Counter(_state(folder) for folder in folders)
    if at_work and stage and stage.title == "sweep":
        ended = Counter({key: n for key, n in found.items() if key in ("done", "given up")})
        found = Counter(stage.trials) | ended
    return {state: n for state, n in sorted(found.items()) if n}


def _state(folder: Path) -> str:
    if not (folder / "result.json").is_file():
        return "begun"
    return "given up" if (folder / "stopped.json").is_file() else "done"
