"""What the sweep asks of a cluster: as `stage_load`, for trials and what they read together."""

import math

from actors.language_model import ModelShape
from orchestrator.config import RunConfig
from orchestrator.planning import at_work, requests
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import Plan
from orchestrator.planning.stage_load import StageLoad, samples
from orchestrator.sweeps.candidates import foreseen
from orchestrator.sweeps.tune_trial import reports
from sae.config import SaeConfig
from sae.parallel.payload import step_payload
from storage.dtypes import stored_dtype

OPTIMISER_PASSES = 7
"""Over all parameters in float32 at a step: weights, gradients and two moments read, all but gradients written."""

CALLS_PER_TRIAL = 8
"""To MLflow, beside one for each report at most: to make it, its settings, result, two files, end, and its judgement."""


def sweep(cfg: RunConfig, shape: ModelShape, figures: Plan, hardware: Hardware) -> StageLoad:
    """Every trial is taken to be trained to the end, and those of a group on one node to be in step.

    What they ask for is read once on each node, by a process that all there ask. Ranks of a trial ask for whole batches
    each, and wait for what they exchange.
    """
    spec, n_tokens = figures.specs["train"], cfg.sweep.tokens
    groups = [foreseen(cfg, group, shape.d_model) for group in range(figures.n_groups)]
    saes = [sae for of_group in groups for sae in of_group]
    trainers = at_work.trainers(cfg.compute, hardware, list(map(len, groups)))
    row = spec.d_model * stored_dtype(spec.dtype).itemsize
    read = trainers.readings * n_tokens * row
    gets = trainers.readings * requests.array_gets(spec, n_tokens)
    busy = sum(_training_seconds(cfg, sae, hardware) for sae in saes)
    results = len(saes) * reports(math.ceil(n_tokens / cfg.train.batch_tokens))
    fewer = trainers.computing < hardware.gpus
    seconds = {
        "GPUs": busy / hardware.gpus,
        "too few trials for the GPUs": busy / trainers.computing if fewer else 0.0,
        "reading": read / hardware.bucket_bytes_per_second / trainers.keepers,
        "requests": gets / hardware.gets_per_second,
        "head node": results / hardware.results_per_second,
    }
    calls = results + len(saes) * CALLS_PER_TRIAL + samples(seconds)
    return StageLoad(
        name="sweep",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        read=read,
        gets=gets,
        results=results,
        mlflow_calls=calls,
    )


def _training_seconds(cfg: RunConfig, sae: SaeConfig, hardware: Hardware) -> float:
    """GPU seconds of a trial, of all its ranks together."""
    grid, n_tokens = cfg.compute.ranks, cfg.sweep.tokens
    steps = math.ceil(n_tokens / cfg.train.batch_tokens)
    rate = hardware.gpu_flops * hardware.training_utilisation
    passes = grid.batch * sae.n_parameters * 4 * OPTIMISER_PASSES / hardware.gpu_bytes_per_second
    exchange = grid.n_ranks * _exchange_seconds(cfg, sae, hardware)
    return n_tokens * sae.training_flops_per_token / rate + steps * (passes + exchange)


def _exchange_seconds(cfg: RunConfig, sae: SaeConfig, hardware: Hardware) -> float:
    """Of a step, while which the ranks of a trial wait for one another's numbers (docs/dictionary_parallel.md)."""
    grid = cfg.compute.ranks
    if grid.n_ranks == 1:
        return 0.0
    payload = step_payload(
        sae,
        math.ceil(cfg.train.batch_tokens / grid.batch),
        n_dictionary=grid.latents,
        n_batch=grid.batch,
    )
    sent = (1 - 1 / grid.n_ranks) * (2 * payload["all_reduce"] + payload["all_to_all"])
    return sent / hardware.link_bytes_per_second
