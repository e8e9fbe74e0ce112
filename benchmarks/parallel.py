"""One autoencoder over several processes: memory of a rank, bytes exchanged, seconds: `make bench-parallel`.

Ranks are processes on this machine that speak gloo over loopback, each with its share of the threads, so that
seconds say what sharing costs here, not what it brings where every rank has a device of its own.
"""

import argparse
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.our_steps import config
from benchmarks.rows import Row, show, write
from benchmarks.training import Size, sparse_activations
from benchmarks.worker import ROOT, Worker
from sae.parallel.payload import step_payload

HELD_AT_LEAST = 0.99
"""Share of ideal, 1 / ranks, that weights and moments of a rank must come to."""

PAYLOAD_AT_LEAST = 0.999
"""Share of the bytes handed over that the formula accounts for."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one number of ranks: medians over steps and ranks, bytes and seconds."""

    held: float
    peak: float
    payload: float
    seconds: float
    versions: dict[str, str]


def contenders(size: Size) -> dict[str, dict[str, Any]]:
    """Arguments of a dense and a Kronecker autoencoder."""
    base = {"d_sae": size.d_sae, "k": size.k}
    return {
        "TopK dense": {**base, "selection": "topk"},
        "Kron 4x8 BatchTopK": {
            **base,
            "selection": "batch_topk",
            "kron": [size.d_sae // 32, 4, 8],
        },
    }


def measure_ranks(
    arguments: dict[str, Any], ranks: int, rounds: int, threads: int, data: Path
) -> Found:
    """Train for `rounds` steps, after one that counts nothing."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as together:
        each = {**arguments, "data": str(data), "ranks": ranks, "meeting": f"{folder}/meeting"}

        def start(rank: int) -> Worker:
            python = Path(sys.executable)
            return Worker(
                python, "benchmarks.our_ranks", {**each, "rank": rank}, max(1, threads // ranks)
            )

        workers = list(together.map(start, range(ranks)))
        answers = [list(together.map(Worker.step, workers)) for _ in range(1 + rounds)]
        for worker in workers:
            worker.close()
    counted = [answer for answer_of in answers[1:] for answer in answer_of]
    exchanged = (answers[-1][0]["payload"] - answers[0][0]["payload"]) / rounds
    return Found(
        held=statistics.median(a["held"] for a in counted),
        peak=statistics.median(a["above_start"] for a in counted),
        payload=exchanged,
        seconds=statistics.median(a["seconds"] for a in counted),
        versions=workers[0].versions,
    )


def rows_of(name: str, size: Size, ranks: int, one: Found, many: Found, payload: int) -> list[Row]:
    """What sharing does to memory, what it exchanges, and how long a step takes."""
    label = f"{name}, {ranks} ranks"
    figures = [
        ("weights and moments of a rank", f"a whole / {ranks}", one.held / ranks, many.held, HELD_AT_LEAST),
        ("all memory of a rank in a step", f"a whole / {ranks}", one.peak / ranks, many.peak, None),
        ("handed over in a step", "formula", payload, many.payload, PAYLOAD_AT_LEAST),
        ("a step", "one process", one.seconds, many.seconds, None),
    ]  # fmt: skip
    return [
        Row(
            name=f"{label}, {what}, {size}",
            against=against,
            ratio=theirs / ours,
            at_least=at_least,
            aim=None,
            values=[ours, theirs],
            versions=many.versions,
            unit="s" if what == "a step" else "bytes",
        )
        for what, against, theirs, ours, at_least in figures
    ]


def measure(size: Size, rank_counts: list[int], rounds: int, threads: int, data: Path) -> list[Row]:
    """The rows of both kinds, for every number of ranks."""
    rows = []
    for name, arguments in contenders(size).items():
        one = measure_ranks(arguments, 1, rounds, threads, data)
        cfg = config(arguments, size.d_model)
        for ranks in rank_counts:
            many = measure_ranks(arguments, ranks, rounds, threads, data)
            payload = step_payload(cfg, size.tokens, n_dictionary=ranks).total()
            rows += rows_of(name, size, ranks, one, many, payload)
            print(f"  {name}, {ranks} ranks: {many.seconds:.3f} s a step", flush=True)
    return rows


def main() -> int:
    """Run from the command line; returns 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description="Memory, bytes and seconds of sharing.")
    for option, default in (("tokens", 1024), ("d-model", 512), ("d-sae", 32768), ("k", 32)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="beside one process")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/parallel.json")
    given = parser.parse_args()
    size = Size(tokens=given.tokens, d_model=given.d_model, d_sae=given.d_sae, k=given.k)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.safetensors"
        save_file({"x": sparse_activations(size, 2)}, data)
        rows = measure(size, given.ranks, given.rounds, given.threads, data)
    show(rows)
    write(given.out, rows, threads=given.threads, rounds=given.rounds)
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
