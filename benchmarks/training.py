"""Seconds of a training step, ours and the peers': `make bench-training`.

Every contender trains in a process of its own on the same batches with the same threads, as its own
trainer does it; they take turns, step by step, and medians are compared. `ratio` is how many times
faster (or smaller) ours is: above 1 is better for ours.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import floor, peers
from benchmarks.rows import Row, show, write
from benchmarks.worker import ROOT, Worker

OURS = ["TopK dense", "BatchTopK dense", "Kron 4x8 TopK", "Kron 8x16 TopK", "Matryoshka BatchTopK"]
# (ours, against, at least, aim); None: stated, not demanded.
RATIOS: list[tuple[str, str, float | None, float]] = [
    ("TopK dense", "SAELens TopK", 5, 7),
    ("TopK dense", "sparsify TopK", 1.3, 1.7),
    ("TopK dense", "dictionary_learning TopK", 4, 5.5),
    ("BatchTopK dense", "SAELens BatchTopK", 6, 8),
    ("Kron 4x8 TopK", "SAELens TopK", 10, 16),
    ("Kron 4x8 TopK", "sparsify TopK", 2.5, 4),
    ("Kron 8x16 TopK", "SAELens TopK", 16, 25),
    # At most 1.25 times its time.
    ("Matryoshka BatchTopK", "BatchTopK dense", 1 / 1.25, 1 / 1.1),
]
MEMORY_PROCESSES = 3
"""Of which the median is taken: where the heap grows differs from process to process."""

MEMORY_FACTOR = 4
MEMORY = {"at_least": 1 / 1.3, "aim": 1 / 1.1}
FLOOR_AIM = 1 / 1.5


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a step."""

    tokens: int
    d_model: int
    d_sae: int
    k: int = 32

    def __str__(self) -> str:
        return f"{self.tokens} tokens, d_model {self.d_model}, d_sae {self.d_sae}, k {self.k}"


FULL = [
    Size(tokens=4096, d_model=768, d_sae=32768),
    Size(tokens=1024, d_model=768, d_sae=16384),
]


def contenders(size: Size) -> dict[str, dict[str, Any]]:
    """The arguments of every contender's process."""
    base = {"d_sae": size.d_sae, "k": size.k, "selection": "topk"}
    batch = {**base, "selection": "batch_topk"}
    # The Gemma set-up of arXiv 2503.17547.
    prefixes = [size.d_sae * part // 32 for part in (1, 3, 7, 15, 32)]
    return {
        "TopK dense": base,
        "BatchTopK dense": batch,
        "Kron 4x8 TopK": {**base, "kron": [size.d_sae // 32, 4, 8]},
        "Kron 8x16 TopK": {**base, "kron": [size.d_sae // 128, 8, 16]},
        "Matryoshka BatchTopK": {**batch, "prefixes": prefixes},
        "SAELens TopK": {**base, "peer": "sae-lens"},
        "SAELens BatchTopK": {**batch, "peer": "sae-lens"},
        "sparsify TopK": {**base, "peer": "eai-sparsify"},
        "dictionary_learning TopK": {**base, "peer": "dictionary-learning"},
    }


def sparse_activations(size: Size, n_batches: int, seed: int = 0) -> torch.Tensor:
    """Batches of sums of k of 4 * d_model unit directions, and a little noise; norms ~ sqrt(d_model)."""
    generator = torch.Generator().manual_seed(seed)
    n_directions = 4 * size.d_model
    directions = torch.randn(n_directions, size.d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    shape = n_batches * size.tokens, size.k
    # Frequencies fall as in language: the product of two uniforms prefers the first directions.
    uniform = torch.rand(2, *shape, generator=generator).prod(0)
    weights = 0.5 + torch.rand(shape, generator=generator)
    x = torch.nn.functional.embedding_bag(
        (uniform * n_directions).long(), directions, per_sample_weights=weights, mode="sum"
    )
    x *= (size.d_model**0.5) / x.norm(dim=1).mean()
    x += 0.1 * torch.randn(x.shape, generator=generator)
    return x.view(n_batches, size.tokens, size.d_model)


def start(arguments: dict[str, Any], data: Path, threads: int) -> Worker:
    """A contender's process."""
    arguments = {**arguments, "data": str(data)}
    if "peer" in arguments:
        return Worker(peers.PYTHON, "benchmarks.peer_steps", arguments, threads, peers.VARIABLES)
    return Worker(Path(sys.executable), "benchmarks.our_steps", arguments, threads)


def measure(size: Size, rounds: int, threads: int, data: Path) -> list[Row]:
    """All speed rows of one size."""
    wanted = contenders(size)
    workers = {name: start(arguments, data, threads) for name, arguments in wanted.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    rates = floor.rates(threads, size.tokens, size.d_model)
    for turn in range(1 + rounds):
        # There and back, so that no contender always follows the same one.
        for name in list(workers)[:: 1 if turn % 2 else -1]:
            answer = workers[name].step()
            if turn:
                times[name].append(answer["seconds"])
            print(f"  {turn}/{rounds} {name:26} {answer['seconds']:8.3f} s", flush=True)
        # The machine's rates at its best moment: what a step at its best could have had.
        seen = floor.rates(threads, size.tokens, size.d_model)
        rates = {key: max(rate, seen[key]) for key, rate in rates.items()}
    versions = {name: worker.versions for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        Row(
            name=f"{ours}, {size}",
            against=theirs,
            ratio=medians[theirs] / medians[ours],
            at_least=at_least,
            aim=aim,
            values=[medians[ours], medians[theirs]],
            versions={**versions[ours], **versions[theirs]},
        )
        for ours, theirs, at_least, aim in RATIOS
    ]
    print("  machine:", ", ".join(f"{key} {value:.3g}/s" for key, value in rates.items()))
    for name in OURS:
        parts = floor.seconds(rates, size.tokens, size.d_model, wanted[name])
        print(f"  floor of {name}:", ", ".join(f"{k} {v:.3f} s" for k, v in parts.items()))
        rows.append(
            Row(
                name=f"{name}, {size}",
                against="floor",
                ratio=parts["total"] / medians[name],
                at_least=None,
                aim=FLOOR_AIM,
                values=[medians[name], parts["total"]],
                versions=versions[name],
            )
        )
    return rows


def measure_memory(size: Size, threads: int, data: Path) -> list[Row]:
    """Peak memory of a step of Kron at d_sae and at four times that.

    Counted above what the process held before it built anything, weights and optimizer taken off.
    Their gradients have the weights' shapes and are taken off too in the row that is demanded; the
    other row leaves them in.
    """
    peaks: list[dict[str, float]] = []
    versions: dict[str, str] = {}
    larger = replace(size, d_sae=MEMORY_FACTOR * size.d_sae)
    for each in (larger, size):
        found: list[float] = []
        gradients = 0.0
        for _ in range(MEMORY_PROCESSES):
            worker = start(contenders(each)["Kron 4x8 TopK"], data, threads)
            answers = [worker.step() for _ in range(4)][1:]
            worker.close()
            versions = worker.versions
            found += [a["above_start"] - a["held"] for a in answers]
            gradients = answers[0]["gradients"]
        peak = statistics.median(found)
        peaks.append({"with": peak, "without": peak - gradients})
    rows = []
    for key, label, bounds in [
        ("without", "without weights, gradients and optimizer", MEMORY),
        ("with", "without weights and optimizer", {"at_least": None, "aim": None}),
    ]:
        ours, smaller = (max(peak[key], 1.0) for peak in peaks)
        rows.append(
            Row(
                name=f"Kron 4x8 TopK, peak memory {label}, {larger}",
                against=f"d_sae {size.d_sae}",
                ratio=smaller / ours,
                values=[ours, smaller],
                versions=versions,
                unit="bytes",
                **bounds,
            )
        )
    return rows


def main() -> int:
    """Measure, print, write; 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description="Seconds of a training step, ours and the peers'.")
    parser.add_argument("--tokens", type=int, help="of one size to measure, instead of both")
    parser.add_argument("--d-model", type=int)
    parser.add_argument("--d-sae", type=int, help="a multiple of 128")
    parser.add_argument("--k", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training.json")
    options = parser.parse_args()
    given = {
        key: value
        for key in ("tokens", "d_model", "d_sae", "k")
        if (value := getattr(options, key)) is not None
    }
    sizes = [replace(FULL[0], **given)] if given else FULL
    peers.ensure()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(sizes):
            print(f"{size}, {options.threads} threads", flush=True)
            data = Path(folder) / "x.safetensors"
            save_file({"x": sparse_activations(size, n_batches=3)}, data)
            rows += measure(size, options.rounds, options.threads, data)
            if number == 0:
                rows += measure_memory(size, options.threads, data)
    show(rows)
    about = {"threads": options.threads, "rounds": options.rounds, "full_size": not given}
    write(options.out, rows, **about)
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
