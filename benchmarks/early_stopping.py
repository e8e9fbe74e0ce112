"""What early stopping saves and what it misses: one sweep as a full grid, and again under ASHA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from benchmarks.sweep_runs import Sweep
from orchestrator.labels import encoder_label
from orchestrator.sweeps.winners import Result, winners

AT_MOST_STEPS = 0.45
"""Of the full grid's."""

AT_MOST_FVU = 1.02
"""Of the full grid's best, in each group and k."""

CORES = 2

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the sweep: what differs from the demo's configuration."""

    stores: Settings = field(default_factory=lambda: {"group": {"n_groups": 3}})
    """Of the sections up to the training store."""

    sweep: Settings = field(
        default_factory=lambda: {
            "sweep": {
                "k": [8, 16, 32],
                "encoders": [{"kron": {"m": [2, 4], "n": [4, 8]}}],
            }
        }
    )


def measure(size: Size, folder: Path) -> list[Row]:
    """Trial-steps and winners of both sweeps, which read the same stores."""
    base = Sweep.of(folder / "stores", size.stores)
    base.do("harvest")
    found = []
    for method in ("none", "asha"):
        sections = {**size.stores, **size.sweep, "compute": {"cpus": CORES}}
        stop = {"sweep": {**sections["sweep"], "stop": {"method": method}}}
        sweep = Sweep.of(folder / method, {**sections, **stop}).with_stores_of(base.run_dir)
        sweep.do("sweep")
        found.append(sweep.results)
    return rows(*found)


def rows(grid: Sequence[Result], stopped: Sequence[Result]) -> list[Row]:
    """The rows of two sweeps over the same candidates, the first without early stopping."""
    assert [r["trial"] for r in grid] == [r["trial"] for r in stopped]
    versions = {name: version(name) for name in ("torch", "ray")}
    steps = [
        float(sum(r["tokens"] // r["batch_tokens"] for r in results)) for results in (stopped, grid)
    ]
    made = [
        Row(
            name=f"trial-steps under ASHA, {len(grid)} trials",
            against="full grid",
            ratio=steps[1] / steps[0],
            at_least=1 / AT_MOST_STEPS,
            aim=None,
            values=steps,
            versions=versions,
            unit="",
        )
    ]
    best = winners(grid, "lowest_fvu_per_k")
    for ours, theirs in zip(winners(stopped, "lowest_fvu_per_k"), best, strict=True):
        made.append(
            Row(
                name=f"FVU of the winner, group {ours['group']}, k {ours['k']}: {encoder_label(ours)}",
                against=f"grid: {encoder_label(theirs)}",
                ratio=theirs["fvu"] / ours["fvu"],
                at_least=1 / AT_MOST_FVU,
                aim=1.0,
                values=[ours["fvu"], theirs["fvu"]],
                versions=versions,
                unit="",
            )
        )
    return made
