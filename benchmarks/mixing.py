"""An autoencoder trained on batches out of a store against one trained on a uniform shuffle of its rows."""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.activations import PILOTS, shuffled
from benchmarks.fitting import fitted, measured
from benchmarks.one_layer import ALL_ROWS, ARRAY, filled, one_layer_spec
from benchmarks.rows import Row
from sae import SaeConfig
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.windows import run_rows

TOKENS, STEPS, BATCH_ROWS, SEEDS = 200_000, 1200, 1024, 8
SEQUENCE_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Form:
    """Of a store."""

    chunk_sequences: int
    shard_chunks: int
    window_chunks: int


FORMS = (
    Form(chunk_sequences=1, shard_chunks=16, window_chunks=64),
    Form(chunk_sequences=16, shard_chunks=8, window_chunks=12),
)
"""About 1560 chunks, of which a window mixes as many as at the defaults; and chunks so large that as many neighbours
stay together as at the defaults, in a window of fewer."""


def measure() -> list[Row]:
    """Mean FVU of held-out rows over the seeds, uniform over ours; above 1 ours is lower. A row a form."""
    return [_measured(form) for form in FORMS]


def _measured(form: Form) -> Row:
    pilot = PILOTS[0]
    torch.set_num_threads(2)
    train, validation = pilot.activations(TOKENS)
    train = train[: len(train) // SEQUENCE_ROWS * SEQUENCE_ROWS]
    sae = SaeConfig(d_model=train.shape[1], d_sae=1024, k=16)
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        store = _stored(Path(name) / "store", train, form)
        for seed in range(SEEDS):
            fvu = []
            for batches in (_from_store(store, form, seed), shuffled(train, BATCH_ROWS, seed)):
                torch.manual_seed(seed)
                fit = fitted(sae, batches, STEPS, lr=1e-3, dead_after_tokens=100_000)
                fvu.append(measured(fit, validation).fvu)
            print(f"  seed {seed}: FVU {fvu[0]:.5f}, uniform {fvu[1]:.5f}", flush=True)
            found.append((fvu[0], fvu[1]))
    means = [statistics.fmean(column) for column in zip(*found, strict=True)]
    together = run_rows(store.spec)
    return Row(
        name=f"FVU, {pilot.name}, window of {form.window_chunks} in {store.spec.n_chunks} chunks, runs of {together}",
        against="uniform shuffle",
        ratio=means[1] / means[0],
        at_least=0.995,
        aim=None,
        values=means,
        versions={name: version(name) for name in ("torch", "zarr")},
        unit="",
    )


def _from_store(store: ActivationStore, form: Form, seed: int) -> Iterator[Tensor]:
    batches = ShuffledBatches(store, ARRAY, ALL_ROWS, BATCH_ROWS, form.window_chunks, seed)
    return (b.x for _, b in batches.batches(Cursor()) if len(b) == BATCH_ROWS)


def _stored(folder: Path, x: Tensor, form: Form) -> ActivationStore:
    """The rows as a store has them, in float32: what is compared is the order alone."""
    n_sequences = len(x) // SEQUENCE_ROWS
    spec = one_layer_spec(
        *(x.shape[1], n_sequences, SEQUENCE_ROWS, form.chunk_sequences, form.shard_chunks),
        dtype="float32",
    )

    def rows_of(shard: int) -> Tensor:
        sequence, position = spec.rows_of(shard)
        return x[torch.from_numpy(sequence.astype(np.int64) * SEQUENCE_ROWS + position)]

    return filled(folder, spec, rows_of)
