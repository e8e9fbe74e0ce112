"""CPU-seconds of writing a shard of activations, ours against SAELens's cached activations."""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.rows import Row
from benchmarks.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a shard: by default 128 MiB of 16 chunks."""

    d_model: int = 768
    context: int = 512
    sequences_per_chunk: int = 11
    chunks: int = 16


def measure(size: Size, rounds: int) -> list[Row]:
    """One row: a shard in float16, its columns and its record included."""
    peers.ensure()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = size.sequences_per_chunk * size.chunks, size.context, size.d_model
        x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
        np.save(folder / "x.npy", x)
        arguments = {
            "data": str(folder / "x.npy"),
            "folder": name,
            "turns": 1 + rounds,
            "sequences_per_chunk": size.sequences_per_chunk,
        }
        ours = Worker(Path(sys.executable), "benchmarks.our_writes", arguments, 1)
        theirs = Worker(peers.PYTHON, "benchmarks.peer_writes", arguments, 1, peers.VARIABLES)
        times: list[tuple[float, float]] = []
        for turn in range(1 + rounds):
            seconds = ours.step()["seconds"], theirs.step()["seconds"]
            print(f"  {turn}/{rounds} write {seconds[0]:7.3f} s, SAELens {seconds[1]:7.3f} s")
            if turn:
                times.append(seconds)
        for worker in (ours, theirs):
            worker.close()
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return [
        Row(
            name=f"write {x.nbytes / 2**20:.0f} MiB of float16, d_model {size.d_model}, CPU-seconds",
            against="SAELens cached activations",
            ratio=medians[1] / medians[0],
            at_least=8,
            aim=20,
            values=medians,
            versions={**ours.versions, **theirs.versions},
        )
    ]
