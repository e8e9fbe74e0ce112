"""The winners of a run at many sizes, as a person reads them in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.pages.figures.progressive import ORDERS, mean_curves
from orchestrator.run_directory import RunDirectory

Reports = Sequence[Mapping[str, Any]]


def show(console: Console, run: RunDirectory, curves: Mapping[str, Reports]) -> None:
    """Print a table for each winner.

    Args:
        console: Where.
        run: Whose winners they are.
        curves: Per trial, what the files of its layers hold.
    """
    for trial, reports in curves.items():
        console.print(_table(trial, reports))
        law = _law(reports[0]["power_laws"]["energy"])
        console.print(law, highlight=False, soft_wrap=True)
    causal = all(reports[0]["n_tokens"] is not None for reports in curves.values())
    console.print(
        "FVU: lower is better. Latents are kept in the order above the column; those pruned are not "
        "replaced, so L0 falls.",
        *(["CE: cross-entropy recovered; 1 is the model untouched, 0 the layer zeroed."] * causal),
        f"Files:  {run.progressive} (docs/progressive.md says what they hold)",
        f"MLflow: strata ui {run.path}; figures/progressive-*.png of the run",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _table(trial: str, reports: Reports) -> Table:
    layers = ", ".join(str(report["layer"]) for report in reports)
    table = Table(title=f"{trial}: mean over layers {layers}", title_justify="left", pad_edge=False)
    means = mean_curves(reports)
    causal = reports[0]["n_tokens"] is not None
    table.add_column("latents", justify="right")
    for order in means:
        table.add_column(f"{ORDERS[order]}\nFVU{'    CE' if causal else ''}", justify="right")
    by_size = {order: {point["size"]: point for point in points} for order, points in means.items()}
    for size in by_size["energy"]:
        table.add_row(str(size), *(_cell(points.get(size)) for points in by_size.values()))
    return table


def _cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return ""
    recovered = point["ce_recovered"]
    return f"{point['fvu']:.3f}" + ("" if recovered is None else f" {recovered:6.3f}")


def _law(law: Mapping[str, Any] | None) -> str:
    if law is None:
        return "E[act²]: too few latents are in use for a power law"
    return (
        f"E[act²] ~ rank^-{law['exponent']:.2f} with r² {law['r_squared']:.3f}, over ranks "
        f"{law['first_rank']} to {law['last_rank']} (an exponential: {law['exponential_r_squared']:.3f})"
    )
