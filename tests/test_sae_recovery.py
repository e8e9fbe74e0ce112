"""Known dictionaries are found again, and the running threshold stands for the batch."""

import pytest
import torch

from sae import Fit, FitConfig, ReconstructionMetrics, SaeConfig, SparseAutoencoder
from sae.dictionary import dictionary_mcc

D_MODEL, D_SAE = 64, 256
pytestmark = pytest.mark.slow


def batches(dictionary):
    generator = torch.Generator().manual_seed(0)
    while True:
        on = torch.rand(1024, D_SAE, generator=generator) < 4 / D_SAE
        yield (on * (0.5 + torch.rand(1024, D_SAE, generator=generator))) @ dictionary


@pytest.mark.parametrize("selection", [pytest.param("topk", marks=pytest.mark.crash), "batch_topk"])
def test_uncorrelated_directions_are_recovered_and_the_threshold_stands_for_the_batch(selection):
    # Not the seed of the initial weights, which would then be the answer.
    drawn = torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(1))
    dictionary = torch.nn.functional.normalize(drawn, dim=1)
    data, layer = batches(dictionary), torch.zeros(1024, dtype=torch.long)
    sae = SparseAutoencoder(
        SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=4, selection=selection), {0: 3.0}
    )
    fit = Fit(sae, FitConfig(lr=1e-2, dead_after_tokens=10_000), n_steps=1000)
    fit.initialise(next(data), layer)
    for _ in range(1000):
        fit.step(next(data), layer)
    assert dictionary_mcc(sae.w_dec, dictionary) > 0.9
    x = next(data)
    units = sae.scaling.units(x, layer)
    sae.train()
    with torch.no_grad():
        latents = sae.encode(units.scale(x))
        by_batch, by_threshold = ReconstructionMetrics(), ReconstructionMetrics()
        by_batch.update(x, units.restore(sae.decode(latents)), latents)
    out = sae.reconstruct(x, layer)
    by_threshold.update(x, out.x_hat, out.latents)
    assert by_threshold.l0 == pytest.approx(by_batch.l0, rel=0.02)
    assert by_threshold.fvu == pytest.approx(by_batch.fvu, rel=0.02)
