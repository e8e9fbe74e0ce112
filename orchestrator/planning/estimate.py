"""How long a run will take: what it has to do, over rates that are measured here for ten seconds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from actors.calibration import model_rate, step_rate
from actors.language_model import ModelShape
from actors.trial import encoder_settings
from orchestrator.config import RunConfig
from orchestrator.labels import encoder_label
from orchestrator.planning.plan import Plan
from orchestrator.sweeps.candidates import corners, n_candidates
from sae.config import KronShape, SaeConfig

CALIBRATION_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of the long stages, and the rates they come from. Start-up is not counted.

    Every trial is taken to be trained to the end, and to be as wide as its kind of encoder can be; n ranks that
    share one to be n times as fast, which counts nothing for what they exchange.
    """

    harvest: float
    sweep: float
    evaluate: float

    model_rate: float
    """Tokens per second that one harvester puts through the model."""

    step_rates: dict[str, float]
    """Tokens per second that one trainer trains on, by encoder."""

    @property
    def total(self) -> float:
        """Of all stages."""
        return self.harvest + self.sweep + self.evaluate


def estimate(cfg: RunConfig, shape: ModelShape, figures: Plan) -> Estimate:
    """Measure for about ten seconds; actors at work at the same time are taken to be as fast each.

    Raises:
        InputError: If the model's configuration can't be loaded.
    """
    device, training_device = (
        "cuda" if gpus and torch.cuda.is_available() else "cpu"
        for gpus in (cfg.compute.gpus_per_actor, cfg.compute.gpus_per_trainer)
    )
    threads = cfg.compute.cpus_per_actor
    context = cfg.harvest.context or shape.context
    half = CALIBRATION_SECONDS / 2
    tokens = model_rate(cfg.model, context, cfg.harvest.batch_tokens, device, threads, half)
    largest = {
        group: _largest(corners(cfg, shape.d_model, group)) for group in range(figures.n_groups)
    }
    kinds = {name: sae for of_group in largest.values() for name, sae in of_group.items()}
    rates = {
        name: step_rate(sae, cfg.train, training_device, threads, half / len(kinds))
        for name, sae in kinds.items()
    }
    trained = math.ceil(cfg.sweep.tokens / cfg.train.batch_tokens) * cfg.train.batch_tokens
    busy = sum(
        n_candidates(cfg, group) / len(encoders) * trained / rates[name]
        for group, encoders in largest.items()
        for name in encoders
    )
    return Estimate(
        harvest=figures.harvest_tokens / tokens / figures.n_actors["harvester"],
        sweep=busy / figures.n_actors["trainer"],
        evaluate=evaluated_tokens(cfg, figures, context) / tokens / figures.n_actors["evaluator"],
        model_rate=tokens,
        step_rates=rates,
    )


def _largest(corners: Iterable[SaeConfig]) -> dict[str, SaeConfig]:
    """Of each kind of encoder the widest, with the largest k; Kronecker shapes differ in their factors."""
    found: dict[tuple[Any, ...], SaeConfig] = {}
    for sae in corners:
        shape = sae.encoder
        kind = (shape.m, shape.n, shape.activation) if isinstance(shape, KronShape) else ()
        found[kind] = max(sae, found.get(kind, sae), key=lambda sae: (sae.d_sae, sae.k))
    return {encoder_label(encoder_settings(sae.encoder)): sae for sae in found.values()}


def n_winners(cfg: RunConfig) -> int:
    """Of a group, at most."""
    if cfg.sweep.winner == "lowest_fvu_per_k":
        return max(len(k.ends) for k, _ in cfg.sweep.kinds())
    return 1


def evaluated_tokens(cfg: RunConfig, figures: Plan, context: int) -> int:
    """Through the model for cross-entropy: each layer ablated in two ways, and with each winner of its group.

    Beside each winner the untouched model, for the divergence.
    """
    sequences = min(cfg.evaluate.sequences, -(-figures.rows["validation"] // (context - 1)))
    return figures.n_layers * (2 * n_winners(cfg) + 2) * sequences * context
