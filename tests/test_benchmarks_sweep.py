"""That the benchmark of the sweep measures what it says; the whole of it at a size of no meaning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.early_stopping import rows

ROOT = Path(__file__).resolve().parents[1]


def result(trial: str, k: int, fvu: float, tokens: int, whole: int) -> dict[str, Any]:
    return {
        "trial": trial,
        "group": 0,
        "k": k,
        "fvu": fvu,
        "n_parameters": 1,
        "encoder": "dense",
        "batch_tokens": 10,
        "tokens": tokens,
        "stopped_at": None if tokens == whole else tokens // 10,
    }


def test_steps_are_summed_and_winners_compared_k_by_k():
    grid = [
        result(n, k, fvu, 100, 100) for n, k, fvu in (("a", 8, 0.3), ("b", 8, 0.2), ("c", 4, 0.4))
    ]
    stopped = [result("a", 8, 0.3, 100, 100), result("b", 8, 0.5, 20, 100), grid[2]]
    steps, narrow, wide = rows(grid, stopped)
    assert (steps.values, steps.passes) == ([22.0, 30.0], False)
    assert (narrow.ratio, narrow.passes) == (1.0, True)
    assert (wide.values, wide.passes) == ([0.3, 0.2], False)
    assert "k 8" in wide.name


@pytest.mark.crash
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_small_form_of_both_parts_runs(tmp_path: Path):
    out = tmp_path / "sweep.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.sweep",
        "--small",
        "--pairs",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr
    found = json.loads(out.read_text())
    assert not found["full_size"]
    against = [row["against"] for row in found["rows"]]
    assert against[0] == "full grid"
    assert against[2:] == ["plain loop", "plain loop", "what is asked", "1 % of training"]
    assert all(min(row["values"]) > 0 for row in found["rows"])
    assert found["rows"][0]["ratio"] > 1
