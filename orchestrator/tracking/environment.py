"""What a run ran on: versions, code and machine, noted while it ran, for those who read it later."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.run_directory import read_json, write_json
from orchestrator.versions import installed

_PACKAGES = (
    *("strata-sae", "torch", "transformers", "datasets", "tokenizers", "ray", "mlflow"),
    *("zarr", "numpy", "safetensors", "optuna"),
)


def note_environment(file: Path) -> None:
    """Add what is there now to `environment.json`, if the call before was made in another."""
    now = environment()
    calls = read_json(file, list) if file.is_file() else []
    if not calls or {**calls[-1], "since": None} != {**now, "since": None}:
        write_json(file, [*calls, now])


def environment() -> dict[str, Any]:
    """Versions of what computes, the code's revision, and the driver's machine."""
    return {
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := installed(name))},
        "git_revision": git_revision(),
        "system": platform.platform(),
        "processor": _processor(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_revision() -> str | None:
    """Commit of the working directory, with `-dirty` if files differ; None where git knows none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
