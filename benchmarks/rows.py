"""A benchmark's result: rows of ratios, as a table and as a file."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table and of the results file."""

    name: str
    against: str
    ratio: float
    at_least: float | None
    aim: float | None
    values: list[float]
    """Medians: ours, theirs. In `unit`, where that is not seconds."""
    versions: dict[str, str]
    unit: str = "s"

    @property
    def passes(self) -> bool:
        """Whether it reaches what was demanded."""
        return self.at_least is None or self.ratio >= self.at_least


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    width = max(len(row.name) for row in rows)
    print(f"\n{'ours':{width}} {'against':24} {'ours':>9} {'theirs':>9} {'ratio':>6} least   aim")
    for row in rows:
        figures = [
            f"{v / 2**20:6.0f} MB" if row.unit == "bytes" else f"{v:7.3f} {row.unit:2}"
            for v in row.values
        ]
        bounds = " ".join("    -" if v is None else f"{v:5.2f}" for v in (row.at_least, row.aim))
        verdict = "" if row.passes else "  BELOW"
        print(
            f"{row.name:{width}} {row.against:24} {figures[0]} {figures[1]} {row.ratio:6.2f} "
            f"{bounds}{verdict}"
        )


def write(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """Write the results file: the rows, and what else is to be known of the measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": platform.machine(), **about, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(data, indent=2) + "\n")
