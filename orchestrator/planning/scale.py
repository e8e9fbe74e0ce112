"""What a run asks of a cluster, stage by stage, and which term limits each first (docs/scale.md).

All of it follows from the configuration, the model's config file and the figures of `Hardware`; nothing is
measured here. Stores lie in a bucket. A stage's terms go on at the same time, so the longest is its time.
"""

import math
from dataclasses import dataclass
from typing import Any

from actors.language_model import ModelShape
from actors.model_flops import forward_flops_per_token
from orchestrator.config import RunConfig
from orchestrator.planning.estimate import evaluated_tokens
from orchestrator.planning.plan import Plan
from orchestrator.sweeps.candidates import candidates, corners, n_candidates
from orchestrator.sweeps.tune_trial import REPORTS_PER_TRIAL
from sae.config import SaeConfig
from storage.dtypes import stored_dtype
from storage.layout import StoreSpec
from storage.object_store import PART_BYTES

HOUR = 3600.0
MONTH_HOURS = 730.0

OPTIMISER_PASSES = 7
"""Over all parameters in float32 at a step: weights, gradients and two moments read, all but gradients written."""

CALLS_PER_TRIAL = REPORTS_PER_TRIAL + 8
"""To MLflow: one for each report at most; to make it, its settings, result, two files, end, and its judgement."""

SAMPLE_SECONDS = 30.0
"""Between two rows of the driver's machine, each a call to MLflow."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What machines and services are taken to do, and to cost. Prices are in US dollars."""

    gpus: int = 64

    gpu_flops: float = 990e12
    """Of a GPU in bfloat16, multiply-adds being two (NVIDIA's figure for an H100 SXM, without sparsity)."""

    model_utilisation: float = 0.4
    """Of these, in a forward pass of a language model."""

    training_utilisation: float = 0.15
    """The same in an autoencoder's step, whose latents are sparse and have to be chosen."""

    gpu_memory_bytes: float = 80e9
    gpu_bytes_per_second: float = 2e12
    """Of its memory, reached (3.35e12 by NVIDIA's figure)."""

    bucket_bytes_per_second: float = 1.5e9
    """Between the bucket and the node, for each GPU: an eighth of 100 Gbit/s."""

    puts_per_second: float = 3500.0
    gets_per_second: float = 5500.0
    """Of one prefix, as S3 states them before it divides a prefix."""

    packed_tokens_per_second: float = 1e6
    """Of the one process that tokenizes."""

    results_per_second: float = 200.0
    """That the driver takes in: receipts of shards, reports of trials."""

    mlflow_calls_per_second: float = 30.0
    """33 ms each, as measured on SQLite and over HTTP for ten figures a call."""

    gpu_hour: float = 3.0
    head_hour: float = 0.4
    put: float = 5e-6
    get: float = 4e-7
    gigabyte_month: float = 0.023


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


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A run on a cluster."""

    hardware: Hardware
    stages: tuple[StageLoad, ...]

    gpus_per_harvester: int
    """That the model needs for its memory alone, taking turns."""

    trainer_fits: bool
    """Whether the largest trainer's memory is one GPU's."""

    stored_bytes: int

    @property
    def hours(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.hours for stage in self.stages)

    def dollars(self) -> dict[str, float]:
        """By what is paid: GPUs are while a stage that uses them lasts, at work or not."""
        paid, stages = self.hardware, self.stages
        gpu = sum(s.hours for s in stages if s.uses_gpus) * paid.gpus * paid.gpu_hour
        months = self.hours / MONTH_HOURS
        return {
            "GPUs": gpu,
            "head node": self.hours * paid.head_hour,
            "requests": sum(s.puts * paid.put + s.gets * paid.get for s in stages),
            "storage": self.stored_bytes / 1e9 * paid.gigabyte_month * months,
        }


def model_flops(cfg: RunConfig, shape: ModelShape, figures: Plan) -> float:
    """Of a forward pass, per token: counted, or of a model that can't be counted two per parameter.

    Raises:
        InputError: If the model's configuration can't be loaded.
    """
    context = cfg.harvest.context or shape.context
    return forward_flops_per_token(cfg.model, context) or 2.0 * figures.n_parameters


def scale(
    cfg: RunConfig, shape: ModelShape, figures: Plan, flops: float, hardware: Hardware
) -> Scale:
    """The figures of a run on a cluster.

    Args:
        cfg: Of the run.
        shape: Of its model.
        figures: Its plan.
        flops: As `model_flops` gives them.
        hardware: The cluster.
    """
    harvester = figures.actors["harvester"]
    model_bytes = harvester.device or harvester.host
    turns = math.ceil(model_bytes / hardware.gpu_memory_bytes)
    model_rate = hardware.gpu_flops * hardware.model_utilisation / turns * hardware.gpus
    trainer = figures.actors["trainer"]
    return Scale(
        hardware=hardware,
        stages=(
            _pack(figures, hardware),
            _harvest(
                "harvest pilot", ("pilot", "validation"), figures, hardware, flops / model_rate
            ),
            _harvest("harvest train", ("train",), figures, hardware, flops / model_rate),
            _sweep(cfg, shape, figures, hardware),
            _evaluate(cfg, shape, figures, hardware, flops / model_rate),
        ),
        gpus_per_harvester=turns,
        trainer_fits=(trainer.device or trainer.host) <= hardware.gpu_memory_bytes,
        stored_bytes=figures.total_disk_bytes,
    )


def _pack(figures: Plan, hardware: Hardware) -> StageLoad:
    n_tokens = sum(s.n_population * _context(s) for s in _packed(figures))
    written = figures.disk_bytes["tokens"]
    puts = _requests(written, 1)
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


def _harvest(
    name: str, stores: tuple[str, ...], figures: Plan, hardware: Hardware, token_seconds: float
) -> StageLoad:
    specs = [figures.specs[store] for store in stores]
    n_tokens = sum(spec.n_sequences * _context(spec) for spec in specs)
    written = sum(figures.disk_bytes[store] for store in stores)
    puts = sum(map(_shard_puts, specs))
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


def _sweep(cfg: RunConfig, shape: ModelShape, figures: Plan, hardware: Hardware) -> StageLoad:
    """Every trial is taken to be trained to the end, and to read for itself what its bundle shares."""
    spec, n_tokens = figures.specs["train"], cfg.sweep.tokens
    saes = [sae for group in range(figures.n_groups) for sae in _trained(cfg, shape, group)]
    reading = math.ceil(len(saes) / cfg.compute.trials_per_actor)
    row = spec.d_model * stored_dtype(spec.dtype).itemsize
    gets = reading * math.ceil(n_tokens / spec.chunk_rows)
    rate = hardware.gpu_flops * hardware.training_utilisation
    steps = math.ceil(n_tokens / cfg.train.batch_tokens)
    busy = sum(
        n_tokens * sae.training_flops_per_token / rate
        + steps * sae.n_parameters * 4 * OPTIMISER_PASSES / hardware.gpu_bytes_per_second
        for sae in saes
    )
    # No more GPUs than trials: one trains on one.
    at_work = min(hardware.gpus, reading)
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


def _evaluate(
    cfg: RunConfig, shape: ModelShape, figures: Plan, hardware: Hardware, token_seconds: float
) -> StageLoad:
    context = cfg.harvest.context or shape.context
    head = (
        2.0 * shape.d_model * shape.vocabulary / (hardware.gpu_flops * hardware.model_utilisation)
    )
    n_tokens = evaluated_tokens(cfg, figures, context)
    spec = figures.specs["validation"]
    read = figures.disk_bytes["validation"]
    gets = figures.n_layers * math.ceil(spec.n_rows / spec.chunk_rows)
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


def _shard_puts(spec: StoreSpec) -> int:
    """Requests that write a store: the arrays in parts, a file for each column, and the commit, of each shard."""
    rows = min(spec.shard_rows, spec.n_rows)
    array = rows * spec.d_model * stored_dtype(spec.dtype).itemsize
    each = sum(_requests(array, 1) for _ in spec.arrays) + len(spec.columns) + 1
    return spec.n_shards * each


def _requests(n_bytes: int, n_objects: int) -> int:
    """That write so many bytes: large objects go up in parts, which are begun and put together."""
    each = math.ceil(n_bytes / n_objects)
    return n_objects * (1 if each <= PART_BYTES else math.ceil(each / PART_BYTES) + 2)


def _samples(seconds: dict[str, float]) -> int:
    return math.ceil(max(seconds.values()) / SAMPLE_SECONDS)


def as_rows(found: Scale) -> list[dict[str, Any]]:
    """A row per stage, for tables."""
    return [
        {
            "stage": stage.name,
            "hours": stage.hours,
            "limit": stage.limit,
            "gpu_hours": stage.seconds.get("GPUs", 0.0) / HOUR * found.hardware.gpus,
            "written": stage.written,
            "read": stage.read,
            "puts": float(stage.puts),
            "gets": float(stage.gets),
            "results_per_second": stage.results / max(stage.hours * HOUR, 1e-9),
            "mlflow_per_second": stage.mlflow_calls / max(stage.hours * HOUR, 1e-9),
        }
        for stage in found.stages
    ]
