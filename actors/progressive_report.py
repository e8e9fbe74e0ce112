"""What is measured of an autoencoder at many sizes; docs/progressive.md has it as JSON."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae.progressive import fit_power_law

CURVE_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One autoencoder with `size` of its latents left."""

    size: int

    fvu: float
    """Over all validation rows; lower is better."""

    l0: float
    """Mean latents in use per row: those that were pruned are not replaced by others."""

    rsa: float | None
    """As `sae.progressive.rsa`; None where the reconstructions are all alike."""

    ce: float | None
    """Cross-entropy in nats per token with the reconstructions in place; None of an encoder."""

    ce_recovered: float | None
    """1 is lossless, 0 no better than zeros; None of an encoder."""


@dataclass(frozen=True, kw_only=True)
class ImportanceLaw:
    """Importance against rank, and how well a power of the rank says it (`sae.progressive.PowerLaw`)."""

    factor: float
    exponent: float
    r_squared: float
    exponential_r_squared: float
    first_rank: int
    last_rank: int

    ranks: tuple[int, ...]
    """Up to `CURVE_RANKS` of the ranks, evenly spaced in the logarithm."""

    values: tuple[float, ...]
    """The importance at each."""

    @classmethod
    def of(cls, importances: Float[Tensor, " latents"]) -> "ImportanceLaw | None":
        """The law over all importances above 0, in any order; None if these are fewer than three."""
        ranked = importances.double().cpu()
        ranked = ranked[ranked > 0].sort(descending=True).values
        if len(ranked) < 3:
            return None
        ranks = np.unique(np.geomspace(1, len(ranked), CURVE_RANKS).round().astype(int))
        return cls(
            **asdict(fit_power_law(ranked)),
            ranks=tuple(ranks.tolist()),
            values=tuple(ranked[ranks - 1].tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class ProgressiveReport:
    """One autoencoder at all sizes on one layer."""

    layer: int
    d_sae: int
    prefixes: tuple[int, ...]

    n_importance_rows: int
    """Pilot rows, of all layers of the group, that the orders are found on."""

    n_rows: int
    """Validation rows of FVU and L0."""

    n_rsa_rows: int

    n_sequences: int | None
    """That cross-entropy is over; None of an encoder, as the three below."""

    n_tokens: int | None
    ce_clean: float | None
    ce_zero: float | None

    curves: dict[str, tuple[CurvePoint, ...]]
    """Per order, sizes rising: `energy`, `frequency`, `decoder`, `random`; `nested` of Matryoshka."""

    power_laws: dict[str, ImportanceLaw | None]
    """Of `energy`, `frequency` and `spectrum`, over all layers of the group; None: too few latents."""
