"""What a run will need, before anything starts: disk, memory, rows and trials."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from actors.language_model import ModelShape, parameter_count
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.stores import store_spec
from sae.config import SaeConfig
from storage.layout import StoreSpec

TOKEN_BYTES = 4 + 4  # docs/store_format.md: the id and its document


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one run. The number of groups is not known before the pilot is read."""

    run_dir: Path
    n_layers: int

    n_groups: int
    """As configured, else the most there can be."""

    n_groups_is_known: bool

    rows: dict[str, int]
    """Of each array, per store."""

    disk_bytes: dict[str, int]
    """Per store; the training store's for `n_groups`."""

    harvester_bytes: int
    """Peak memory of one harvester: the model and one shard of every array."""

    trainer_bytes: int
    """Peak memory of one trainer: weights, gradients, optimizer and a window of chunks."""

    n_trials: int

    @property
    def total_disk_bytes(self) -> int:
        """Of everything the run writes, the trials included."""
        return sum(self.disk_bytes.values())


def plan(cfg: RunConfig, shape: ModelShape) -> Plan:
    """The figures of a configuration, from the model's config file alone.

    Raises:
        UserError: If the context is longer than the model's or dropped whole, or the model has too
            few layers.
    """
    context = cfg.harvest.context or shape.context
    if context > shape.context:
        raise UserError(
            f"harvest.context: {context} is beyond the {shape.context} positions of {cfg.model.name}; "
            f"set it to {shape.context} or less"
        )
    if cfg.hygiene.drop_first_positions >= context:
        raise UserError(
            f"hygiene.drop_first_positions: {cfg.hygiene.drop_first_positions} drops every position of "
            f"a context of {context} tokens; lower it"
        )
    n_groupable = shape.n_layers - (cfg.group.last_layer == "exclude")
    n_groups = cfg.group.n_groups or n_groupable
    if n_groups > n_groupable:
        raise UserError(
            f"group.n_groups: {n_groups} groups need as many layers, and {cfg.model.name} has "
            f"{n_groupable} to group (last_layer: {cfg.group.last_layer}); lower it"
        )
    specs = {
        name: store_spec(
            *(cfg, shape, name),
            context=context,
            first_position=1,
            scales=dict.fromkeys(range(shape.n_layers), 1.0),
            groups=tuple((layer,) for layer in range(n_groups)) if name == "train" else (),
        )
        for name in ("pilot", "validation", "train")
    }
    n_tokens = context * sum(specs[name].n_sequences for name in ("train", "validation"))
    n_trials = n_groups * len(cfg.sweep.k) * len(cfg.sweep.encoders) * len(cfg.sweep.selection)
    largest = max(
        SaeConfig(d_model=shape.d_model, d_sae=cfg.sweep.d_sae, k=1, encoder=encoder).n_parameters
        for encoder in cfg.sweep.encoders
    )
    return Plan(
        run_dir=cfg.run_dir,
        n_layers=shape.n_layers,
        n_groups=n_groups,
        n_groups_is_known=cfg.group.n_groups is not None,
        rows={name: spec.n_rows for name, spec in specs.items()},
        disk_bytes={
            "tokens": n_tokens * TOKEN_BYTES,
            **{name: spec.n_bytes for name, spec in specs.items()},
            "trials": n_trials * largest * 4 * 4,  # weights twice, two moments
        },
        harvester_bytes=parameter_count(cfg.model) * 4 + max(map(_shard_bytes, specs.values())),
        trainer_bytes=math.ceil(
            largest * 4 * 4 + cfg.sweep.window_chunks * cfg.harvest.chunk_mib * 2**20
        ),
        n_trials=n_trials,
    )


def _shard_bytes(spec: StoreSpec) -> int:
    """Memory of one shard of every array while it is being filled, in float32."""
    return min(spec.shard_rows, spec.n_rows) * len(spec.arrays) * spec.d_model * 4


def refuse_what_cannot_fit(figures: Plan) -> None:
    """Compare a plan with this machine.

    Raises:
        UserError: If the disk has no room for the stores.
    """
    free = free_disk_bytes(figures.run_dir)
    there = _bytes_under(figures.run_dir)
    if figures.total_disk_bytes > free + there:
        parts = ", ".join(f"{name} {_size(n)}" for name, n in figures.disk_bytes.items())
        bound = "" if figures.n_groups_is_known else f" at most, with {figures.n_groups} groups"
        raise UserError(
            f"the plan needs {_size(figures.total_disk_bytes)} of disk{bound} ({parts}), and "
            f"{figures.run_dir} has {_size(free + there)}; lower harvest.tokens, set "
            "group.n_groups, or move run_dir to a larger disk"
        )


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def show(console: Console, figures: Plan) -> None:
    """Print a plan."""
    table = Table(title=f"Plan of {figures.run_dir}", title_justify="left", pad_edge=False)
    table.add_column("store")
    table.add_column("rows", justify="right")
    table.add_column("on disk", justify="right")
    rows = {
        "tokens": "",
        "pilot": f"{figures.rows['pilot']:,} x {figures.n_layers} layers",
        "validation": f"{figures.rows['validation']:,} x {figures.n_layers} layers",
        "train": f"{figures.rows['train']:,} x {figures.n_groups} groups",
        "trials": f"{figures.n_trials} trials",
    }
    for name, text in rows.items():
        table.add_row(name, text, _size(figures.disk_bytes[name]))
    console.print(table)
    free = free_disk_bytes(figures.run_dir)
    memory = psutil.virtual_memory().available
    known = (
        ""
        if figures.n_groups_is_known
        else (" (the most there can be: the number of groups is known after the pilot)")
    )
    console.print(
        f"disk:   {_size(figures.total_disk_bytes)} of {_size(free)} free{known}",
        f"memory: {_size(figures.harvester_bytes)} per harvester, "
        f"{_size(figures.trainer_bytes)} per trainer, {_size(memory)} available here",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _bytes_under(path: Path) -> int:
    """What the run has written already: it need not be written again."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _size(n_bytes: int) -> str:
    size, unit = n_bytes * 1.0, "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
