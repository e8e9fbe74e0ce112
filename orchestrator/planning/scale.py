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
from orchestrator.planning import at_work, stage_load
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import Plan
from orchestrator.planning.stage_load import HOUR, StageLoad
from orchestrator.planning.sweep_load import sweep

MONTH_HOURS = 730.0


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

    doubts: tuple[str, ...]
    """What a run with these settings would not do on that cluster."""

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
    actors = at_work.actors(cfg.compute, hardware, turns)
    token_seconds = flops / (hardware.gpu_flops * hardware.model_utilisation)
    cluster = (figures, hardware, actors)
    trainer = figures.actors["trainer"]
    return Scale(
        hardware=hardware,
        stages=(
            stage_load.pack(figures, hardware),
            stage_load.harvest("harvest pilot", ("pilot", "validation"), *cluster, token_seconds),
            stage_load.group(cfg, *cluster),
            stage_load.harvest("harvest train", ("train",), *cluster, token_seconds),
            stage_load.count_rows(*cluster),
            sweep(cfg, shape, figures, hardware),
            stage_load.evaluate(cfg, shape, *cluster, token_seconds),
        ),
        gpus_per_harvester=turns,
        trainer_fits=(trainer.device or trainer.host) <= hardware.gpu_memory_bytes,
        stored_bytes=figures.total_disk_bytes,
        doubts=tuple(at_work.doubts(cfg, hardware, actors)),
    )


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
