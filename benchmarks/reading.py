"""Reading for training: against a raw sequential read of the same files, and against the peers' buffers."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.one_layer import filled, one_layer_spec
from benchmarks.our_reads import reader
from benchmarks.read_data import Size
from benchmarks.rows import Row
from benchmarks.worker import Worker
from storage.batches import Cursor, ShuffledBatches

CHUNK_BYTES = 8 * 2**20
CONTEXTS = {"SAELens": 64, "dictionary_learning": 256}
"""In the buffer of each. Ours mixes 64 chunks of rows from all over the text."""


def measure(size: Size, rounds: int) -> list[Row]:
    """Wall seconds against a raw read, warm and cold; CPU-seconds against the peers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        _fill(folder, size)
        return [*_against_raw(folder, size, rounds), *_against_peers(folder, size, rounds)]


def _against_raw(folder: Path, size: Size, rounds: int) -> list[Row]:
    torch.set_num_threads(1)
    files = sorted(folder.glob("layers/0/x/c/*/0"))
    rows = []
    for form in ("warm", "cold"):
        times: list[tuple[float, float]] = []
        warm = reader(folder, size.batch_rows)
        _epoch(warm, 0)  # checks every chunk, once
        for turn in range(1, 1 + rounds):
            # Cold, no page of the files may be mapped: a reader of its own, which checks all again.
            batches = warm if form == "warm" else reader(folder, size.batch_rows)
            if form == "cold":
                del warm
                warm = batches
                _evict(files)
            ours = _epoch(batches, turn)
            if form == "cold":
                warm = batches = reader(folder, size.batch_rows)
                _evict(files)
            raw = _raw(files)
            print(f"  {turn}/{rounds} {form} {ours:6.3f} s, raw {raw:6.3f} s", flush=True)
            times.append((ours, raw))
        rows.append(
            Row(
                name=f"shuffled epoch, {size.n_bytes / 2**30:.2f} GiB of float16, {form}, wall",
                against="raw sequential read",
                ratio=statistics.median(raw / ours for ours, raw in times),
                at_least=0.8,
                aim=None,
                seconds=[statistics.median(column) for column in zip(*times, strict=True)],
                versions={name: version(name) for name in ("torch", "zarr", "numpy")},
            )
        )
    return rows


def _against_peers(folder: Path, size: Size, rounds: int) -> list[Row]:
    peers.ensure()
    common = {**asdict(size), "store": str(folder)}
    rows = []
    for peer, contexts in CONTEXTS.items():
        ours = Worker(Path(sys.executable), "benchmarks.our_reads", common, 1)
        arguments = {**common, "contender": peer, "contexts": contexts}
        theirs = Worker(peers.PYTHON, "benchmarks.peer_reads", arguments, 1, peers.VARIABLES)
        answers = [(ours.step(), theirs.step()) for _ in range(1 + rounds)][1:]
        for worker in (ours, theirs):
            worker.close()
        sides = list(zip(*answers, strict=True))
        medians = [statistics.median(a["seconds"] for a in side) for side in sides]
        mixed = [statistics.median(a["distinct"] for a in side) for side in sides]
        versions = {**ours.versions, **theirs.versions}
        print(f"  {peer}: sequences in a batch {mixed[0]:.0f}, theirs {mixed[1]:.0f}", flush=True)
        rows += [
            Row(
                name=f"shuffled epoch of {size.n_bytes / 2**30:.2f} GiB, CPU-seconds",
                against=f"{peer} buffer",
                ratio=medians[1] / medians[0],
                at_least=20,
                aim=None,
                seconds=medians,
                versions=versions,
            ),
            Row(
                name="distinct sequences in a batch",
                against=f"{peer} buffer",
                ratio=mixed[0] / mixed[1],
                at_least=1,
                aim=None,
                seconds=mixed,
                versions=versions,
                unit="",
            ),
        ]
    return rows


def _epoch(batches: ShuffledBatches, number: int) -> float:
    """Seconds of an epoch."""
    start = time.perf_counter()
    for _ in islice(batches.batches(Cursor(epoch=number)), batches.batches_per_epoch):
        pass
    return time.perf_counter() - start


def _raw(files: Iterable[Path]) -> float:
    """Seconds of a sequential read of the files into a buffer."""
    buffer = bytearray(CHUNK_BYTES)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def _evict(files: Iterable[Path]) -> None:
    """Have the system forget the files' pages, those that nobody has mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(folder: Path, size: Size) -> None:
    chunk_sequences = CHUNK_BYTES // (2 * size.context * size.d_model)
    spec = one_layer_spec(size.d_model, size.n_sequences, size.context, chunk_sequences, 16)
    generator = torch.Generator().manual_seed(0)

    def rows_of(shard: int) -> Tensor:
        x = size.rows(torch.from_numpy(spec.sequences_of(shard)), generator)
        return x[spec.permutation_of(shard)]

    filled(folder, spec, rows_of)
