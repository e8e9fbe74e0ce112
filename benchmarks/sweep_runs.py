"""Runs of `strata sweep` for the benchmarks of the sweep, on the embedded model and corpus."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.worker import ROOT
from orchestrator import config_file
from orchestrator.run_directory import read_json

STORES = ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr")


@dataclass(frozen=True)
class Sweep:
    """A run directory with a configuration beside it."""

    config: Path

    @classmethod
    def of(cls, folder: Path, changes: Mapping[str, Any]) -> "Sweep":
        """A run of the demo's configuration; sections in `changes` add to its own."""
        data = yaml.safe_load((ROOT / "examples/demo.yaml").read_text())
        for section, settings in changes.items():
            data[section] = {**data.get(section, {}), **settings}
        data["model"]["name"] = str(ROOT / "examples/tiny_lm/model")
        data["run_dir"] = str(folder / "run")
        folder.mkdir(parents=True)
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(data))
        return cls(config)

    @property
    def run_dir(self) -> Path:
        """Where it works."""
        return self.config.parent / "run"

    def with_stores_of(self, other: Path) -> "Sweep":
        """It, come as far as its training store: a copy of another run's, of the same settings up to there."""
        for name in STORES:
            shutil.copytree(other / name, self.run_dir / name)
        shutil.copy(other / "groups.json", self.run_dir)
        resolved = config_file.dump(config_file.load(self.config))
        (self.run_dir / "config.yaml").write_text(resolved)
        return self

    def do(self, verb: str) -> float:
        """Give the command; wall-clock seconds until it ended.

        Raises:
            subprocess.CalledProcessError: If it failed; it has said why.
        """
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "orchestrator", verb, str(self.config)], cwd=ROOT, check=True
        )
        return time.perf_counter() - start

    @property
    def results(self) -> list[dict[str, Any]]:
        """What every trial came to, by name."""
        files = sorted(self.run_dir.glob("trials/*/result.json"))
        return [read_json(file) for file in files]
