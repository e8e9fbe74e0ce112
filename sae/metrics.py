"""How good a reconstruction is: each metric defined once, streamed in float64, mergeable.

`update` takes a batch, `merge` another worker's part; the order of batches changes nothing but
the last bits. docs/evaluation.md has the formulas side by side, with their sources.
"""

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from sae.latents import SparseLatents
from sae.ranks import Ranks

DENSE_FREQUENCY = 0.1
"""A latent in use on a larger share of tokens is dense: SAEBench's `freq_over_10_percent`."""


class ReconstructionMetrics:
    """FVU, explained variance, L0, cosine, norm ratio and relative bias over all tokens seen."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._n_nonzero = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._total = self._error = self._l0 = self._cosine = self._norm_ratio = 0.0
        self._squares_hat = self._products = 0.0

    def update(
        self,
        x: Float[Tensor, "tokens d_model"],
        x_hat: Float[Tensor, "tokens d_model"],
        latents: SparseLatents | None = None,
    ) -> None:
        """Count a batch.

        Args:
            x: Activations, in the model's units.
            x_hat: Their reconstructions.
            latents: Their code, for L0; None where there is none (an ablation).

        Raises:
            ValueError: If the two have different shapes.
        """
        if x.shape != x_hat.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}; a reconstruction has the "
                "shape of what it reconstructs: pass those of the same batch"
            )
        other = ReconstructionMetrics()
        x, x_hat = x.detach().double(), x_hat.detach().double()
        other.n_tokens = len(x)
        mean = x.mean(0)
        other._mean = mean.cpu()
        norms, norms_hat = (
            torch.linalg.vector_norm(x, dim=1),
            torch.linalg.vector_norm(x_hat, dim=1),
        )
        nonzero = norms > 0
        both = torch.where(nonzero & (norms_hat > 0), norms * norms_hat, 1.0)
        sums = [
            (x - mean).square().sum(),
            (x - x_hat).square().sum(),
            ((x * x_hat).sum(1) / both)[nonzero].sum(),
            (norms_hat[nonzero] / norms[nonzero]).sum(),
            nonzero.sum().double(),
            (latents.values > 0).sum().double() if latents else x.new_zeros(()),
            x_hat.square().sum(),
            (x * x_hat).sum(),
        ]
        total, error, cosine, ratio, n_nonzero, l0, *bias = torch.stack(sums).tolist()
        other._total, other._error, other._cosine, other._norm_ratio = total, error, cosine, ratio
        other._n_nonzero, other._l0 = int(n_nonzero), l0
        other._squares_hat, other._products = bias
        self.merge(other)

    def merge(self, other: "ReconstructionMetrics") -> "ReconstructionMetrics":
        """Add what another has seen; returns self.

        The variance of the whole is joined by the means' distance (Chan et al. 1983), so a large
        mean costs no digits.
        """
        if not other.n_tokens:
            return self
        if not self.n_tokens:
            self._mean = torch.zeros_like(other._mean)
        n_tokens = self.n_tokens + other.n_tokens
        shift = other._mean - self._mean
        apart = float(shift.square().sum()) * self.n_tokens * other.n_tokens / n_tokens
        self._total += other._total + apart
        self._mean = self._mean + shift * (other.n_tokens / n_tokens)
        self._error += other._error
        self._l0 += other._l0
        self._cosine += other._cosine
        self._norm_ratio += other._norm_ratio
        self._squares_hat += other._squares_hat
        self._products += other._products
        self._n_nonzero += other._n_nonzero
        self.n_tokens = n_tokens
        return self

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum |x - x_hat|^2 / sum |x - mean|^2; lower is better.

        A ratio of sums, the mean taken over everything seen. 1: no better than the mean.

        Raises:
            ValueError: If all activations were equal, where it isn't defined.
        """
        self._need_tokens()
        if self._total == 0:
            raise ValueError(
                f"the {self.n_tokens} activations are all equal, so there is no variance to "
                "explain; FVU needs at least two different ones; check the store, or add tokens"
            )
        return self._error / self._total

    @property
    def explained_variance(self) -> float:
        """1 - FVU; higher is better."""
        return 1 - self.fvu

    @property
    def l0(self) -> float:
        """Mean latents in use per token."""
        self._need_tokens()
        return self._l0 / self.n_tokens

    @property
    def cosine(self) -> float:
        """Mean cosine of x and x_hat over tokens with x != 0; a zero x_hat counts 0. 1 is best."""
        self._need_tokens()
        return self._cosine / max(self._n_nonzero, 1)

    @property
    def norm_ratio(self) -> float:
        """Mean of |x_hat| / |x| over tokens with x != 0; below 1 is shrinkage."""
        self._need_tokens()
        return self._norm_ratio / max(self._n_nonzero, 1)

    @property
    def relative_bias(self) -> float | None:
        """Relative reconstruction bias: sum |x_hat|^2 / sum x . x_hat; 1 is best, below is shrinkage.

        What a reconstruction would have to be divided by to be the best of its direction (eq 10 of
        arXiv 2404.16014). None where the sum of products is 0, as with reconstructions of 0.
        """
        self._need_tokens()
        return self._squares_hat / self._products if self._products else None

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean activation, in float64: what mean ablation puts in their place."""
        self._need_tokens()
        return self._mean

    def _need_tokens(self) -> None:
        if not self.n_tokens:
            raise ValueError(
                "no activations were counted; a metric needs at least one batch; call update first"
            )


class LatentCounts:
    """How often, and how strongly, each latent is in use."""

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        """Tokens on which each latent was in use."""
        self.energy: Float[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of each latent's squared values."""

    def update(self, latents: SparseLatents) -> None:
        """Count a batch."""
        self.n_tokens += latents.n_tokens
        values = latents.values.detach().double().cpu()
        indices = latents.indices.cpu()
        self.counts.index_add_(0, indices, (values > 0).long())
        self.energy.index_add_(0, indices, values.square())

    def merge(self, other: "LatentCounts") -> "LatentCounts":
        """Add what another has seen; returns self.

        Raises:
            ValueError: If it counted another dictionary.
        """
        if len(other.counts) != len(self.counts):
            raise ValueError(
                f"counts of {len(other.counts)} latents and of {len(self.counts)}; only those of one "
                "dictionary can be added"
            )
        self.n_tokens += other.n_tokens
        self.counts += other.counts
        self.energy += other.energy
        return self

    def of_all_ranks(
        self, held: range, d_sae: int, ranks: Ranks, device: torch.device
    ) -> "LatentCounts":
        """The counts of the whole, where each rank has counted the latents that it holds.

        Args:
            held: By this one.
            d_sae: Latents of the whole.
            ranks: Who share them.
            device: That the ranks exchange tensors on.
        """
        whole = LatentCounts(d_sae)
        whole.n_tokens = self.n_tokens
        for total, mine in ((whole.counts, self.counts), (whole.energy, self.energy)):
            total[held.start : held.stop] = mine
            total.copy_(ranks.over_latents(total.to(device)))
        return whole

    @property
    def l0(self) -> float:
        """Mean latents in use per token seen: `ReconstructionMetrics.l0`, of these counts."""
        return float(self.counts.sum()) / max(self.n_tokens, 1)

    @property
    def dead_fraction(self) -> float:
        """Share of latents in use on no token seen; 0 is best. Falls as more tokens are seen."""
        return float((self.counts == 0).double().mean())

    @property
    def dense_fraction(self) -> float:
        """Share of latents in use on more than `DENSE_FREQUENCY` of the tokens seen."""
        return float((self.frequencies > DENSE_FREQUENCY).double().mean())

    @property
    def frequencies(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each latent is in use, in float64."""
        return self.counts.double() / max(self.n_tokens, 1)

    def histogram(
        self, edges: Float[Tensor, " edges"] | None = None
    ) -> tuple[Int[Tensor, " bins"], Float[Tensor, " edges"]]:
        """Living latents by log10 of their frequency, and the bins' edges (half decades)."""
        logs = self.frequencies[self.counts > 0].log10()
        if edges is None:
            lowest = min(-16, int((2 * logs).floor().min())) if len(logs) else -16
            edges = torch.arange(lowest, 1, dtype=torch.float64) / 2
        return torch.histogram(logs, edges.double()).hist.long(), edges


def ce_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the cross-entropy lost by ablation that the autoencoder saves.

    (ablated - spliced) / (ablated - clean): 1 is lossless, 0 no better than ablation.

    Raises:
        ValueError: If ablation costs nothing, where it isn't defined.
    """
    if not ablated > clean:
        raise ValueError(
            f"cross-entropy is {ablated} with the layer ablated and {clean} without; ablation must "
            "cost something for a share of it to be saved; use more tokens or another layer"
        )
    return (ablated - spliced) / (ablated - clean)


def next_token_losses(
    logits: Float[Tensor, "context vocabulary"], ids: Int64[Tensor, " context"]
) -> Float32[Tensor, " predictions"]:
    """Cross-entropy of each token given those before it, in nats; lower is better.

    -log softmax(logits[t])[ids[t + 1]], so one prediction less than the context.
    """
    return F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def kl_divergence(
    clean: Float[Tensor, "positions vocabulary"], changed: Float[Tensor, "positions vocabulary"]
) -> Float32[Tensor, " positions"]:
    """KL(clean || changed) of the next-token distributions, in nats; 0 is best.

    sum over the vocabulary of p (log p - log q), p the untouched model's probabilities.
    """
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (clean, changed))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
