"""A small trial on stores of known content, for the tests of whatever trains it."""

import json
from pathlib import Path
from typing import Any

from actors.trial import Trial
from sae.config import SaeConfig
from sae.fit import FitConfig
from storage.hygiene import Hygiene, RowFilter
from storage.seal import opened
from tests.stores import filled_store, small_spec

N_STEPS = 14


def small_trial(place: Path, **changes) -> Trial:
    """Twelve latents on layers 0 and 2, `N_STEPS` steps, more than an epoch; `place` gets the stores."""
    if not (place / "train.zarr").exists():
        filled_store(place / "train.zarr", small_spec(groups=((0, 2), (1,))))
        filled_store(place / "validation.zarr", small_spec(n_sequences=6))
    settings = {
        "id": "g0-k2-dense-batch_topk",
        "group": 0,
        "layers": (0, 2),
        "sae": SaeConfig(d_model=6, d_sae=12, k=2, selection="batch_topk"),
        "fit": FitConfig(batch_tokens=32, lr=1e-2, dead_after_tokens=64),
        "n_steps": N_STEPS,
        "seed": 3,
        "layer_scale": {0: 1.5, 2: 0.5},
        "window_chunks": 2,
        "checkpoint_seconds": 1e9,
        "train_store": place / "train.zarr",
        "validation_store": place / "validation.zarr",
        "row_filter": RowFilter(Hygiene(), (0,), {0: 2.0, 1: 2.0, 2: 2.0}),
        "folder": place / "trial",
    }
    return Trial(**{**settings, **changes})


def result_of(trial: Trial) -> dict[str, Any]:
    """What a finished one says of itself."""
    return opened(json.loads(trial.result_file.read_text()))
