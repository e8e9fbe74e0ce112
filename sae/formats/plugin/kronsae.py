"""KronSAE for SAELens (arXiv 2505.22255): importing this file makes the architecture `kronsae` known to it.

    import sys; sys.path.insert(0, FOLDER); import kronsae
    from sae_lens import SAE
    sae = SAE.load_from_disk(FOLDER)

With u = base rows and v = extension rows of W_enc applied to x - b_dec, b_enc added, latent (i, j) of a
head is sqrt(u_i v_j) where both are positive, else 0. It needs sae_lens 6 and torch, nothing of Strata.
"""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
from sae_lens import SAE, SAEConfig, register_sae_class
from torch import nn


@dataclass
class KronSAEConfig(SAEConfig):
    """Sizes of the factors; d_sae = h * m * n."""

    h: int = 1
    """Heads."""

    m: int = 1
    """Rows of the composition base of a head."""

    n: int = 1
    """Rows of the composition extension of a head."""

    activation: str = "mand"
    """`mand` as above; `relu_product` leaves out the root."""

    k: int = 0
    """The k largest latents are on; 0: those above `threshold`."""

    @classmethod
    def architecture(cls) -> str:
        """As cfg.json names it."""
        return "kronsae"


class KronSAE(SAE[KronSAEConfig]):
    """Latents as products of two thin projections, W_enc (d_in, h*m + h*n)."""

    b_enc: nn.Parameter
    threshold: nn.Parameter

    def initialize_weights(self) -> None:
        """Weights of 0, to be loaded."""
        cfg = self.cfg
        if cfg.h * cfg.m * cfg.n != cfg.d_sae:
            raise ValueError(f"h*m*n = {cfg.h * cfg.m * cfg.n}, and d_sae = {cfg.d_sae}")

        def zeros(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*sizes, dtype=self.dtype, device=self.device))

        n_rows = cfg.h * (cfg.m + cfg.n)
        self.W_enc, self.b_enc = zeros(cfg.d_in, n_rows), zeros(n_rows)
        self.W_dec, self.b_dec = zeros(cfg.d_sae, cfg.d_in), zeros(cfg.d_in)
        self.threshold = zeros(cfg.d_sae)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents, (..., d_sae)."""
        cfg = self.cfg
        factors = self.process_sae_in(x) @ self.W_enc + self.b_enc
        u, v = factors.relu().split([cfg.h * cfg.m, cfg.h * cfg.n], dim=-1)
        product = u.unflatten(-1, (cfg.h, cfg.m, 1)) * v.unflatten(-1, (cfg.h, 1, cfg.n))
        latents = self.hook_sae_acts_pre(self._activation(product.flatten(-3)))
        if cfg.k:
            best = latents.topk(cfg.k, dim=-1)
            latents = torch.zeros_like(latents).scatter(-1, best.indices, best.values)
        else:
            latents = latents * (latents > self.threshold)
        return self.hook_sae_acts_post(latents)

    def _activation(self, product: torch.Tensor) -> torch.Tensor:
        if self.cfg.activation == "relu_product":
            return product
        on = product > 0  # the root's gradient is infinite at 0
        return torch.where(on, torch.where(on, product, 1.0).sqrt(), 0.0)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Reconstructions, (..., d_in)."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    def fold_W_dec_norm(self) -> None:  # noqa: N802 (SAELens's name)
        """Refused: a factor belongs to many latents, so no norm of one can go into it."""
        raise NotImplementedError("the decoder norms of a KronSAE can't be folded into its factors")


register_sae_class("kronsae", KronSAE, KronSAEConfig)
