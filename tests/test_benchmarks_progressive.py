"""That the benchmark of progressive coding compares what it says; the whole of it at a size of no meaning."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.progressive import D_SAE, PREFIXES, contests, rows

ROOT = Path(__file__).resolve().parents[1]


def report(fvu: dict[str, float], r_squared: float, exponential: float) -> dict[str, Any]:
    def points(loss: float) -> list[dict[str, float]]:
        return [
            {"size": size, "fvu": loss * D_SAE / size, "l0": 8.0, "rsa": 0.5, "ce": 3 + loss}
            | {"ce_recovered": 0.9}
            for size in PREFIXES
        ]

    law = {"r_squared": r_squared, "exponential_r_squared": exponential}
    return {
        "ce_clean": 3.0,
        "curves": {order: points(loss) for order, loss in fvu.items()},
        "power_laws": dict.fromkeys(("energy", "frequency", "spectrum"), law),
    }


def test_each_row_is_the_contest_that_speaks_most_against_the_finding():
    def trial(k: int, prefixes: list[int]) -> dict[str, Any]:
        return {"group": 0, "k": k, "prefixes": prefixes}

    nested = list(PREFIXES)
    results = [trial(16, nested), trial(16, []), trial(8, []), trial(8, nested)]
    reports = [
        [report({"energy": 0.4, "nested": 0.3}, 0.1, 0.1)],
        [report({"energy": 0.2, "random": 0.8}, 0.9, 0.6)],
        [report({"energy": 0.3, "random": 0.6}, 0.5, 1.0)],
        [report({"energy": 0.1, "nested": 0.1}, 0.1, 0.1)],
    ]
    made = rows(contests(results, reports))
    n_inner = len(PREFIXES) - 1
    assert len(made) == 6 * n_inner + 1 + 3
    by_name = {row.name: row for row in made}
    sort = by_name["FVU, 512 latents pruned by E[act^2] (group 0, k 8)"]
    assert (sort.ratio, sort.passes) == (pytest.approx(2), True)
    assert sort.values == pytest.approx([0.6, 1.2])
    nest = by_name["CE lost, 64 latents of a Matryoshka (group 0, k 16)"]
    assert (nest.ratio, nest.passes) == (pytest.approx(0.2 / 0.3), False)
    assert all(row.passes for row in made if row.name.startswith("1 - RSA"))
    price = by_name[f"FVU, {D_SAE} latents of a Matryoshka (group 0, k 16)"]
    assert (price.at_least, price.ratio) == (None, pytest.approx(0.2 / 0.3))
    law = by_name["r^2 of a power law of rank: energy (group 0, k 8)"]
    assert (law.values, law.at_least) == ([0.5, 1.0], None)


@pytest.mark.crash
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_small_form_runs(tmp_path: Path):
    out = tmp_path / "progressive.json"
    command = [sys.executable, "-m", "benchmarks.progressive", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr
    found = json.loads(out.read_text())
    assert not found["full_size"]
    assert [contest["name"] for contest in found["contests"]] == ["group 0, k 8"]
    sorted_ = [row for row in found["rows"] if row["name"].startswith("FVU, 512 latents pruned")]
    assert sorted_[0]["ratio"] > 1
