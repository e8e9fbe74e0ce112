"""Training, without anything but mathematics: a step at a time, resumable bit for bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.firing import Firing
from sae.jumprelu import sparsity_penalty
from sae.latents import SparseLatents
from sae.losses import auxk_loss, auxk_size, nested_loss, total_variance
from sae.sphere import step_on_sphere


class DivergenceError(ValueError):
    """A step whose loss or gradient is not finite; the weights are those before it."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a sparse autoencoder is trained.

    Raises:
        ValueError: If a value is outside its range.
    """

    batch_tokens: int = 4096
    """Tokens a step, as the data loader is asked for them; the step takes what it is given."""

    lr: float | None = None
    """Peak learning rate; None: 2e-4 / sqrt(d_sae / 2^14), the rule of sparsify and Group-SAE."""

    weight_decay: float = 0.0
    """Decoupled (AdamW); 0 is Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""

    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""

    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which it falls linearly to 0."""

    auxk_coefficient: float = 1 / 32
    """Weight of AuxK; 0 turns it off."""

    dead_after_tokens: int = 10_000_000
    """A latent is dead when it was unused for so many tokens."""

    grad_clip: float = 1.0
    """Largest norm of the gradient of all weights together; infinity turns clipping off."""

    threshold_momentum: float = 0.99
    """Of BatchTopK's running threshold."""

    prefix_weights: Literal["equal", "size"] = "equal"
    """Matryoshka: each prefix's loss weighs 1, or in proportion to its size (mean 1)."""

    sparsity_coefficient: float = 1e-3
    """JumpReLU: price of sparsity, in FVU per unit of `sparsity_penalty`; raises L0 as it falls."""

    sparsity_penalty: Literal["step", "tanh"] = "step"
    """JumpReLU: `step` counts latents in use, `tanh` sums tanh of their values."""

    def __post_init__(self) -> None:
        fractions = (self.warmup_fraction, self.decay_fraction)
        faults = {
            "batch_tokens": (self.batch_tokens >= 1, "it counts tokens: 1 or more"),
            "lr": (
                self.lr is None or 0 < self.lr < math.inf,
                "it is positive; leave it out for the rule",
            ),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 (Adam) or more"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "both lie in [0, 1)"),
            "warmup_fraction": (
                min(fractions) >= 0 and sum(fractions) <= 1,
                f"it and decay_fraction={self.decay_fraction} are from 0 and together at most 1",
            ),
            "auxk_coefficient": (0 <= self.auxk_coefficient < math.inf, "0 (off) or more"),
            "dead_after_tokens": (self.dead_after_tokens >= 1, "it counts tokens: 1 or more"),
            "grad_clip": (self.grad_clip > 0, "it is positive; infinity turns clipping off"),
            "threshold_momentum": (0 <= self.threshold_momentum < 1, "it lies in [0, 1)"),
            "prefix_weights": (self.prefix_weights in ("equal", "size"), "it is equal or size"),
            "sparsity_coefficient": (self.sparsity_coefficient >= 0, "0 (no price) or more"),
            "sparsity_penalty": (self.sparsity_penalty in ("step", "tanh"), "it is step or tanh"),
        }
        wrong = [
            f"{name}: {getattr(self, name)!r} can't be; {rule}"
            for name, (holds, rule) in faults.items()
            if not holds
        ]
        if wrong:
            raise ValueError("\n".join(wrong))

    def peak_lr(self, d_sae: int) -> float:
        """`lr`, with the default resolved."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)

    def lr_at(self, step: int, n_steps: int, d_sae: int) -> float:
        """Learning rate of a step, counted from 0: warm-up, plateau, linear fall to 0."""
        warmup, decay = self.warmup_fraction * n_steps, self.decay_fraction * n_steps
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        falling = min(1.0, (n_steps - step) / decay) if decay else 1.0
        return self.peak_lr(d_sae) * max(0.0, min(rising, falling))


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a training step saw, before its update."""

    step: int
    """Steps done, this one included."""

    loss: float
    """What was minimised: FVU in the autoencoder's units, summed over prefixes by their weights, plus AuxK
    and JumpReLU's price of sparsity, each times its coefficient."""

    fvu: float
    """Fraction of variance unexplained of this batch, in the model's units; lower is better."""

    l0: float
    """Mean latents in use per token."""

    dead_fraction: float
    """Share of latents unused for `dead_after_tokens` tokens."""

    auxk_loss: float
    """AuxK: FVU of the residual as dead latents explain it, times the share of k_aux that is dead; 0 while
    none is dead, or AuxK is off."""

    grad_norm: float
    """Norm of the gradient of all weights, before clipping."""

    lr: float
    """Learning rate of this step."""


class Fit:
    """Fits an autoencoder, batch by batch.

    Order of a step: forward, loss, backward, projection of the decoder's gradient, clipping,
    Adam, renormalisation of the decoder's rows. Steps draw no random numbers: given the same state
    and batches, a step on the CPU gives the same bits.
    """

    def __init__(self, sae: SparseAutoencoder, cfg: FitConfig, n_steps: int, seed: int = 0) -> None:
        """Prepare the optimizer.

        Args:
            sae: The autoencoder; trained in place.
            cfg: How to train.
            n_steps: Steps of the whole training, which the learning rate's course depends on.
            seed: Of the weights that `initialise` draws.
        """
        self.sae, self.cfg, self.n_steps, self.seed = sae, cfg, n_steps, seed
        self.step_count = 0
        self.firing = Firing(len(sae.held), sae.b_dec.device, sae.ranks)
        self.adam = torch.optim.AdamW(
            sae.parameters(), lr=1.0, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True
        )

    @torch.no_grad()
    def initialise(self, x: Float[Tensor, "tokens d_model"], layer: Int[Tensor, " tokens"]) -> None:
        """Draw the weights from the seed; set b_dec to the mean of a first batch.

        Args:
            x: Activations, in the model's units; not consumed, train on them too.
            layer: The layer each came from.
        """
        scaled = self._scaled(x, layer)[0]
        self.sae.initialise(self.seed)
        self.sae.b_dec.copy_(self.sae.ranks.batch_mean(scaled))

    def step(self, x: Float[Tensor, "tokens d_model"], layer: Int[Tensor, " tokens"]) -> StepReport:
        """Train on a batch.

        Args:
            x: Activations, in the model's units.
            layer: The layer each came from.

        Raises:
            ValueError: If x has another width or rows that aren't finite, or a layer has no scale;
                nothing is changed then. If the loss overflows: weights and optimizer are not changed.
        """
        sae, ranks = self.sae, self.sae.ranks
        scaled, unit = self._scaled(x, layer)
        sae.train()
        self.adam.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.is_cuda):
            latents = sae.encode(scaled)
        lengths = torch.ones_like(self.firing.tokens_since, dtype=_wide(sae.w_dec.dtype))
        lengths.requires_grad_()
        segments = sae.segments(latents, lengths)
        weights = self._prefix_weights(len(segments))
        # All ranks that divide the latents compute this loss; one of them moves b_dec by it.
        b_dec = sae.b_dec if ranks.dictionary_rank == 0 else sae.b_dec.detach()
        loss, error = nested_loss(scaled, segments, b_dec, weights, ranks)
        self._refuse_overflow("loss", ranks.over_batch(loss))
        self.firing.update(latents)
        dead = self.firing.dead(self.cfg.dead_after_tokens)
        aux = self._auxk(scaled, error, dead, lengths)
        loss = loss + self.cfg.auxk_coefficient * aux
        total = ranks.over_batch(loss)
        if latents.gates is not None:
            paid = sparsity_penalty(latents, self.cfg.sparsity_penalty, ranks)
            paid = self.cfg.sparsity_coefficient * paid
            loss, total = loss + paid, total + ranks.over_batch(ranks.over_latents(paid))
        loss.backward()
        lr = self.cfg.lr_at(self.step_count, self.n_steps, sae.cfg.d_sae)
        norm = self._update(lr, lengths)
        self._track_threshold(latents)
        self.step_count += 1
        n_on = ranks.over_batch((latents.values > 0).sum())
        n_on, n_dead = ranks.over_latents(torch.stack([n_on, dead.sum()]))
        figures = [
            total,
            ranks.over_batch((error * unit).square().sum()) / total_variance(x, ranks),
            n_on / (latents.n_tokens * ranks.n_batch),
            n_dead / sae.cfg.d_sae,
            ranks.over_batch(aux),
            norm,
        ]
        loss, fvu, l0, dead_fraction, aux, norm = torch.stack(
            [figure.detach().float() for figure in figures]
        ).tolist()
        return StepReport(
            step=self.step_count,
            loss=loss,
            fvu=fvu,
            l0=l0,
            dead_fraction=dead_fraction,
            auxk_loss=aux,
            grad_norm=norm,
            lr=lr,
        )

    def _refuse_overflow(self, what: str, value: Tensor) -> None:
        if not value.isfinite():
            self.adam.zero_grad()
            raise DivergenceError(
                f"the {what} of this batch is {value.item()}: its activations are finite, but too large, "
                "or too small, for the products and squares taken of them; lower lr if the first steps went "
                "well, else give layer_scale factors that bring their norm near sqrt(d_model), or drop "
                "rows of massive norm; weights are as they were"
            )

    def _scaled(self, x: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.sae.b_dec.dtype)
        with self.sae.ranks.together(x):
            self.sae.check(x)
            units = self.sae.scaling.units(x, layer)
        return units.scale(x), units.unit

    def _prefix_weights(self, n_prefixes: int) -> Tensor:
        weights = torch.ones(n_prefixes, device=self.sae.b_dec.device)
        if n_prefixes > 1 and self.cfg.prefix_weights == "size":
            weights = torch.tensor(self.sae.cfg.prefixes, device=weights.device).float()
            weights = weights / weights.mean()
        return weights

    def _auxk(self, scaled: Tensor, residual: Tensor, dead: Tensor, lengths: Tensor) -> Tensor:
        """AuxK of Gao et al. 2024: dead latents explain the residual, scaled by how many there are.

        Stays within the encoder and decoder rows of dead latents; b_dec takes no part.
        """
        sae = self.sae
        n_dead = int(sae.ranks.over_latents(dead.sum())) if self.cfg.auxk_coefficient else 0
        if not n_dead:
            return scaled.new_zeros(())
        k_aux = auxk_size(sae.cfg.d_model)
        b_dec = sae.b_dec.detach()
        with torch.autocast(scaled.device.type, dtype=torch.bfloat16, enabled=scaled.is_cuda):
            ids = dead.nonzero().flatten()
            chosen = sae.select_top_k(scaled - b_dec, min(k_aux, n_dead), ids)
        values = sae.encoder.values(chosen, scaled, b_dec)
        explained = sae.written(SparseLatents(values, chosen.pattern), lengths)
        return auxk_loss(residual, explained, sae.ranks) * min(n_dead / k_aux, 1.0)

    @torch.no_grad()
    def _update(self, lr: float, lengths: Tensor) -> Tensor:
        """One step of Adam under the constraint that decoder rows have norm 1."""
        w_dec, b_dec, ranks = self.sae.w_dec, self.sae.b_dec, self.sae.ranks
        gradient, along = w_dec.grad, lengths.grad
        assert gradient is not None
        assert along is not None
        grads = {p: p.grad for p in self.sae.parameters() if p.grad is not None}
        own = [grad for p, grad in grads.items() if p is not b_dec]
        ranks.sum_gradients([*own, along], [grads[b_dec]])
        # What lies along the rows, which have norm 1, is taken out of the decoder's gradient.
        squares = [_square(gradient) - _square(along)]
        # The rest of what this rank holds; b_dec, which all hold, counts once.
        others = {p: grad for p, grad in grads.items() if p is not w_dec}
        if ranks.dictionary_rank > 0:
            del others[b_dec]
        squares += [_square(grad) for grad in others.values()]
        norm = ranks.over_latents(torch.stack(squares).sum()).clamp(min=0).sqrt()
        self._refuse_overflow("gradient's norm", norm)
        clipped = (norm / self.cfg.grad_clip).clamp(min=1.0).float()
        self.adam.param_groups[0]["lr"] = lr
        state = self.adam.state[w_dec]
        along = along[:, None].to(w_dec.dtype)
        step_on_sphere(w_dec, state, self.adam.param_groups[0], gradient, along, clipped)
        w_dec.grad = None
        # Fused Adam divides the gradient by this as it reads it: clipping without a pass of its own.
        self.adam.grad_scale = clipped  # pyright: ignore[reportAttributeAccessIssue]
        self.adam.step()
        self.adam.zero_grad()
        return norm

    @torch.no_grad()
    def _track_threshold(self, latents: SparseLatents) -> None:
        if self.sae.cfg.selection != "batch_topk":
            return
        smallest, threshold = self.sae.ranks.smallest(latents.values), self.sae.threshold
        if smallest is None:
            return
        momentum = self.cfg.threshold_momentum
        moved = momentum * threshold + (1 - momentum) * smallest
        threshold.copy_(torch.where(threshold < 0, smallest, moved))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed fit needs, as tensors by name: `sae.`, `adam.`, `firing.`, `step`."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.adam.state.get(parameter, {}).items():
                state[f"adam.{name}.{key}"] = value
        state["firing.tokens_since"] = self.firing.tokens_since
        state["step"] = torch.tensor(self.step_count)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, to the bit.

        Raises:
            ValueError: If the state is of an autoencoder of another shape.
        """
        weights = {n.removeprefix("sae."): t for n, t in state.items() if n.startswith("sae.")}
        try:
            self.sae.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                "the saved training state does not fit this autoencoder; a fit resumes with the "
                f"configuration it began with; restore that, or start anew ({error})"
            ) from error
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            saved: dict[str, Any] = {
                key.removeprefix(prefix): tensor.to(parameter.device).clone()
                for key, tensor in state.items()
                if key.startswith(prefix)
            }
            self.adam.state.pop(parameter, None)
            if saved:
                self.adam.state[parameter] = saved
        self.firing.tokens_since.copy_(state["firing.tokens_since"])
        self.step_count = int(state["step"])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _square(x: Tensor) -> Tensor:
    """Sum of the squares, in one pass."""
    return torch.dot(x.flatten(), x.flatten())
