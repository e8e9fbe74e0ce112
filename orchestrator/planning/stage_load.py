"""What each stage of a run asks of a cluster: time by term, bytes, requests, results for the driver.

Nothing is measured here; the assumptions are those of `Hardware`.
"""

import math
from dataclasses import dataclass

from actors.language_model import ModelShape
from orchestrator.config import RunConfig
from orchestrator.planning import requests
from orchestrator.planning.estimate import evaluated_tokens
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import Plan
from orchestrator.sweeps.candidates import candidates, corners, n_candidates
from orchestrator.sweeps.tune_trial import REPORTS_PER_TRIAL
from sae.config import SaeConfig
from sae.parallel.payload import step_payload
from storage.dtypes import stored_dtype
from storage.layout import StoreSpec
from storage.reading import REQUESTS_AT_ONCE

HOUR = 3600.0

OPTIMISER_PASSES = 7
"""Over all parameters in float32 at a step: weights, gradients and two moments read, all but gradients written."""

CALLS_PER_TRIAL = REPORTS_PER_TRIAL + 8
"""To MLflow: one for each report at most; to make it, its settings, result, two files, end, and its judgement."""

SAMPLE_SECONDS = 30.0
"""Between two rows of the driver's machine, each a call to MLflow."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What one stage asks for."""

    name: str

    seconds: dict[str, float]
    """By term, if nothing else were in the way."""

    uses_gpus: bool
    written: int = 0
    """Bytes that go to the bucket."""

    read: int = 0
    """Bytes that come from it."""

    puts: int = 0
    gets: int = 0
    results: int = 0
    """That the driver takes in."""

    mlflow_calls: int = 0

    @property
    def limit(self) -> str:
        """The term that takes longest."""
        return max(self.seconds, key=lambda term: self.seconds[term])

    @property
    def hours(self) -> float:
        """Of the stage."""
        return self.seconds[self.limit] / HOUR


def pack(figures: Plan, hardware: Hardware) -> StageLoad:
    """One process tokenizes and writes."""
    n_tokens = sum(s.n_population * _context(s) for s in _packed(figures))
    written = figures.disk_bytes["tokens"]
    puts = requests.puts(written)
    return StageLoad(
        name="pack",
        seconds={
            "tokenizing": n_tokens / hardware.packed_tokens_per_second,
            "writing": written / hardware.bucket_bytes_per_second,
            "requests": puts / hardware.puts_per_second,
        },
        uses_gpus=False,
        written=written,
        puts=puts,
    )


def harvest(
    name: str, stores: tuple[str, ...], figures: Plan, hardware: Hardware, token_seconds: float
) -> StageLoad:
    """Some stores are filled, where a token's forward pass takes `token_seconds` of all GPUs together."""
    specs = [figures.specs[store] for store in stores]
    n_tokens = sum(spec.n_sequences * _context(spec) for spec in specs)
    written = sum(figures.disk_bytes[store] for store in stores)
    puts = sum(map(requests.store_puts, specs))
    shards = sum(spec.n_shards for spec in specs)
    seconds = {
        "GPUs": n_tokens * token_seconds,
        "writing": written / hardware.bucket_bytes_per_second / hardware.gpus,
        "requests": puts / hardware.puts_per_second,
        "head node": shards / hardware.results_per_second,
    }
    calls = 4 + _samples(seconds)
    return StageLoad(
        name=name,
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        written=written,
        puts=puts,
        gets=shards,  # each reads its tokens
        results=shards,
        mlflow_calls=calls,
    )


def group(cfg: RunConfig, figures: Plan, hardware: Hardware) -> StageLoad:
    """Every process that harvests compares the layers of a shard, on a core; one reads all norms, twice."""
    spec, passes = figures.specs["pilot"], 1 + cfg.group.center
    n_layers, processes = len(spec.arrays), hardware.gpus / max(cfg.compute.gpus_per_actor, 1.0)
    read = passes * figures.disk_bytes["pilot"]
    gets = passes * requests.array_gets(spec, spec.n_rows, n_layers)
    norms = (2 * n_layers + 2) * spec.n_shards
    flops = spec.n_rows * 2.0 * n_layers**2 * spec.d_model
    seconds = {
        "CPUs": flops / hardware.angles_flops / processes,
        "reading": read / hardware.bucket_bytes_per_second / processes,
        "requests": (gets + norms) / hardware.gets_per_second,
        "one process": norms * hardware.request_seconds / REQUESTS_AT_ONCE,
        "head node": passes * spec.n_shards / hardware.results_per_second,
    }
    calls = 8 + _samples(seconds)
    return StageLoad(
        name="group",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,  # which wait
        read=read,
        gets=gets + norms,
        results=passes * spec.n_shards,
        mlflow_calls=calls,
    )


def sweep(cfg: RunConfig, shape: ModelShape, figures: Plan, hardware: Hardware) -> StageLoad:
    """Every trial is taken to be trained to the end, and to read for itself what its bundle shares.

    Ranks of a trial read whole batches each, and wait for what they exchange.
    """
    spec, n_tokens = figures.specs["train"], cfg.sweep.tokens
    saes = [sae for group in range(figures.n_groups) for sae in _trained(cfg, shape, group)]
    grid = cfg.compute.ranks
    reading = math.ceil(len(saes) / cfg.compute.trials_per_actor) * grid.n_ranks
    row = spec.d_model * stored_dtype(spec.dtype).itemsize
    gets = reading * requests.array_gets(spec, n_tokens)
    rate = hardware.gpu_flops * hardware.training_utilisation
    steps = math.ceil(n_tokens / cfg.train.batch_tokens)
    busy = sum(
        n_tokens * sae.training_flops_per_token / rate
        + steps
        * grid.batch
        * sae.n_parameters
        * 4
        * OPTIMISER_PASSES
        / hardware.gpu_bytes_per_second
        + steps * grid.n_ranks * _exchange_seconds(cfg, sae, hardware)
        for sae in saes
    )
    # A process uses one GPU or a share of one; what it is given beyond that waits.
    given = cfg.compute.gpus_per_trainer or 1.0
    at_work = min(hardware.gpus / max(given, 1.0), math.ceil(reading * min(given, 1.0)))
    results = len(saes) * REPORTS_PER_TRIAL
    seconds = {
        "GPUs": busy / hardware.gpus,
        "too few trials for the GPUs": busy / at_work if at_work < hardware.gpus else 0.0,
        "reading": reading * n_tokens * row / hardware.bucket_bytes_per_second / at_work,
        "requests": gets / hardware.gets_per_second,
        "head node": results / hardware.results_per_second,
    }
    calls = len(saes) * CALLS_PER_TRIAL + _samples(seconds)
    return StageLoad(
        name="sweep",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        read=reading * n_tokens * row,
        gets=gets,
        results=results,
        mlflow_calls=calls,
    )


def evaluate(
    cfg: RunConfig, shape: ModelShape, figures: Plan, hardware: Hardware, token_seconds: float
) -> StageLoad:
    """Every layer is judged; `token_seconds` as for `harvest`, to which the model's head comes."""
    context = cfg.harvest.context or shape.context
    head = (
        2.0 * shape.d_model * shape.vocabulary / (hardware.gpu_flops * hardware.model_utilisation)
    )
    n_tokens = evaluated_tokens(cfg, figures, context)
    spec = figures.specs["validation"]
    read = figures.disk_bytes["validation"]
    gets = figures.n_layers * requests.array_gets(spec, spec.n_rows)
    seconds = {
        "GPUs": n_tokens * (token_seconds + head / hardware.gpus),
        "reading": read / hardware.bucket_bytes_per_second / hardware.gpus,
        "requests": gets / hardware.gets_per_second,
        "head node": figures.n_layers / hardware.results_per_second,
    }
    calls = figures.n_groups * 6 + _samples(seconds)
    return StageLoad(
        name="evaluate",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        read=read,
        gets=gets,
        results=figures.n_layers,
        mlflow_calls=calls,
    )


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


def _trained(cfg: RunConfig, shape: ModelShape, group: int) -> list[SaeConfig]:
    """Of a group; of what Optuna will suggest, the largest there can be."""
    if cfg.sweep.search.method != "optuna":
        return [found.sae for found in candidates(cfg, group, shape.d_model)]
    largest = max(corners(cfg, shape.d_model, group), key=lambda sae: sae.training_flops_per_token)
    return [largest] * n_candidates(cfg, group)


def _packed(figures: Plan) -> list[StoreSpec]:
    return [figures.specs["train"], figures.specs["validation"]]


def _context(spec: StoreSpec) -> int:
    return spec.first_position + spec.rows_per_sequence


def _samples(seconds: dict[str, float]) -> int:
    return math.ceil(max(seconds.values()) / SAMPLE_SECONDS)
