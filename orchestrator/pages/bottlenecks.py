"""Where a run's time went, and what limited each stage."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from orchestrator.progress import WAIT_LIMIT, bottleneck
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.sweeps.winners import Result
from storage.files import read_json_lines


def bottlenecks(run: RunDirectory, results: Sequence[Result]) -> dict[str, Any]:
    """The content of that section: `stages` (rows of a table), the waits for data, and `load`.

    A stage whose limit nobody recorded has None in its place.
    """
    seconds = run.stage_seconds()
    journal = run.path / "mlflow.json"
    noted = read_json(journal)["stages"] if journal.is_file() else {}
    total = sum(seconds.values()) or 1.0
    waits = [float(result["data_wait_fraction"]) for result in results]
    stages = []
    for name, spent in seconds.items():
        metrics = noted.get(name, {}).get("metrics", {})
        stages.append(
            {
                "name": name.replace("_", " "),
                "seconds": spent,
                "share": spent / total,
                "rate": _rate(name, metrics, results, spent),
                "limit": _sweep_limit(waits) if name == "sweep" else _harvest_limit(metrics),
            }
        )
    load = load_until_the_end(run)
    return {
        "stages": stages,
        "longest": max(stages, key=lambda stage: stage["seconds"], default=None),
        "typical_wait": median(waits),
        "worst_wait": max(waits),
        "wait_limit": WAIT_LIMIT,
        "load": _mean_load(load) if load else None,
    }


def load_until_the_end(run: RunDirectory) -> list[dict[str, Any]]:
    """Rows of the machine's load up to the evaluation's end: later ones are of writing the report."""
    journal = run.path / "mlflow.json"
    if not journal.is_file():
        return []
    stages = read_json(journal)["stages"]
    end = stages["evaluate"]["timestamp_ms"] if "evaluate" in stages else 0
    return [row for row in read_json_lines(run.system_metrics) if row["timestamp_ms"] <= end]


def _rate(
    name: str, metrics: Mapping[str, Any], results: Sequence[Result], seconds: float
) -> str | None:
    if name == "sweep":
        return f"{sum(result['tokens'] for result in results) / seconds:,.0f} tokens/s in all"
    if "tokens_per_second" in metrics:
        return (
            f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['megabytes']:,.0f} MB written"
        )
    return None


def _harvest_limit(metrics: Mapping[str, Any]) -> str | None:
    parts = {
        part: metrics[f"{part}_seconds"]
        for part in ("model", "write")
        if f"{part}_seconds" in metrics
    }
    return bottleneck(parts) or None


def _sweep_limit(waits: Sequence[float]) -> str:
    typical = median(waits)
    if typical > 0.5:
        return f"limited by reading ({typical:.0%})"
    return f"limited by the autoencoders ({1 - typical:.0%}); waiting for data {typical:.1%}"


def _mean_load(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "cpu": fmean(row["system/cpu_utilization_percentage"] for row in rows),
        "memory": max(row["system/system_memory_usage_megabytes"] for row in rows) * 1e6,
    }
