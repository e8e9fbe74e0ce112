"""The sparse autoencoder: an encoder, a selection, a decoder, and the units they work in."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config import SaeConfig
from sae.decoding import decode, decode_segments
from sae.encoders import DenseEncoder
from sae.jumprelu import BANDWIDTH, INITIAL_LOG_THRESHOLD, jump
from sae.kron import KronEncoder
from sae.latents import SparseLatents
from sae.ranks import ALONE, Ranks
from sae.scaling import LayerScale, TokenStandardize
from sae.selection import ScoreBlock, Selection, select_above, select_batch_top_k, select_top_k

_UNSET = -1.0


class Reconstruction(NamedTuple):
    """What an autoencoder makes of activations."""

    x_hat: Float[Tensor, "tokens d_model"]
    """Reconstructions, in the model's units."""

    latents: SparseLatents
    """Their code, in the autoencoder's units."""


class SparseAutoencoder(nn.Module):
    """x_hat = latents @ w_dec + b_dec, with latents = selection(encoder(x - b_dec)).

    `encode`, `decode` and `forward` work in the autoencoder's own units; `reconstruct` takes and
    returns the model's. In training mode BatchTopK selects over the batch, in eval mode by its
    running threshold; `reconstruct` always uses the threshold.
    """

    def __init__(
        self,
        cfg: SaeConfig,
        layer_scale: Mapping[int, float],
        *,
        seed: int | None = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Draw the initial weights.

        Args:
            cfg: Architecture.
            layer_scale: For each layer, sqrt(d_model) / (mean norm of its activations). Unused
                with `token_standardize`.
            seed: Of the initial weights, the same on every device and for any number of ranks;
                None leaves them 0, to be loaded.
            ranks: Who shares it (docs/dictionary_parallel.md). This object then holds the latents
                `held` alone, and where its shapes and its codes say d_sae, they are counted.

        Raises:
            ValueError: If there are fewer latents, or heads, than ranks to share them.
        """
        super().__init__()
        self.cfg, self.ranks = cfg, ranks
        if cfg.encoder == "dense":
            self.encoder = DenseEncoder(cfg.d_model, cfg.d_sae, ranks.share(cfg.d_sae))
        else:
            self.encoder = KronEncoder(cfg.d_model, cfg.encoder, ranks.share(cfg.encoder.h))
        self.held = self.encoder.latents
        """The latents that are held here: all of them, if one process has the autoencoder."""
        n_held = len(self.held)
        self.w_dec = nn.Parameter(torch.zeros(n_held, cfg.d_model))
        """(d_sae, d_model): row j is what latent j writes; each row of norm 1."""
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_model))
        """(d_model,)"""
        self.scaling = (
            LayerScale(layer_scale) if cfg.scaling == "layer_scale" else TokenStandardize()
        )
        jumps = cfg.selection == "jumprelu"
        self.log_thresholds = nn.Parameter(torch.zeros(n_held)) if jumps else None
        """(d_sae,): logarithm of each latent's threshold; JumpReLU alone has it."""
        # Smallest value that BatchTopK keeps, averaged over training batches, or what `set_threshold`
        # was given; negative: never set.
        self.register_buffer("threshold", torch.tensor(_UNSET))
        self.threshold: Tensor
        if seed is not None:
            self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw encoder and decoder weights from a seed; biases and threshold as at the start."""
        self.w_dec.copy_(self.encoder.initialise(torch.Generator().manual_seed(seed)))
        self.b_dec.zero_()
        was = self.threshold
        self.threshold = torch.full((), _UNSET, dtype=was.dtype, device=self.b_dec.device)
        if self.log_thresholds is not None:
            self.log_thresholds.fill_(INITIAL_LOG_THRESHOLD)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseAutoencoder":
        """As `nn.Module`, but the threshold keeps float32: steps of 1 % are lost in bfloat16."""
        super()._apply(fn, recurse)
        self.threshold = self.threshold.to(torch.promote_types(self.threshold.dtype, torch.float32))
        return self

    @torch.no_grad()
    def set_threshold(self, threshold: float | Float[Tensor, " d_sae"]) -> None:
        """Select by a threshold at inference: one value for all latents, or one for each.

        A trained BatchTopK has learnt one value. After this, TopK selects by threshold as well.

        Raises:
            ValueError: If it is negative, not finite or of another size, or the selection is
                JumpReLU's, which has learnt thresholds of its own.
        """
        values = torch.as_tensor(threshold, dtype=torch.float32, device=self.threshold.device)
        fits = values.shape in ((), (self.cfg.d_sae,))
        if not fits or not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(
                f"a threshold of shape {tuple(values.shape)} is not one value from 0, nor one for each "
                f"of the {self.cfg.d_sae} latents; give either"
            )
        if self.log_thresholds is not None:
            raise ValueError(
                "JumpReLU has learnt a threshold for each latent; write to log_thresholds to change them"
            )
        self.threshold = (
            values[self.held.start : self.held.stop] if values.ndim else values
        ).clone()

    def encode(self, x: Float[Tensor, "tokens d_model"]) -> SparseLatents:
        """Latents in use, in the autoencoder's units.

        Raises:
            ValueError: If x has another width or rows that aren't finite, or a BatchTopK
                autoencoder in eval mode has no threshold yet.
        """
        with self.ranks.together(x):
            self.check(x)
        return self._encode(x, by_threshold=not self.training)

    def _encode(
        self, x: Tensor, *, by_threshold: bool, only: Tensor | None = None
    ) -> SparseLatents:
        x = x.to(self.b_dec.dtype)
        chosen = self._select(x, by_threshold=by_threshold, only=only)
        values, gates = self.encoder.values(chosen, x, self.b_dec), None
        if self.log_thresholds is not None:
            values, gates = jump(values, self.log_thresholds.exp()[chosen.pattern.indices])
        return SparseLatents(values, chosen.pattern, gates)

    @torch.no_grad()
    def _select(self, x: Tensor, *, by_threshold: bool, only: Tensor | None) -> Selection:
        n_tokens, n_held = len(x), len(self.held)
        k = self.cfg.k if only is None else min(self.cfg.k, len(only))
        if by_threshold and self.log_thresholds is None and bool((self.threshold >= 0).all()):
            blocks = self.encoder.blocks(x - self.b_dec, only)
            return self._select_above(x, blocks, self.threshold.expand(n_held))
        if self.cfg.selection == "topk":
            return self.select_top_k(x - self.b_dec, k, only)
        blocks = self.encoder.blocks(x - self.b_dec, only)
        if self.log_thresholds is not None:
            # In training also those just under their threshold: they are what moves it.
            thresholds = self.log_thresholds.exp() - (0.0 if by_threshold else BANDWIDTH / 2)
            return self._select_above(x, blocks, thresholds)
        if not by_threshold:
            budget = k * n_tokens * self.ranks.n_batch
            return self.ranks.batch_top_k(
                select_batch_top_k(blocks, n_tokens, budget, n_held), budget
            )
        raise ValueError(
            "this BatchTopK autoencoder has no inference threshold; one is learnt by the first training "
            "step in which a latent is on; train it, give one by `set_threshold`, or encode in training "
            "mode (over the batch)"
        )

    @torch.no_grad()
    def select_top_k(
        self,
        centred: Float[Tensor, "tokens d_model"],
        k: int,
        only: Int[Tensor, " latents"] | None = None,
    ) -> Selection:
        """The k largest scores of every token: of all latents, or of those in `only`.

        Args:
            centred: x - b_dec, in the autoencoder's units.
            k: How many.
            only: Latents to choose from, by their place in `held`.
        """
        if only is not None and not len(only):  # another rank has some
            chosen = Selection.empty(centred, len(self.held))
        else:
            blocks = self.encoder.blocks(centred, only)
            chosen = select_top_k(blocks, len(centred), k, len(self.held))
        return self.ranks.top_k(chosen, k)

    def _select_above(
        self, x: Tensor, blocks: Iterable[ScoreBlock], thresholds: Tensor
    ) -> Selection:
        bound = self.encoder.score_bound(thresholds.min().clamp(min=0))
        chosen = select_above(blocks, bound, len(x), len(self.held))
        values = self.encoder.values(chosen, x, self.b_dec)
        return chosen.keep(values > thresholds[chosen.pattern.indices])

    def decode(self, latents: SparseLatents) -> Float[Tensor, "tokens d_model"]:
        """Reconstructions, in the autoencoder's units."""
        return self.written(latents) + self.b_dec

    def written(
        self, latents: SparseLatents, lengths: Float[Tensor, " d_sae"] | None = None
    ) -> Float[Tensor, "tokens d_model"]:
        """What latents write, without the bias. `lengths` is that of `sae.decoding.decode`."""
        return self.ranks.add_up(decode(latents, self.w_dec, lengths))

    def segments(
        self, latents: SparseLatents, lengths: Float[Tensor, " d_sae"] | None = None
    ) -> Float[Tensor, "prefixes tokens d_model"]:
        """What each ring between two prefixes writes (`sae.decoding.decode_segments`)."""
        first, n_held = self.held.start, len(self.held)
        inside = tuple(min(max(size - first, 0), n_held) for size in self.cfg.prefixes)
        return self.ranks.add_up(decode_segments(latents, self.w_dec, inside, lengths))

    def forward(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """Encode and decode, in the autoencoder's units."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def reconstruct(
        self,
        x: Float[Tensor, "tokens d_model"],
        layer: Int[Tensor, " tokens"],
        *,
        only: Int[Tensor, " kept"] | None = None,
    ) -> Reconstruction:
        """Reconstruct activations of the model, at inference: the result depends on no batch.

        Args:
            x: Activations, in the model's units.
            layer: The layer each came from.
            only: Latents that take part in the selection, as if the others weren't there (TopK
                fills k from these); all if None. `sae.progressive` has the form without refill.

        Raises:
            ValueError: If x has another width or rows that aren't finite, a layer has no scale,
                or a BatchTopK autoencoder was never trained; or `only` is given where ranks share
                the autoencoder.
        """
        if only is not None and self.ranks.n_dictionary > 1:
            raise ValueError(
                f"`only` names latents of an autoencoder that {self.ranks.n_dictionary} ranks share; "
                "it is for a whole one; save it and load it in one process"
            )
        inside = x.to(self.b_dec.dtype)
        with self.ranks.together(inside):
            self.check(inside)
            units = self.scaling.units(inside, layer)
        latents = self._encode(units.scale(inside), by_threshold=True, only=only)
        return Reconstruction(units.restore(self.decode(latents)).to(x.dtype), latents)

    def check(self, x: Float[Tensor, "tokens d_model"]) -> None:
        """Refuse activations that no autoencoder of this shape can read.

        Raises:
            ValueError: If x isn't a matrix of width d_model, has no rows, or rows that aren't
                finite.
        """
        if x.ndim != 2 or x.shape[1] != self.cfg.d_model or len(x) == 0:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this autoencoder takes (tokens, {self.cfg.d_model})"
                " with at least one token; pass activations of the model it was made for"
            )
        # One pass; a sum of finite numbers may overflow all the same.
        if x.detach().sum().isfinite():
            return
        bad = (~x.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(x)} rows of x hold NaN or infinity in {x.dtype} (first: row "
                f"{int(bad[0])}); activations are finite; drop those rows or use a wider dtype"
            )

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.cfg.d_model

    @property
    def layer_scale(self) -> dict[int, float]:
        """Factor of each layer; empty with `token_standardize`."""
        if not isinstance(self.scaling, LayerScale):
            return {}
        return dict(zip(self.scaling.layers.tolist(), self.scaling.factors.tolist(), strict=True))
