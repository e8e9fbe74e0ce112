"""The sweep, measured: `make bench-sweep`.

Early stopping against the full grid (trial-steps and winners: the same on a busy machine), and what Ray
Tune, actors and MLflow cost against a plain loop (seconds: on an idle one). `ratio` above 1 is better for
ours.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from benchmarks import early_stopping, sweep_overhead
from benchmarks.rows import Row, show, write
from benchmarks.worker import ROOT

AnySize = TypeVar("AnySize", early_stopping.Size, sweep_overhead.Size)
SMALL_STORES = {
    "harvest": {
        "tokens": 60_000,
        "pilot_tokens": 6_000,
        "validation_tokens": 3_000,
        "chunk_mib": 0.5,
        "shard_mib": 1,
    },
    "group": {"n_groups": 1},
    "train": {"batch_tokens": 512},
}
SMALL_SWEEP = {
    "d_sae": 256,
    "k": [8],
    "encoders": ["dense", {"h": 32, "m": 2, "n": 4}, {"h": 16, "m": 4, "n": 4}],
    "tokens": 40_000,
}


def main() -> int:
    """Measure, print, write; 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["stopping", "overhead"], help="by default both")
    parser.add_argument(
        "--pairs", type=int, default=3, help="turns of the sweep and the plain loop"
    )
    parser.add_argument("--tokens", type=int, help="that each trial is trained on")
    parser.add_argument("--harvest-tokens", type=int, help="in the store that trials read")
    parser.add_argument(
        "--small", action="store_true", help="a size of no meaning, to see that this works"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sweep.json")
    options = parser.parse_args()
    stopping = early_stopping.Size()
    overhead = sweep_overhead.Size(pairs=options.pairs)
    if options.small:
        sections = {"stores": SMALL_STORES, "sweep": {"sweep": SMALL_SWEEP}}
        stopping = early_stopping.Size(**sections)
        overhead = sweep_overhead.Size(**sections, pairs=options.pairs, trial_seconds=0.1)
    given = {
        "stores": {"harvest": {"tokens": options.harvest_tokens}},
        "sweep": {"sweep": {"tokens": options.tokens}},
    }
    stopping, overhead = _with(stopping, given), _with(overhead, given)
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "stopping": lambda folder: early_stopping.measure(stopping, folder),
        "overhead": lambda folder: sweep_overhead.measure(overhead, folder),
    }
    rows: list[Row] = []
    for name in [options.only] if options.only else parts:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows += parts[name](Path(folder))
    show(rows)
    write(options.out, rows, pairs=options.pairs, full_size=not options.small)
    return 0 if all(row.passes for row in rows) else 1


def _with(size: AnySize, given: Mapping[str, Mapping[str, Mapping[str, int | None]]]) -> AnySize:
    """The size, with what was given on the command line in place of its own."""
    changed = {}
    for part, sections in given.items():
        own = {name: dict(settings) for name, settings in getattr(size, part).items()}
        for name, settings in sections.items():
            said = {key: value for key, value in settings.items() if value is not None}
            own[name] = {**own.get(name, {}), **said}
        changed[part] = own
    return replace(size, **changed)


if __name__ == "__main__":
    sys.exit(main())
