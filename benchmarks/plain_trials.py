"""The work of a sweep's trials in a plain loop: a process that trains one autoencoder after the other.

No Ray, no Tune, no MLflow, no reports and no checkpoints on the way: data in, steps, judgement, and the
autoencoder written. It answers a JSON line per trial that it is given on a JSON line.
"""

import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from actors.allocator import keep_freed_memory
from actors.fidelity import reconstruction_quality
from benchmarks.worker import open_answers
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.checkpoint import config_from_json
from sae.fit import Fit, FitConfig
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.hygiene import RowFilter
from storage.windows import Batch


def train(trial: dict[str, Any]) -> dict[str, float]:
    """Train, judge and write one autoencoder; its FVU on the validation store."""
    cfg = FitConfig(**{**trial["fit"], "betas": tuple(trial["fit"]["betas"])})
    scale = {int(layer): factor for layer, factor in trial["layer_scale"].items()}
    rows = RowFilter.from_json(trial["row_filter"])
    batches = ShuffledBatches(
        ActivationStore.open(Path(trial["train_store"])),
        f"groups/{trial['group']}",
        rows,
        batch_rows=cfg.batch_tokens,
        window_chunks=trial["window_chunks"],
        seed=trial["seed"],
    )
    sae = SparseAutoencoder(config_from_json(trial["sae"]), scale, seed=trial["seed"])
    fit = Fit(sae, cfg, n_steps=trial["n_steps"], seed=trial["seed"])
    keep_freed_memory(sae.w_dec.nbytes)
    stream: Iterator[tuple[Cursor, Batch]] = batches.batches(Cursor())
    first = next(stream)
    fit.initialise(first[1].x, first[1].layer)
    for _, batch in islice(chain([first], stream), trial["n_steps"]):
        fit.step(batch.x, batch.layer)
    quality = reconstruction_quality(sae, Path(trial["validation_store"]), trial["layers"], rows)
    checkpoint.save(Path(trial["folder"]), sae)
    return {"fvu": quality.mean_fvu}


def main() -> None:
    """A trial per line of stdin."""
    answers = open_answers()
    torch.set_num_threads(int(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
