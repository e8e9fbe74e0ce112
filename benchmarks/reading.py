"""Reading for training: against a raw sequential read of the same files, and against the peers' buffers.

A raw read puts the files into memory one after the other, in their own order, as our reader puts their
rows there in batches. Stated beside it: one that reads all of it over the same 8 MiB and keeps nothing.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
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
CONTEXTS = {"SAELens": 640, "dictionary_learning": 1408}
"""In the buffer of each, which mixes no better than ours with them. dictionary_learning's is as large as the data;
SAELens's has its default. Ours mixes 64 chunks of rows from all over the text."""

RAW_STORES = 4
"""Times the peers' rows: so many that the first window, which nothing is served beside, is a small part."""

FORMS = {"raw sequential read": 0.8, "the same, nothing kept": None}


def measure(size: Size, rounds: int) -> list[Row]:
    """Wall seconds against a raw read, warm and cold; CPU-seconds against the peers."""
    rows: list[Row] = []
    large = replace(size, n_sequences=RAW_STORES * size.n_sequences)
    for measured, of in ((_against_raw, large), (_against_peers, size)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "store"
            _fill(folder, of)
            rows += measured(folder, of, rounds)
    return rows


def _against_raw(folder: Path, size: Size, rounds: int) -> list[Row]:
    torch.set_num_threads(1)
    files = sorted(folder.glob("layers/0/x/c/*/0"))
    rows = []
    for form in ("warm", "cold"):
        times: list[list[float]] = []
        warm = reader(folder, size.batch_rows)
        _epoch(warm, 0)  # checks every chunk, once
        for turn in range(1, 1 + rounds):
            seconds: list[float] = []
            for read in (None, _read, _read_over):
                if (
                    form == "cold"
                ):  # no page may be mapped: a reader of its own, which checks all again
                    warm = reader(folder, size.batch_rows)
                    _evict(files)
                seconds.append(read(files) if read else _epoch(warm, turn))
            print(f"  {turn}/{rounds} {form}", *(f"{s:6.3f} s" for s in seconds), flush=True)
            times.append(seconds)
        columns = list(zip(*times, strict=True))
        rows += [
            Row(
                name=f"shuffled epoch, {size.n_bytes / 2**30:.2f} GiB of float16, {form}, wall",
                against=against,
                ratio=statistics.median(
                    raw / ours for ours, raw in zip(columns[0], raws, strict=True)
                ),
                at_least=at_least,
                aim=None,
                values=[statistics.median(columns[0]), statistics.median(raws)],
                versions={name: version(name) for name in ("torch", "zarr", "numpy")},
            )
            for (against, at_least), raws in zip(FORMS.items(), columns[1:], strict=True)
        ]
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
                values=medians,
                versions=versions,
            ),
            Row(
                name="distinct sequences in a batch",
                against=f"{peer} buffer",
                ratio=mixed[0] / mixed[1],
                at_least=1,
                aim=None,
                values=mixed,
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


def _read(files: Iterable[Path]) -> float:
    """Seconds of a sequential read of the files into memory."""
    start = time.perf_counter()
    for path in files:
        path.read_bytes()
    return time.perf_counter() - start


def _read_over(files: Iterable[Path]) -> float:
    """Seconds of a sequential read of the files, all of it over the same memory."""
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
