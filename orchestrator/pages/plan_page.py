"""A plan as a person reads it."""

import psutil
from rich.console import Console
from rich.table import Table

from orchestrator.labels import duration, size
from orchestrator.planning.disk import by_disk, free_disk_bytes
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.memory import IMPORTED_BYTES
from orchestrator.planning.plan import Plan
from orchestrator.planning.rounding import told
from storage.places import place


def show(console: Console, figures: Plan) -> None:
    """Print a plan: stores with their arrays, disk, and memory per actor."""
    table = Table(title=f"Plan of {figures.run_dir}", title_justify="left", pad_edge=False)
    table.add_column("store")
    table.add_column("rows", justify="right")
    table.add_column("on disk", justify="right")
    table.add_row("tokens", f"{figures.harvest_tokens:,} through the model", _of(figures, "tokens"))
    for name, unit, n in (
        ("pilot", "layers", figures.n_layers),
        ("validation", "layers", figures.n_layers),
        ("train", "groups", figures.n_groups),
    ):
        table.add_row(name, f"{figures.rows[name]:,} x {n} {unit}", _of(figures, name))
        for part, n_bytes in _parts(figures.arrays[name]).items():
            table.add_row(f"  {part}", "", size(n_bytes))
    table.add_row("trials", f"{figures.n_trials} trials", _of(figures, "trials"))
    console.print(table)
    known = (
        ""
        if figures.n_groups_is_known
        else " (the most there can be: the number of groups is known after the pilot)"
    )
    there = "" if sum(figures.left_bytes.values()) == figures.local_disk_bytes else " more"
    disks = by_disk(figures.run_dir, place(figures.store), figures.left_bytes)
    lines = [
        f"disk:   {size(sum(parts.values()))}{there} of {size(free_disk_bytes(folder))} free"
        f"{known if 'train' in parts else ''}{f' in {folder}' if len(disks) > 1 else ''}"
        for _, folder, parts in disks
    ]
    if figures.local_disk_bytes < figures.total_disk_bytes:
        elsewhere = figures.total_disk_bytes - figures.local_disk_bytes
        lines.append(f"store:  {size(elsewhere)} in {figures.store}{known}")
    available = psutil.virtual_memory().available
    for kind, actor in figures.actors.items():
        gpu = f", {size(actor.device)} of its GPU" if actor.device else ""
        lines.append(
            f"memory: {size(actor.host + IMPORTED_BYTES)} per {kind}{gpu}, "
            f"{figures.n_actors[kind]} at a time"
        )
    if figures.shared_bytes:
        lines.append(f"        {size(figures.shared_bytes)} of chunks that trainers share")
    lines.append(f"        {size(available)} available here")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def show_rounding(console: Console, costs: dict[int, float] | None) -> None:
    """Print what harvest.dtype: int8 would cost, or costs, where rows are there to measure it on."""
    known = told(costs) if costs else "known once the validation rows are harvested"
    console.print(f"int8:   cost of rounding: {known}", highlight=False, soft_wrap=True)


def show_time(console: Console, expected: Estimate) -> None:
    """Print how long a run will take."""
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in expected.step_rates.items())
    stages = (
        f"harvest {duration(expected.harvest)}, sweep {duration(expected.sweep)}, "
        f"evaluate {duration(expected.evaluate)}"
    )
    lines = [
        f"time:   about {duration(expected.total)}: {stages}",
        f"        at {expected.model_rate:,.0f} tokens/s per harvester and {rates} tokens/s per trainer",
        "        (measured here just now; other machines differ)",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _of(figures: Plan, name: str) -> str:
    return size(figures.disk_bytes[name])


def _parts(arrays: dict[str, int]) -> dict[str, int]:
    """Bytes by kind of array: `layers/*/x` stands for one of each layer."""
    parts: dict[str, int] = {}
    for name, n_bytes in arrays.items():
        split = name.split("/")
        kind = f"{split[0]}/*/{split[2]}" if len(split) == 3 else name
        parts[kind] = parts.get(kind, 0) + n_bytes
    return parts
