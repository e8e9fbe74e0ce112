"""The nested loss against its formula."""

import pytest
import torch

from sae.losses import fvu_loss, nested_loss


@pytest.mark.parametrize("n_prefixes", [1, 4])
@pytest.mark.parametrize("n_tokens", [1, 3, 700])
def test_nested_loss_is_the_weighted_sum_of_each_prefix_s_fvu(n_prefixes, n_tokens):
    # 700 tokens of width 512 are more than one block.
    generator = torch.Generator().manual_seed(n_tokens)
    width = 512
    x = torch.randn(n_tokens, width, generator=generator, dtype=torch.float64)
    segments = torch.randn(n_prefixes, n_tokens, width, generator=generator, dtype=torch.float64)
    b_dec = torch.randn(width, generator=generator, dtype=torch.float64)
    weights = torch.arange(1, n_prefixes + 1, dtype=torch.float64)
    segments.requires_grad_()
    b_dec.requires_grad_()

    parts = segments.cumsum(0) + b_dec
    expected = sum(w * fvu_loss(x, part) for w, part in zip(weights, parts, strict=True))
    loss, residual = nested_loss(x, segments, b_dec, weights)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(residual, (x - parts[-1]).detach())
    assert not residual.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, (segments, b_dec)),
        torch.autograd.grad(3 * expected, (segments, b_dec)),
    )


def test_a_batch_without_variance_gives_the_squared_error():
    x = torch.ones(5, 4)
    loss, _ = nested_loss(x, torch.zeros(1, 5, 4), torch.zeros(4), torch.ones(1))
    assert loss.item() == pytest.approx(20.0)
