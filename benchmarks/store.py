"""The activation store and the harvest, measured: `make bench-store`.

`ratio` is how many times faster ours is, above 1 better for ours.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import harvest, mixing, reading, writing
from benchmarks.read_data import Size as ReadSize
from benchmarks.rows import Row, show, write
from benchmarks.worker import ROOT


def main() -> int:
    """Measure, print, write; 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pairs",
        type=int,
        default=5,
        help="timed turns of each contender; twice as many of a harvest, and three times of writing",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of the model in the harvest's rows")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["harvest", "writing", "reading", "mixing"],
        help="by default all",
    )
    parser.add_argument("--shards", type=int, default=2, help="of one harvest, of 16 sequences")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/store.json")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    sizes = [harvest.Size(n_shards=options.shards)] if on_cpu else harvest.GPU_SIZES
    parts: dict[str, Callable[[], list[Row]]] = {
        "harvest": lambda: [
            row
            for size in sizes
            for row in harvest.measure(size, 2 * options.pairs, options.threads, options.device)
        ],
        "writing": lambda: writing.measure(writing.Size(), 3 * options.pairs),
        "mixing": mixing.measure,
        "reading": lambda: reading.measure(ReadSize(), options.pairs),
    }
    rows: list[Row] = []
    for name in options.only or parts:
        print(name, flush=True)
        rows += parts[name]()
    show(rows)
    about = {"threads": options.threads, "pairs": options.pairs, "device": options.device}
    write(options.out, rows, **about)
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
