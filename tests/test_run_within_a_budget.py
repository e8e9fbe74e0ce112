"""A whole run within a disk budget, killed on the way, against one that keeps its whole store."""

import json
import shutil
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.runs import SMALL_RUN, kill_when, start, strata, wait_until, write_config

pytestmark = [pytest.mark.ray, pytest.mark.crash]
SWEEP = {**SMALL_RUN["sweep"], "window_chunks": 2}
BUDGET = 14_000_000
"""Of a training store of 33 MB: 8 segments, of which two and the columns need 10 MB."""


@pytest.mark.timeout(1800)
def test_a_run_within_a_budget_gives_the_bits_of_one_that_keeps_its_store(tmp_path: Path):
    whole = write_config(tmp_path / "whole", sweep=SWEEP)
    status, output = strata("run", whole)
    assert status == 0, output
    assert size(tmp_path / "whole/runs/small/train.zarr") > 2 * BUDGET

    harvest = {**SMALL_RUN["harvest"], "disk_budget": "14MB"}
    config = write_config(tmp_path / "bounded", sweep=SWEEP, harvest=harvest)
    run = tmp_path / "bounded/runs/small"
    sizes: list[int] = []
    over = Event()

    def watch() -> None:
        while not over.wait(0.02):
            sizes.append(size(run / "train.zarr"))

    watcher = Thread(target=watch)
    watcher.start()
    try:
        kill_when(start("run", config), lambda: bool(list(run.glob("trials/*/result.json"))))
        time.sleep(1)
        status, output = strata("run", config, timeout=900)
    finally:
        over.set()
        watcher.join()
    assert status == 0, output
    assert "shards at a time (harvest.disk_budget)" in output
    assert max(sizes) <= BUDGET
    for name in ("groups", "amad"):
        broken, unbroken = (
            json.loads((tmp_path / kind / "runs/small/summary.json").read_text())[name]
            for kind in ("bounded", "whole")
        )
        assert broken == unbroken
    status, output = strata("verify", config)
    assert status == 0, output
    weights = sorted((tmp_path / "whole/runs/small").glob("trials/*/sae/sae.safetensors"))
    assert len(weights) == 4
    for file in weights:
        other = run / file.relative_to(tmp_path / "whole/runs/small")
        assert file.read_bytes() == other.read_bytes(), file


@pytest.mark.timeout(600)
def test_a_harvest_that_fails_where_nobody_can_be_told_ends_the_run(tmp_path: Path):
    """As on a full disk: what it would say can't be written, and trials wait for shards."""
    harvest = {**SMALL_RUN["harvest"], "disk_budget": "14MB"}
    config = write_config(tmp_path, sweep={**SWEEP, "tokens": 400_000}, harvest=harvest)
    run, folder = start("run", config), tmp_path / "runs/small"
    wait_until(run, lambda: bool(list(folder.glob("ring/g*.json"))))
    (folder / "ring/failed").mkdir()
    for part in folder.glob("tokens.zarr/train/*/c/*"):
        shutil.rmtree(part, ignore_errors=True)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 2, output
    assert "tokens.zarr" in output.splitlines()[-1]
    assert "Traceback" not in output


def size(folder: Path) -> int:
    """Bytes of all files, as far as they are there when they are looked at."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
