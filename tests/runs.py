"""Small real runs for tests: the embedded model, real Ray, real MLflow on SQLite."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from orchestrator import config_file

ROOT = Path(__file__).resolve().parents[1]

SMALL_RUN = {
    "name": "test",
    "model": {"name": str(ROOT / "examples" / "tiny_lm" / "model")},
    "corpus": {"source": "stdlib"},
    "harvest": {
        "tokens": 60_000,
        "pilot_tokens": 6_000,
        "validation_tokens": 3_000,
        "chunk_mib": 0.5,
        "shard_mib": 1,
        "batch_tokens": 4096,
    },
    "group": {"n_groups": 2},
    "sweep": {
        "d_sae": 256,
        "k": [8],
        "encoders": ["dense", {"h": 16, "m": 4, "n": 4}],
        "selection": ["batch_topk"],
        "tokens": 120_000,
        "checkpoint_seconds": 1,
    },
    "train": {"batch_tokens": 512, "lr": 1e-3},
    "evaluate": {"sequences": 8},
    "compute": {"cpus": 2},
}


def write_config(folder: Path, **changes: object) -> Path:
    """SMALL_RUN as a file, its run directory beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(
        yaml.safe_dump({**SMALL_RUN, "run_dir": str(folder / "runs" / "small"), **changes})
    )
    return file


def harvested(finished: Path, folder: Path, **changes: object) -> Path:
    """A configuration whose run has come as far as its training store: a copy of a finished run's.

    What is changed must come after that store.
    """
    config = write_config(folder, **changes)
    there, run = finished.parent / "runs" / "small", folder / "runs" / "small"
    for part in ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr"):
        shutil.copytree(there / part, run / part)
    for part in ("groups.json", "rows.json"):
        shutil.copy(there / part, run / part)
    (run / "config.yaml").write_text(config_file.dump(config_file.load(config)))
    return config


def start(verb: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The `strata` command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", verb, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def strata(verb: str, *arguments: str | Path, timeout: float = 400) -> tuple[int, str]:
    """Exit status and output of a `strata` command."""
    process = start(verb, *arguments)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def strata_in_terminal(
    verb: str, *arguments: str | Path, width: int, height: int
) -> tuple[int, str]:
    """Exit status and output of a `strata` command in a terminal of this size, colours included."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (height, width))
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", verb, *map(str, arguments)],
        cwd=ROOT,
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(its)
    output = bytearray()
    with suppress(OSError):  # what Linux says when the other end is closed
        while part := os.read(ours, 65536):
            output += part
    os.close(ours)
    return process.wait(), output.decode()


def wait_until(
    process: subprocess.Popen[str], ready: Callable[[], bool], timeout: float = 300
) -> None:
    """Wait for `ready()`; fails if the process ended before."""
    deadline = time.monotonic() + timeout
    while not ready():
        if process.poll() is not None:
            output, _ = process.communicate()
            raise AssertionError(
                f"ended with {process.returncode} before it came so far:\n{output}"
            )
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not ready after {timeout} s:\n{process.communicate()[0]}")
        time.sleep(0.02)


def kill_when(
    process: subprocess.Popen[str], ready: Callable[[], bool], timeout: float = 300
) -> str:
    """Kill a process without warning as soon as `ready()`; fails if it ended before. Its output."""
    wait_until(process, ready, timeout)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    return output
