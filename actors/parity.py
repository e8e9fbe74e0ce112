"""Whether two programs compute the same function: codes and reconstructions of the same rows, compared.

Rounding differs between programs, and a selection is not continuous: a latent within rounding of its
threshold, or of the k-th largest of its row, may be on in one and off in the other. Such latents are
counted apart, and only if they lie that close; their rows take no part in the comparison of
reconstructions. The latents of a Kronecker encoder are roots, whose slope is unbounded at 0: below 1/2 they
are compared by what is under the root.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ACTIVATION_TOLERANCE = 1e-5
"""Of a latent, in units of the largest of its row, or of 1 where that is smaller."""

RECONSTRUCTION_TOLERANCE = 1e-4
"""Of a reconstruction, as the norm of the difference over its own norm."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far apart two programs are; lower is better everywhere."""

    activation_delta: float
    """Largest difference of a latent that is on in both, in units of the row's largest or of 1."""

    absolute_activation_delta: float
    """Largest difference of a latent that is on in both, as it is."""

    reconstruction_delta: float
    """Largest norm of a row's difference over the norm of the row."""

    at_the_edge: int
    """Latents that are on in one alone, and within rounding of where selection cuts."""

    wrong: int
    """Latents that are on in one alone, and not near the cut: 0 if the functions are the same."""

    n_rows: int
    """Rows compared."""

    n_latents: int
    """Latents that were on in them."""

    @property
    def holds(self) -> bool:
        """Whether the two are the same function but for rounding."""
        return (
            self.wrong == 0
            and self.activation_delta <= ACTIVATION_TOLERANCE
            and self.reconstruction_delta <= RECONSTRUCTION_TOLERANCE
        )


def compare(
    ours: tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_model"]],
    theirs: tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_model"]],
    cut: Float[Tensor, " d_sae"] | int,
    rooted: bool = False,
) -> Parity:
    """Compare codes and reconstructions.

    Args:
        ours: Latents of every row and its reconstruction.
        theirs: The same of another program.
        cut: What each latent has to exceed to be on; or k, if the k largest of a row are on.
        rooted: Whether latents are roots of what rounding is in.
    """
    (a, x_hat), (b, y_hat) = ours, theirs
    unit = torch.maximum(a.amax(1), b.amax(1)).clamp(min=1)[:, None]
    apart = (a > 0) != (b > 0)
    delta = torch.where(apart, 0.0, a - b).abs()
    weighed = delta * (a + b).clamp(max=1) if rooted else delta  # |a^2 - b^2|
    value = torch.maximum(a, b)
    if isinstance(cut, int):  # what the one that left it out kept instead
        bound = torch.where(a > 0, _smallest_kept(b, cut), _smallest_kept(a, cut))
    else:
        bound = cut.expand_as(value)
    # A latent near 0 may also be off as it is not positive.
    distance = torch.minimum((value - bound).abs(), value)
    if rooted:
        distance = distance * (value + bound).clamp(max=1)
    near = apart & (distance <= ACTIVATION_TOLERANCE * unit)
    alike = ~apart.any(1)
    error = torch.linalg.vector_norm(x_hat - y_hat, dim=1)[alike]
    norm = torch.linalg.vector_norm(x_hat, dim=1)[alike].clamp(min=1e-30)
    return Parity(
        activation_delta=float((weighed / unit).max()),
        absolute_activation_delta=float(delta.max()),
        reconstruction_delta=float((error / norm).max()) if len(error) else 0.0,
        at_the_edge=int(near.sum()),
        wrong=int((apart & ~near).sum()),
        n_rows=len(a),
        n_latents=int((a > 0).sum()),
    )


def _smallest_kept(acts: Tensor, k: int) -> Tensor:
    """Per row, the smallest latent that is on; 0 where fewer than k are, so that all positive ones are."""
    smallest = torch.where(acts > 0, acts, torch.inf).amin(1, keepdim=True)
    return torch.where((acts > 0).sum(1, keepdim=True) < k, 0.0, smallest)
