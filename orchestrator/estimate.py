"""How long a run will take: what it has to do, over rates that are measured here for ten seconds."""

import math
from dataclasses import dataclass

import torch

from actors.calibration import model_rate, step_rate
from actors.language_model import ModelShape
from orchestrator.config import RunConfig
from orchestrator.plan import Plan
from orchestrator.summary_page import encoder_label
from sae.config import KronShape, SaeConfig

CALIBRATION_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of the long stages, and the rates they come from. Start-up is not counted."""

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
    on_gpu = cfg.compute.gpus_per_actor and torch.cuda.is_available()
    device, threads = "cuda" if on_gpu else "cpu", cfg.compute.cpus_per_actor
    context = cfg.harvest.context or shape.context
    half = CALIBRATION_SECONDS / 2
    tokens = model_rate(cfg.model, context, cfg.harvest.batch_tokens, device, threads, half)
    rates = {}
    for encoder in cfg.sweep.encoders:
        sae = SaeConfig(
            d_model=shape.d_model,
            d_sae=cfg.sweep.d_sae,
            k=max(cfg.sweep.k),
            encoder=encoder,
            selection=cfg.sweep.selection[-1],
            scaling=cfg.sweep.scaling,
        )
        share = half / len(cfg.sweep.encoders)
        kind = {"encoder": "kron", **vars(encoder)} if isinstance(encoder, KronShape) else None
        label = encoder_label(kind or {"encoder": encoder})
        rates[label] = step_rate(sae, cfg.train, device, threads, share)
    trials = figures.n_groups * len(cfg.sweep.k) * len(cfg.sweep.selection)
    trained = math.ceil(cfg.sweep.tokens / cfg.train.batch_tokens) * cfg.train.batch_tokens
    busy = sum(trials * trained / rate for rate in rates.values())
    return Estimate(
        harvest=figures.harvest_tokens / tokens / figures.n_actors["harvester"],
        sweep=busy / figures.n_actors["trainer"],
        evaluate=_evaluated_tokens(cfg, figures, context) / tokens / figures.n_actors["evaluator"],
        model_rate=tokens,
        step_rates=rates,
    )


def _evaluated_tokens(cfg: RunConfig, figures: Plan, context: int) -> int:
    """Through the model for cross-entropy: each layer zeroed, and with each winner of its group."""
    winners = len(cfg.sweep.k) if cfg.sweep.winner == "lowest_fvu_per_k" else 1
    sequences = min(cfg.evaluate.sequences, -(-figures.rows["validation"] // (context - 1)))
    return figures.n_layers * (winners + 1) * sequences * context


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
