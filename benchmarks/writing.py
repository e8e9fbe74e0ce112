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
    batch_sequences: int = 16
    """That the model gives at a time: the default of `harvest.batch_tokens`, 8192."""


def measure(size: Size, rounds: int) -> list[Row]:
    """A shard in float16, its columns and its record included, against two things that SAELens does.

    From what the model gives to the file, which is what our side does too; and the saving alone.
    """
    peers.ensure()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = size.sequences_per_chunk * size.chunks, size.context, size.d_model
        x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
        np.save(folder / "x.npy", x)
        arguments = {
            "data": str(folder / "x.npy"),
            "turns": 1 + rounds,
            "sequences_per_chunk": size.sequences_per_chunk,
            "batch_sequences": size.batch_sequences,
        }
        ours = Worker(
            Path(sys.executable), "benchmarks.our_writes", {**arguments, "folder": name}, 1
        )
        theirs = {
            what: Worker(
                peers.PYTHON,
                "benchmarks.peer_writes",
                {**arguments, "joined": joined, "folder": str(folder / what)},
                1,
                peers.VARIABLES,
            )
            for what, joined in (("cached activations", False), ("saving alone", True))
        }
        times: list[list[float]] = []
        for turn in range(1 + rounds):
            seconds = [worker.step()["seconds"] for worker in (ours, *theirs.values())]
            print(f"  {turn}/{rounds} write", *(f"{s:7.3f} s" for s in seconds))
            if turn:
                times.append(seconds)
        for worker in (ours, *theirs.values()):
            worker.close()
    our_median, *their_medians = (statistics.median(column) for column in zip(*times, strict=True))
    return [
        Row(
            name=f"write {x.nbytes / 2**20:.0f} MiB of float16, d_model {size.d_model}, CPU-seconds",
            against=f"SAELens, {what}",
            ratio=median / our_median,
            at_least=8 if what == "cached activations" else None,
            aim=20 if what == "cached activations" else None,
            values=[our_median, median],
            versions={**ours.versions, **worker.versions},
        )
        for (what, worker), median in zip(theirs.items(), their_medians, strict=True)
    ]
