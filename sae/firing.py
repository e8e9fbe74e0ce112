"""Which latents are dead: tokens since each was last in use."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.latents import SparseLatents
from sae.ranks import ALONE, Ranks


class Firing:
    """Counts, for each latent, the training tokens since it last fired."""

    def __init__(
        self, d_sae: int, device: torch.device | str = "cpu", ranks: Ranks = ALONE
    ) -> None:
        self._ranks = ranks
        self.tokens_since: Int[Tensor, " d_sae"] = torch.zeros(
            d_sae, dtype=torch.int64, device=device
        )

    @torch.no_grad()
    def update(self, latents: SparseLatents) -> None:
        """Count a batch; a latent fires where its value is above 0. Touches entries only."""
        self.tokens_since += latents.n_tokens * self._ranks.n_batch
        self.tokens_since[latents.indices[latents.values > 0]] = 0
        self._ranks.last_use(self.tokens_since)

    def dead(self, after_tokens: int) -> Bool[Tensor, " d_sae"]:
        """Latents unused for at least `after_tokens` tokens."""
        return self.tokens_since >= after_tokens
