"""The losses: fraction of variance unexplained, its nested sum, and AuxK."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def total_variance(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """Sum of squared distances to the batch's mean; 1 where that is 0, so that ratios stay finite."""
    total = (x - x.mean(0)).square().sum()
    return torch.where(total > 0, total, 1.0)


def fvu_loss(
    x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, ""]:
    """Squared error over the variance of the batch: sum |x - x_hat|^2 / sum |x - mean|^2.

    0 is perfect, 1 no better than the batch's mean. The loss of sparsify and Group-SAE. A batch
    without variance gives the squared error itself, never NaN.
    """
    return (x - x_hat).square().sum() / total_variance(x)


def nested_loss(
    x: Float[Tensor, "tokens d_model"],
    prefixes: Float[Tensor, "prefixes tokens d_model"],
    weights: Float[Tensor, " prefixes"],
) -> Float[Tensor, ""]:
    """Weighted sum over nested reconstructions of their FVU (Matryoshka, arXiv 2503.17547, 3.2).

    The paper sums with weights 1, and adds AuxK once: so does this, neither averages.
    """
    errors = torch.stack([(x - prefix).square().sum() for prefix in prefixes])
    return (errors * weights).sum() / total_variance(x)


def auxk_size(d_model: int) -> int:
    """Dead latents asked to explain the residual: the power of two nearest d_model / 2.

    Gao et al. 2024, appendix B.1; nearest in ratio, a tie going up.
    """
    return 1 << max(0, math.floor(math.log2(d_model / 2) + 0.5)) if d_model > 1 else 1


def auxk_loss(
    residual: Float[Tensor, "tokens d_model"], explained: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, ""]:
    """How far dead latents are from explaining what the living leave: FVU of the residual.

    Args:
        residual: x - x_hat, detached: the target. (Group-SAE's code has the sign turned round and
            so trained dead latents away from it.)
        explained: Its reconstruction from dead latents, without the decoder's bias.
    """
    return fvu_loss(residual, explained)
