"""What the store's codecs and dtypes gain and cost, on activations of real models.

    python -m benchmarks.codecs

Bytes are those of the files of activations, against float16 without a codec; speeds are megabytes
of stored rows per second of the process, the whole way to a committed shard and back.
"""

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.activations import PILOTS
from storage.activations import ActivationStore
from storage.codecs import CODECS
from storage.dtypes import DTYPES, power_of_two_scale
from storage.encoding import EncodedRows
from storage.layout import StoreSpec

CHUNK_BYTES = 2**20


def row(x: np.ndarray, dtype: str, codec: str) -> tuple[float, float, float, float]:
    """Bytes of the activations, written and read MB per CPU-second, and the FVU of rounding."""
    chunk_rows = CHUNK_BYTES // (2 * x.shape[1])
    x = x[: len(x) // chunk_rows * chunk_rows]  # whole chunks, so that no padding is counted
    n_rows, d_model = x.shape
    scale = power_of_two_scale(float(np.linalg.norm(x, axis=1).mean()), d_model)
    spec = StoreSpec(
        d_model=d_model,
        layers=(0,),
        split="train",
        n_population=n_rows,
        n_sequences=n_rows,
        rows_per_sequence=1,
        first_position=0,
        sequences_per_chunk=chunk_rows,
        chunks_per_shard=-(-n_rows // chunk_rows),
        seed=0,
        dtype=dtype,
        codec=codec,
        scales=(scale if dtype == "float16" else 1.0,),
    )
    sequence, position = spec.rows_of(0)
    columns = {"sequence": sequence, "position": position, "token_id": sequence}
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore.create(Path(folder) / "s", spec)
        started = time.process_time()
        rows = EncodedRows.of(spec, "layers/0", 0, torch.from_numpy(x[sequence]))
        record = store.write_shard(0, {"layers/0": rows}, columns)
        written = time.process_time()
        reader = ActivationStore.open(store.place)
        for chunk in range(spec.n_chunks):
            np.array(reader.read_stored("layers/0", *spec.chunk_range(chunk)))
        read = time.process_time()
        error = np.square(reader.read("layers/0", 0, n_rows) - x[sequence]).sum(dtype=np.float64)
    fvu = float(error / np.square(x - x.mean(axis=0)).sum(dtype=np.float64))
    megabytes = x.size * np.dtype({"int8": "i1", "float32": "f4"}.get(dtype, "f2")).itemsize / 1e6
    n_bytes = record.files["layers/0/x/c/0/0"].n_bytes
    return (
        n_bytes / (2 * x.size),
        megabytes / (written - started),
        megabytes / (read - written),
        fvu,
    )


def main() -> None:
    """Print a Markdown table for every model that is here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    n_tokens = parser.parse_args().tokens
    for pilot in PILOTS:
        if not pilot.present:
            continue
        x = pilot.activations(n_tokens)[0].numpy()
        row(x, "float32", "none")  # so that no measurement pays for what happens only once
        print(f"\n{pilot.name}: {len(x):,} rows of {x.shape[1]}\n")
        print("| dtype | codec | bytes, float16 = 1 | write MB/s | read MB/s | FVU of rounding |")
        print("|---|---|---|---|---|---|")
        for dtype, codec in product(DTYPES, CODECS):
            if (dtype, codec) == ("int8", "pcodec"):
                continue
            size, write, read, fvu = row(x, dtype, codec)
            print(
                f"| {dtype} | {codec} | {size:.3f} | {write:,.0f} | {read:,.0f} | {fvu:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
