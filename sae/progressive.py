"""Progressive coding (arXiv 2505.00190): one autoencoder at many sizes.

Latents are ranked by importance, and the first G of them reconstruct on their own. The paper's
hypothesis is that importance falls as a power of the rank; `fit_power_law` tests that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder import Reconstruction, SparseAutoencoder
from sae.latents import SparseLatents
from sae.metrics import LatentCounts, ReconstructionMetrics


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """importance = factor * rank ** -exponent, by least squares in the logarithms."""

    factor: float
    """What the law says of rank 1, in the importances' unit."""

    exponent: float
    """Larger: importance falls faster."""

    r_squared: float
    """Share of the logarithms' variance the law explains; 1 is a perfect power law."""

    exponential_r_squared: float
    """The same of importance ~ exp(-rate * rank): a power law is only seen where this is lower."""

    first_rank: int
    """Range of the fit, counted from 1."""

    last_rank: int
    """The last rank of the fit: of the least positive importance, if nothing else was asked."""


def importance(
    counts: LatentCounts, by: Literal["energy", "frequency"] = "energy"
) -> Float[Tensor, " d_sae"]:
    """How much each latent matters: E[act^2] (the better order, says the paper) or E[act > 0].

    The third of the paper, by the decoder's spectrum, needs no counts: `decoder_importance`.

    Raises:
        ValueError: If `by` is neither.
    """
    if by not in ("energy", "frequency"):
        raise ValueError(
            f"by={by!r}; latents are counted by energy or frequency: choose one, or use "
            "decoder_importance for the decoder's spectrum"
        )
    return counts.energy / max(counts.n_tokens, 1) if by == "energy" else counts.frequencies


def decoder_importance(w_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_sae"]:
    """Share of the dictionary's variance that lies along each latent's row, from weights alone.

    w C w for the unit row w and the covariance C of all rows: large for rows within the leading
    eigenvectors of the decoder's spectrum.

    Raises:
        ValueError: If all rows point the same way, and so have no variance.
    """
    rows = F.normalize(w_dec.detach().double(), dim=1)
    covariance = _covariance(rows)
    if not covariance.trace() > 1e-12:
        raise ValueError(
            f"the {len(rows)} rows of w_dec all point the same way; importance needs rows that differ: "
            "train the autoencoder first"
        )
    return ((rows @ covariance) * rows).sum(1) / covariance.trace()


def decoder_spectrum(w_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_model"]:
    """Eigenvalues of the covariance of the decoder's rows, falling: the paper's first test."""
    return torch.linalg.eigvalsh(_covariance(w_dec.detach().double())).flip(0).clamp(min=0)


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def fit_power_law(
    importances: Float[Tensor, " latents"], first_rank: int = 1, last_rank: int | None = None
) -> PowerLaw:
    """Fit the sorted importances against their rank.

    Args:
        importances: In any order; those not above 0 are left out.
        first_rank: Where the range begins, from 1.
        last_rank: Where it ends; None: the last positive one.

    Raises:
        ValueError: If fewer than three ranks are left, an importance is not finite, or first_rank < 1.
    """
    ranked = importances.detach().double()
    if first_rank < 1 or not bool(ranked.isfinite().all()):
        raise ValueError(
            f"{first_rank=} and {int((~ranked.isfinite()).sum())} importances that are not finite; ranks "
            "count from 1 and importances are finite numbers: correct them"
        )
    ranked = ranked[ranked > 0].sort(descending=True).values
    last_rank = len(ranked) if last_rank is None else min(last_rank, len(ranked))
    if last_rank - first_rank < 2:
        raise ValueError(
            f"ranks {first_rank} to {last_rank} hold fewer than three positive importances; a line "
            "needs three to be tested; count more tokens or widen the range"
        )
    logs = ranked[first_rank - 1 : last_rank].log()
    ranks = torch.arange(first_rank, last_rank + 1, dtype=torch.float64, device=logs.device)
    slope, r_squared = _line(ranks.log(), logs)
    return PowerLaw(
        factor=float((logs.mean() - slope * ranks.log().mean()).exp()),
        exponent=-slope,
        r_squared=r_squared,
        exponential_r_squared=_line(ranks, logs)[1],
        first_rank=first_rank,
        last_rank=last_rank,
    )


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and r^2 of the least-squares line."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum())
    total = float(y.square().sum())
    left = float((y - slope * x).square().sum())
    return slope, 1 - left / total if total else 1.0


@torch.no_grad()
def reconstruct_subset(
    sae: SparseAutoencoder,
    x: Float[Tensor, "tokens d_model"],
    layer: Int[Tensor, " tokens"],
    kept: Int[Tensor, " kept"],
    *,
    refill: bool = False,
) -> Reconstruction:
    """Reconstruct with some of the latents, without retraining.

    Args:
        sae: The autoencoder.
        x: Activations, in the model's units.
        layer: The layer each came from.
        kept: Latents that remain.
        refill: Whether TopK chooses k among those that remain. If not, the whole dictionary
            is encoded and the others' entries dropped: L0 falls. That is how a Matryoshka prefix
            is defined (arXiv 2503.17547), and pruning as a mere reading off of the code. Where a
            threshold selects, both are the same.

    Raises:
        ValueError: If `kept` names a latent twice or one that there is not, and as
            `SparseAutoencoder.reconstruct`.
    """
    _check_latents(kept, sae.cfg.d_sae)
    if refill and len(kept) > 0:
        return sae.reconstruct(x, layer, only=kept)
    return _pruned(sae, x, layer, sae.reconstruct(x, layer).latents, kept)


def _check_latents(named: Tensor, d_sae: int) -> None:
    n_different = len(named.unique())
    if n_different < len(named) or not bool(((named >= 0) & (named < d_sae)).all()):
        raise ValueError(
            f"{len(named)} latents are named, of which {n_different} differ, from "
            f"{int(named.min())} to {int(named.max())}; there are 0 to {d_sae - 1}: name each once"
        )


def _pruned(
    sae: SparseAutoencoder, x: Tensor, layer: Tensor, latents: SparseLatents, kept: Tensor
) -> Reconstruction:
    """What is left of `x`, whose code is `latents`, when only the entries of `kept` are decoded."""
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=kept.device)
    mask[kept] = True
    values = torch.where(mask[latents.indices], latents.values, 0.0)
    pruned = SparseLatents(values, latents.pattern)
    units = sae.scaling.units(x.to(sae.b_dec.dtype), layer)
    return Reconstruction(units.restore(sae.decode(pruned)).to(x.dtype), pruned)


@torch.no_grad()
def reconstruct_prefixes(
    sae: SparseAutoencoder,
    x: Float[Tensor, "tokens d_model"],
    layer: Int[Tensor, " tokens"],
    order: Int[Tensor, " d_sae"] | None = None,
    sizes: tuple[int, ...] | None = None,
    *,
    refill: bool = False,
) -> Iterator[tuple[int, Reconstruction]]:
    """Reconstructions from the first G latents, for each G; without refill, x is encoded once.

    Args:
        sae: The autoencoder.
        x: Activations, in the model's units.
        layer: The layer each came from.
        order: Latents, most important first; None: as they stand, which is Matryoshka's order.
        sizes: The G; None: the prefixes it was trained for.
        refill: See `reconstruct_subset`.

    Raises:
        ValueError: If a size is not one of 0 to d_sae, `order` names a latent twice or one that there
            is not, and as `SparseAutoencoder.reconstruct`.
    """
    wrong = [size for size in sizes or () if not 0 <= size <= sae.cfg.d_sae]
    if wrong:
        raise ValueError(
            f"sizes {wrong} of a dictionary of {sae.cfg.d_sae}; give sizes from 0 to {sae.cfg.d_sae}"
        )
    if order is None:
        order = torch.arange(sae.cfg.d_sae, device=x.device)
    _check_latents(order, sae.cfg.d_sae)
    sizes = sizes or sae.cfg.prefixes or (sae.cfg.d_sae,)
    if refill:
        for size in sizes:
            yield size, reconstruct_subset(sae, x, layer, order[:size], refill=True)
        return
    latents = sae.reconstruct(x, layer).latents
    for size in sizes:
        yield size, _pruned(sae, x, layer, latents, order[:size])


def evaluate_prefixes(
    sae: SparseAutoencoder,
    x: Float[Tensor, "tokens d_model"],
    layer: Int[Tensor, " tokens"],
    order: Int[Tensor, " d_sae"] | None = None,
    sizes: tuple[int, ...] | None = None,
    *,
    refill: bool = False,
) -> Iterator[tuple[int, ReconstructionMetrics]]:
    """Metrics of the first G latents, for each G: those of `reconstruct_prefixes`, which see."""
    for size, out in reconstruct_prefixes(sae, x, layer, order, sizes, refill=refill):
        metrics = ReconstructionMetrics()
        metrics.update(x, out.x_hat, out.latents)
        yield size, metrics


def rsa(x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]) -> float:
    """Representational similarity: do inputs that resemble each other still do so afterwards?

    Pearson correlation, over all pairs of tokens, of the cosine similarities among `x` with those
    among `x_hat`. In [-1, 1]; 1: the geometry is kept. Quadratic in tokens: pass some thousands.

    Raises:
        ValueError: If the similarities of one side are all equal, where it isn't defined.
    """
    above = torch.triu_indices(len(x), len(x), 1, device=x.device)
    pairs = []
    for side in (x, x_hat):
        unit = F.normalize(side.detach().double(), dim=1)
        similarities = (unit @ unit.T)[above[0], above[1]]
        pairs.append(similarities - similarities.mean() if len(x) > 1 else similarities)
    norms = [float(torch.linalg.vector_norm(side)) for side in pairs]
    # Of similarities up to 1 in float64 rounding leaves 1e-16 each.
    if min(norms) <= 1e-12 * max(1, above.shape[1]) ** 0.5:
        raise ValueError(
            f"the similarities among {len(x)} tokens do not vary on one side; a correlation needs "
            "them to; pass at least three different tokens, reconstructed differently"
        )
    return float(pairs[0] @ pairs[1]) / (norms[0] * norms[1])
