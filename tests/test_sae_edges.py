"""What is asked at the edges: huge and tiny numbers, half precision, thresholds that are given."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae import (
    Fit,
    FitConfig,
    KronShape,
    LatentCounts,
    SaeConfig,
    SparseAutoencoder,
    evaluate_prefixes,
    fit_power_law,
    load,
    reconstruct_subset,
    rsa,
    save,
)
from sae.encoders import BLOCK_ELEMENTS
from sae.kron import root
from sae.losses import fvu_loss
from sae.progressive import decoder_importance

LAYER = torch.zeros(40, dtype=torch.int64)
KRON = KronShape(h=8, m=2, n=3)


def make(selection="topk", encoder="dense", **changes) -> SparseAutoencoder:
    cfg = SaeConfig(d_model=8, d_sae=48, k=6, selection=selection, encoder=encoder, **changes)
    return SparseAutoencoder(cfg, {0: 1.0})


def weights(sae: SparseAutoencoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in sae.parameters()]


@pytest.mark.parametrize("encoder", ["dense", KRON], ids=["dense", "kron"])
def test_a_batch_whose_loss_overflows_changes_no_weight(encoder):
    sae = make(encoder=encoder)
    fit = Fit(sae, FitConfig(), 10)
    x = torch.randn(40, 8)
    fit.initialise(x, LAYER)
    before = weights(sae)
    with pytest.raises(ValueError, match="weights are as they were"):
        fit.step(x * 3e19, LAYER)
    assert all(map(torch.equal, before, weights(sae)))
    assert all(p.grad is None for p in sae.parameters())
    for later in (x * 1e-30, x):
        fit.step(later, LAYER)
        assert all(w.isfinite().all() for w in weights(sae))


def test_numbers_that_fit_only_a_wider_dtype_are_refused():
    sae = make().eval()
    with pytest.raises(
        ValueError, match=r"40 of 40 rows of x hold NaN or infinity in torch\.float32"
    ):
        sae.reconstruct(torch.ones(40, 8, dtype=torch.float64) * 1e39, LAYER)


def test_the_root_of_large_products_is_finite_and_of_infinity_infinite():
    sae = make(encoder=KRON).eval()
    values = sae.reconstruct(torch.randn(40, 8) * 1e18, LAYER).latents.values
    assert values.isfinite().all()
    found = root(torch.tensor([4.0, 1e38, math.inf]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1e19, math.inf]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fvu_of_half_precision_is_that_of_single(dtype):
    x = (torch.randn(4096, 64) * 2 + 1).to(dtype)
    layer = torch.zeros(len(x), dtype=torch.int64)
    found = []
    for each in (x, x.float()):
        sae = SparseAutoencoder(SaeConfig(d_model=64, d_sae=256, k=8), {0: 1.0})
        fit = Fit(sae, FitConfig(), 10)
        fit.initialise(each, layer)
        found.append(fit.step(each, layer).fvu)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("row", [torch.full((12,), 0.1), torch.randn(12) * 100, torch.zeros(12)])
def test_a_batch_of_equal_rows_gives_the_squared_error_itself(row):
    x = row.expand(100, -1)
    assert float(fvu_loss(x, torch.zeros_like(x))) == pytest.approx(
        float(x.square().sum()), rel=1e-5
    )
    assert float(fvu_loss(x, x)) == 0


@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
@pytest.mark.parametrize("encoder", ["dense", KRON], ids=["dense", "kron"])
def test_a_threshold_that_is_given_selects_for_each_latent(tmp_path, selection, encoder):
    sae = make(selection, encoder).eval()
    x = torch.randn(40, 8)
    acts = sae.encoder.reference(x, sae.b_dec).detach()
    for threshold in (0.5, torch.rand(48)):
        sae.set_threshold(threshold)
        expected = torch.where(acts > threshold, acts, 0.0)
        torch.testing.assert_close(sae.encode(x).dense(), expected)
        save(str(tmp_path), sae)
        again, _ = load(str(tmp_path))
        assert torch.equal(again.encode(x).dense(), sae.encode(x).dense())
    for wrong in (-1.0, math.nan, torch.rand(3)):
        with pytest.raises(ValueError, match="one value from 0"):
            sae.set_threshold(wrong)
    with pytest.raises(ValueError, match="log_thresholds"):
        make("jumprelu").set_threshold(1.0)


def test_the_running_threshold_keeps_its_precision_in_bfloat16():
    sae = make("batch_topk").to(torch.bfloat16)
    assert sae.threshold.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_no_more_products_than_a_block_holds_are_made_at_once(selection):
    shape = KronShape(h=4, m=64, n=64)
    cfg = SaeConfig(d_model=8, d_sae=shape.d_sae, k=4, selection=selection, encoder=shape)
    sae = SparseAutoencoder(cfg, {0: 1.0}).train()
    x = torch.randn(1024, 8)
    assert len(x) * cfg.d_sae >= 4 * BLOCK_ELEMENTS
    with Largest() as largest:
        latents = sae.encode(x)
    assert largest.elements <= BLOCK_ELEMENTS
    acts = sae.encoder.reference(x, sae.b_dec)
    if selection == "topk":
        expected = acts.topk(4, dim=1).values.sum()
    else:
        expected = acts.flatten().topk(4 * len(x)).values.sum()
    torch.testing.assert_close(latents.values.sum(), expected)


def test_subsets_and_sizes_that_can_not_be_are_refused_and_an_empty_one_is_the_bias():
    sae, x = make(), torch.randn(40, 8)
    for kept in ([3, 3, 4], [1, -1], [48]):
        with pytest.raises(ValueError, match="name each once"):
            reconstruct_subset(sae, x, LAYER, torch.tensor(kept), refill=True)
    for refill in (True, False):
        nothing = torch.arange(0)
        x_hat = reconstruct_subset(sae, x, LAYER, nothing, refill=refill).x_hat
        torch.testing.assert_close(x_hat, sae.b_dec.detach().expand(40, -1))
    for size in (-5, 100):
        with pytest.raises(ValueError, match="give sizes from 0 to 48"):
            list(evaluate_prefixes(sae, x, LAYER, sizes=(size,)))


def test_measures_that_are_not_defined_are_refused():
    with pytest.raises(ValueError, match="do not vary on one side"):
        rsa(torch.randn(50, 24), torch.randn(24).expand(50, -1))
    with pytest.raises(ValueError, match="all point the same way"):
        decoder_importance(torch.ones(4, 3))
    for importances, first in ((torch.tensor([math.inf, 1, 2, 3]), 1), (torch.ones(4), 0)):
        with pytest.raises(ValueError, match="not finite"):
            fit_power_law(importances, first_rank=first)
    with pytest.raises(ValueError, match="only those of one dictionary"):
        LatentCounts(4).merge(LatentCounts(1))
