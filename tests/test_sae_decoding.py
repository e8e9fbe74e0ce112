import pytest
import torch

from sae.decoding import decode, decode_reference, decode_segments
from sae.latents import Pattern, SparseLatents


def ragged():
    indices = torch.tensor([7, 1, 4, 0, 9, 4])
    offsets = torch.tensor([0, 3, 3, 5, 6])
    values = torch.rand(6, dtype=torch.float64, requires_grad=True)
    return SparseLatents(values, Pattern(indices=indices, offsets=offsets, d_sae=10))


def test_decode_of_ragged_codes_equals_the_dense_product_with_gradients():
    latents, w_dec = ragged(), torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)
    ours, theirs = decode(latents, w_dec), decode_reference(latents, w_dec)
    torch.testing.assert_close(ours, theirs)
    inputs = (latents.values, w_dec)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)
    )


def test_each_prefix_decodes_only_the_latents_below_it():
    latents, w_dec = ragged(), torch.randn(10, 5, dtype=torch.float64)
    parts = decode_segments(latents, w_dec, (1, 5, 10)).cumsum(0)
    dense = latents.dense()
    for part, size in zip(parts, (1, 5, 10), strict=True):
        torch.testing.assert_close(part, dense[:, :size] @ w_dec[:size])


def test_decode_passes_gradcheck():
    latents, w_dec = ragged(), torch.randn(10, 5, dtype=torch.float64, requires_grad=True)

    def run(values, weight):
        return decode(SparseLatents(values, latents.pattern), weight)

    assert torch.autograd.gradcheck(run, (latents.values, w_dec))


@pytest.mark.parametrize("prefixes", [(), (1, 5, 10)])
def test_the_gradient_of_lengths_is_that_of_factors_of_the_rows(prefixes):
    latents, w_dec = ragged(), torch.randn(10, 5, dtype=torch.float64)
    lengths = torch.ones(10, dtype=torch.float64, requires_grad=True)
    ours = decode_segments(latents, w_dec, prefixes, lengths)
    theirs = decode_segments(latents, w_dec * lengths[:, None], prefixes)
    cotangent = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, lengths, cotangent),
        torch.autograd.grad(theirs, lengths, cotangent),
    )
