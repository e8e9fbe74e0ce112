"""What each stage of a run asks of a cluster: time by term, bytes, requests, results for the driver.

Nothing is measured here; the assumptions are those of `Hardware`.
"""

import math
from dataclasses import dataclass

from actors.language_model import ModelShape
from actors.row_counts import counting_size
from orchestrator.config import RunConfig
from orchestrator.planning import requests
from orchestrator.planning.at_work import Actors
from orchestrator.planning.estimate import evaluated_tokens, n_winners
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import Plan
from storage.layout import StoreSpec
from storage.reading import REQUESTS_AT_ONCE

HOUR = 3600.0

SAMPLE_SECONDS = 30.0
"""Between two rows of the driver's machine, each a call to MLflow."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What one stage asks for."""

    name: str

    seconds: dict[str, float]
    """By term, if nothing else were in the way."""

    uses_gpus: bool
    before: float = 0.0
    """Seconds until the terms begin: what each process asks for first, one after the other."""

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
        return (self.before + self.seconds[self.limit]) / HOUR


def pack(figures: Plan, hardware: Hardware) -> StageLoad:
    """One process tokenizes and writes."""
    specs = _packed(figures)
    n_tokens = sum(s.n_population * context_of(s) for s in specs)
    written = figures.disk_bytes["tokens"]
    puts = _token_files(figures)
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
    name: str,
    stores: tuple[str, ...],
    figures: Plan,
    hardware: Hardware,
    actors: Actors,
    token_seconds: float,
) -> StageLoad:
    """Some stores are filled, where a token's forward pass takes `token_seconds` of a GPU."""
    specs = [figures.specs[store] for store in stores]
    busy = token_seconds * sum(spec.n_sequences * context_of(spec) for spec in specs)
    written = sum(figures.disk_bytes[store] for store in stores)
    puts = sum(map(requests.store_puts, specs))
    shards = sum(spec.n_shards for spec in specs)
    at_work, opening = actors.at_work(shards), _token_files(figures)
    gets = sum(requests.token_gets(spec, context_of(spec)) for spec in specs) + at_work * opening
    seconds = {
        **_computing(busy, actors, at_work),
        "writing": written / hardware.bucket_bytes_per_second / at_work,
        "requests": max(puts / hardware.puts_per_second, gets / hardware.gets_per_second),
        "head node": shards / hardware.results_per_second,
    }
    calls = 4 + samples(seconds)
    return StageLoad(
        name=name,
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        before=opening * hardware.request_seconds,
        written=written,
        puts=puts,
        gets=gets,
        results=shards,
        mlflow_calls=calls,
    )


def group(cfg: RunConfig, figures: Plan, hardware: Hardware, actors: Actors) -> StageLoad:
    """Every process that harvests compares the layers of a shard, on a core; one reads all norms, twice."""
    spec, passes = figures.specs["pilot"], 1 + cfg.group.center
    n_layers, at_work = len(spec.arrays), actors.at_work(spec.n_shards)
    read = passes * figures.disk_bytes["pilot"]
    gets = passes * requests.array_gets(spec, spec.n_rows, n_layers)
    norms = requests.norm_gets(spec)
    flops = spec.n_rows * 2.0 * n_layers**2 * spec.d_model
    seconds = {
        "CPUs": flops / hardware.angles_flops / at_work,
        "reading": _one_by_one(gets, read, hardware) / at_work,
        "requests": (gets + norms) / hardware.gets_per_second,
        "one process": norms * hardware.request_seconds / REQUESTS_AT_ONCE,
        "head node": passes * spec.n_shards / hardware.results_per_second,
    }
    calls = 8 + samples(seconds)
    return StageLoad(
        name="group",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,  # which wait
        read=read,
        gets=gets + norms,
        results=passes * spec.n_shards,
        mlflow_calls=calls,
    )


def count_rows(figures: Plan, hardware: Hardware, actors: Actors) -> StageLoad:
    """Every process that harvests counts some shards at a time, from their columns."""
    spec = figures.specs["train"]
    together = counting_size(spec)
    jobs = math.ceil(spec.n_shards / together)
    at_work, gets = actors.at_work(jobs), requests.count_gets(spec)
    read = spec.n_rows * sum(requests.counted_columns(spec).values())
    seconds = {
        "reading": read / hardware.bucket_bytes_per_second / at_work,
        "requests": gets / hardware.gets_per_second,
        "waiting": gets * hardware.request_seconds / together / at_work,
        "head node": jobs / hardware.results_per_second,
    }
    calls = 4 + samples(seconds)
    return StageLoad(
        name="count rows",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,  # which wait
        read=read,
        gets=gets,
        results=jobs,
        mlflow_calls=calls,
    )


def evaluate(
    cfg: RunConfig,
    shape: ModelShape,
    figures: Plan,
    hardware: Hardware,
    actors: Actors,
    token_seconds: float,
) -> StageLoad:
    """Every layer is judged with each winner; `token_seconds` as for `harvest`, to which the model's head comes."""
    context = cfg.harvest.context or shape.context
    head = (
        2.0 * shape.d_model * shape.vocabulary / (hardware.gpu_flops * hardware.model_utilisation)
    )
    busy = evaluated_tokens(cfg, figures, context) * (token_seconds + head)
    spec, winners = figures.specs["validation"], n_winners(cfg)
    jobs = winners * figures.n_layers
    at_work = actors.at_work(jobs, bounded=False)
    read = winners * figures.disk_bytes["validation"]
    gets, opening = jobs * requests.array_gets(spec, spec.n_rows), _token_files(figures)
    seconds = {
        **_computing(busy, actors, at_work),
        "reading": _one_by_one(gets, read, hardware) / at_work,
        "requests": (gets + at_work * opening) / hardware.gets_per_second,
        "head node": jobs / hardware.results_per_second,
    }
    calls = figures.n_groups * 6 + samples(seconds)
    return StageLoad(
        name="evaluate",
        seconds={**seconds, "MLflow": calls / hardware.mlflow_calls_per_second},
        uses_gpus=True,
        before=opening * hardware.request_seconds,
        read=read,
        gets=gets + at_work * opening,
        results=jobs,
        mlflow_calls=calls,
    )


def context_of(spec: StoreSpec) -> int:
    """Tokens of a sequence."""
    return spec.first_position + spec.rows_per_sequence


def samples(seconds: dict[str, float]) -> int:
    """Rows of the driver's machine in a stage with such terms."""
    return math.ceil(max(seconds.values()) / SAMPLE_SECONDS)


def _computing(busy: float, actors: Actors, at_work: int) -> dict[str, float]:
    """The terms of so many GPU seconds: with as many processes as there is room for, and where fewer are at work."""
    fewer = busy / actors.computing(at_work) if at_work < actors.room else 0.0
    return {"GPUs": busy / actors.computing(actors.room), "too few processes for the GPUs": fewer}


def _one_by_one(gets: int, read: int, hardware: Hardware) -> float:
    """Seconds of one reader that asks for a chunk when it has the one before it."""
    each = hardware.bucket_bytes_per_second / REQUESTS_AT_ONCE
    return gets * hardware.request_seconds + read / each


def _packed(figures: Plan) -> list[StoreSpec]:
    return [figures.specs["train"], figures.specs["validation"]]


def _token_files(figures: Plan) -> int:
    """Of both arrays, in both splits; who opens the store asks for the length of each."""
    return 2 * sum(requests.token_files(s.n_population, context_of(s)) for s in _packed(figures))
