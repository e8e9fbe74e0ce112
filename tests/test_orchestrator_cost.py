"""The cost of sharing against Group-SAE's published savings."""

from pathlib import Path

import pytest

from actors.trial import Trial
from orchestrator.planning.cost import Harvested, Shared, cost
from sae.config import KronShape, SaeConfig
from sae.fit import FitConfig
from storage.hygiene import Hygiene, RowFilter

HARVESTED = Harvested(
    context=1024,
    n_sequences=1000,
    n_pilot_sequences=10,
    grouped_seconds=100.0,
    per_layer_seconds=120.0,
)
PUBLISHED = {
    "160m": (768, 207.62, (2, 1, 2, 2, 2, 2), 0.621),
    "410m": (1024, 704.64, (3, 2, 2, 4, 2, 3, 3, 2, 2), 0.485),
    "1b": (2048, 1744.83, (2, 3, 4, 2, 2, 2), 0.489),
}
"""d_model, A in MFLOPs per token, layers of each group, and C(G)/C(L): papers with F = 16 d_model."""


def shared(n_layers: int, sae: SaeConfig, tokens: int = 1_024_000, seconds: float = 30.0) -> Shared:
    trial = Trial(
        id="g0",
        group=0,
        layers=tuple(range(n_layers)),
        sae=sae,
        fit=FitConfig(),
        n_steps=250,
        seed=0,
        layer_scale=dict.fromkeys(range(n_layers), 1.0),
        window_chunks=1,
        checkpoint_seconds=1.0,
        train_store=Path("train.zarr"),
        validation_store=Path("validation.zarr"),
        row_filter=RowFilter(Hygiene(), (), {}),
        folder=Path("g0"),
    )
    result = {"tokens": tokens, "seconds": seconds}
    return Shared(n_layers=n_layers, trial=trial, result=result, baselines=[result] * n_layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_groupings_save_what_is_published(name):
    d_model, a, sizes, share = PUBLISHED[name]
    sae = SaeConfig(d_model=d_model, d_sae=16 * d_model, k=128)
    found = cost([shared(n, sae) for n in sizes], HARVESTED, a * 1e6)
    assert found["flops_per_token"]["published"] == 10 * d_model * 16 * d_model
    assert 1 - found["saved_published"] == pytest.approx(share, abs=0.001)
    assert found["saved_training"] == pytest.approx(1 - len(sizes) / sum(sizes))
    assert (found["n_groups"], found["n_layers"]) == (len(sizes), sum(sizes))


def test_totals_are_sums_over_tokens_and_autoencoders():
    dense = SaeConfig(d_model=16, d_sae=64, k=4)
    kron = SaeConfig(d_model=16, d_sae=64, k=4, encoder=KronShape(h=8, m=2, n=4))
    assert dense.training_flops_per_token == 2 * (16 * 64 + 4 * 4 * 16)
    assert kron.training_flops_per_token == 2 * (16 * 8 * 6 + 64 + 5 * 4 * 16)
    found = cost([shared(3, dense), shared(1, kron, tokens=512)], HARVESTED, 1000.0)
    model = 1000.0 * 1024 * 1000
    t_dense, t_kron = dense.training_flops_per_token, kron.training_flops_per_token
    grouped = t_dense * 1_024_000 + t_kron * 512
    apart = 3 * t_dense * 1_024_000 + t_kron * 512
    assert found["grouped"]["autoencoder_flops"] == grouped
    assert found["per_layer"]["autoencoder_flops"] == apart
    assert found["saved"] == pytest.approx(1 - (model + grouped) / (model + apart))
    assert found["pilot_flops"] == 1000.0 * 10 * 1024
    assert found["grouped"]["training_seconds"] == 60.0
    assert found["per_layer"]["training_seconds"] == 120.0
    assert found["saved_seconds"] == pytest.approx(1 - 160 / 240)


def test_what_nobody_measured_is_null():
    sae = SaeConfig(d_model=16, d_sae=64, k=4)
    one = shared(2, sae)
    lacking = Shared(n_layers=2, trial=one.trial, result=one.result, baselines=None)
    found = cost([one, lacking], HARVESTED, None)
    for key in ("saved", "saved_published", "saved_seconds", "pilot_flops"):
        assert found[key] is None, key
    assert found["per_layer"]["training_seconds"] is None
    assert found["saved_training"] == 0.5
