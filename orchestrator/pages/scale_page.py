"""What a run asks of a cluster, as a person reads it."""

from rich.console import Console
from rich.table import Table

from orchestrator.labels import size
from orchestrator.planning.scale import Scale, as_rows

COLUMNS = (
    *("stage", "hours", "limited by", "GPU hours", "written", "read", "PUT", "GET"),
    *("results/s", "MLflow calls/s"),
)


def show(console: Console, found: Scale) -> None:
    """Print a row per stage, and what it comes to."""
    title = f"On {found.hardware.gpus} GPUs (a model: docs/scale.md)"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("stage", "limited by") else "right")
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    console.print("\n".join(lines(found)), highlight=False, soft_wrap=True)


def cells(found: Scale) -> list[tuple[str, ...]]:
    """The table's rows."""
    return [
        (
            *(row["stage"], number(row["hours"]), row["limit"], number(row["gpu_hours"])),
            *(size(row["written"]), size(row["read"]), number(row["puts"]), number(row["gets"])),
            *(number(row["results_per_second"]), number(row["mlflow_per_second"])),
        )
        for row in as_rows(found)
    ]


def lines(found: Scale) -> list[str]:
    """What the stages come to."""
    paid = found.dollars()
    parts = ", ".join(f"{name} {number(dollars)}" for name, dollars in paid.items())
    each = found.gpus_per_harvester
    more = f"{each} GPUs that take turns (compute.gpus_per_actor: {each}, compute.gpus_per_trial: 1, model.device_map: auto)"
    turns = more if each > 1 else "1 GPU"
    fits = "fits one" if found.trainer_fits else "does not fit one: lower sweep.d_sae"
    return [
        f"time:   {number(found.hours)} h, start-up and waiting for nodes not counted",
        f"stored: {size(found.stored_bytes)}",
        f"cost:   {number(sum(paid.values()))} dollars ({parts})",
        f"memory: a harvester has its model on {turns}; a trainer {fits}",
        *(f"warning: {doubt}" for doubt in found.doubts),
    ]


def number(value: float) -> str:
    """Three figures, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
