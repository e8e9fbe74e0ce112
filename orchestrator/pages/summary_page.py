"""The result of a finished run as a person reads it."""

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.labels import encoder_label
from orchestrator.pages.headline import covered
from orchestrator.sweeps.front import AIMS

FRONT_ROWS = 8
"""Of each group, so that a long sweep's table can be read."""


def show(console: Console, data: Mapping[str, Any], pareto: Mapping[str, Any]) -> None:
    """Print the result of a finished run: its summary, and what `pareto.json` holds."""
    table = Table(title="Winners", title_justify="left", pad_edge=False)
    columns = ("group", "layers", "encoder", "k", "FVU", "L0", "dead", "CE recovered", "parameters")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[1:3] else "right")
    for group in data["groups"]:
        for winner in group["winners"]:
            is_best = winner["trial"] == group["best"]["trial"]
            dense = winner.get("dense_n_parameters", data["dense_n_parameters"])
            share = winner["n_parameters"] / dense
            table.add_row(
                f"{group['id']}{'*' if is_best else ' '}",
                ", ".join(map(str, group["layers"])),
                f"{encoder_label(winner)}, {winner['selection']}",
                str(winner["k"]),
                f"{winner['fvu']:.4f}",
                f"{winner['l0']:.1f}",
                f"{winner['dead_fraction']:.1%}",
                _span(winner["ce_recovered"].values()),
                f"{winner['n_parameters']:,} ({share:.0%} of dense)",
            )
    console.print(table)
    console.print(front_table(pareto))
    seconds = data["stage_seconds"]
    console.print(
        f"{len(data['groups'])} groups over {covered(data)} layers (AMAD {data['amad']:.3f}), "
        f"{data['n_trials']} trials, {sum(seconds.values()):.0f} s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        "FVU: mean over the group's layers on unseen documents, lower is better; * is the group's best.",
        "Pareto front: trained to the end, and no other of the group is as good in all four and better in one.",
        "CE recovered: 1 is the model untouched, 0 is the layer zeroed; least and most over the layers.",
        f"Run:    {data['run_dir']}",
        f"Report: {data['run_dir']}/report/index.html",
        f"MLflow: strata ui {data['run_dir']}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def front_table(pareto: Mapping[str, Any]) -> Table:
    """The Pareto front of every group; of a long one the first `FRONT_ROWS`."""
    table = Table(title="Pareto front", title_justify="left", pad_edge=False)
    for column in ("group", "encoder", "k", *AIMS.values()):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for group in pareto["groups"]:
        for point in group["front"][:FRONT_ROWS]:
            table.add_row(
                str(group["id"]),
                f"{encoder_label(point)}, {point['selection']}",
                str(point["k"]),
                f"{point['fvu']:.4f}",
                f"{point['l0']:.1f}",
                f"{point['encoder_parameters']:,}",
                f"{point['encoder_flops_per_token']:,}",
            )
        n_more = len(group["front"]) - FRONT_ROWS
        if n_more > 0:
            table.add_row(str(group["id"]), f"and {n_more} more in pareto.json")
    return table


def _span(values: Collection[float]) -> str:
    """The least and the most, or `-` where there are none."""
    if not values:
        return "-"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} .. {high}"
