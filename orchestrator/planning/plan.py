"""What a run will need, before anything starts: disk, memory, rows and trials."""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import psutil
import torch

from actors.language_model import ModelShape, parameter_count
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.labels import size
from orchestrator.planning import disk, memory
from orchestrator.planning.memory import IMPORTED_BYTES, ActorMemory
from orchestrator.run_directory import RunDirectory
from orchestrator.stages.group_file import load_groups
from orchestrator.stores import shards_within, store_spec
from orchestrator.sweeps.candidates import foreseen
from storage.layout import StoreSpec
from storage.places import place
from storage.sizes import store_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one run. The number of groups is not known before the pilot is read."""

    run_dir: Path
    store: str
    """Where the stores lie: the run directory, or what `harvest.store` names."""

    n_layers: int

    n_groups: int
    """As found by the run, or as configured, else the most there can be."""

    n_groups_is_known: bool

    n_parameters: int
    """Of the model without its head."""

    specs: dict[str, StoreSpec]
    """Of each activation store."""

    rows: dict[str, int]
    """Of each array, per store."""

    arrays: dict[str, dict[str, int]]
    """Bytes of every array, column, metadata and commit records, per activation store."""

    disk_bytes: dict[str, int]
    """Per store; the training store's for `n_groups`. Tokens are compressed, so theirs is a bound."""

    left_bytes: dict[str, int]
    """Of those that lie in the run directory, what is still to be written."""

    actors: dict[str, ActorMemory]
    """Peak memory of one harvester, grouper, trainer and evaluator."""

    n_actors: dict[str, int]
    """How many of each work at a time, on this machine or as configured; trainers by processes."""

    shared_bytes: int
    """Of chunks that trainers on this machine share, beside what each has for itself."""

    n_trials: int

    harvest_tokens: int
    """That go through the model, over all stores."""

    @property
    def total_disk_bytes(self) -> int:
        """Of everything the run writes, the trials included."""
        return sum(self.disk_bytes.values())

    @property
    def local_disk_bytes(self) -> int:
        """Of what lies in the run directory."""
        stays = place(self.store).folder is not None
        return self.total_disk_bytes if stays else self.disk_bytes["trials"]


def plan(cfg: RunConfig, shape: ModelShape) -> Plan:
    """The figures of a configuration, from the model's config file, and from what the run has written.

    Raises:
        UserError: If the context is longer than the model's or dropped whole, or the model has too
            few layers, or the disk budget has no room for what readers need; or `groups.json` is damaged.
    """
    context, run = cfg.harvest.context or shape.context, RunDirectory.of(cfg)
    groups, found = _checked_groups(cfg, shape, context), _found_groups(run, shape)
    groups = found or groups
    n_groups, is_known = len(groups), bool(found or cfg.group.n_groups)
    specs = {
        name: store_spec(
            *(cfg, shape, name),
            context=context,
            first_position=1,
            scales=dict.fromkeys(range(shape.n_layers), 1.0),
            groups=groups if name == "train" else (),
        )
        for name in ("pilot", "validation", "train")
    }
    saes = [sae for group in range(n_groups) for sae in foreseen(cfg, group, shape.d_model)]
    saes.sort(key=attrgetter("n_parameters"))
    n_trials, n_done = len(saes), sum(1 for _ in run.trials.glob("*/result.json"))
    arrays = {name: store_bytes(spec) for name, spec in specs.items()}
    parameters = parameter_count(cfg.model)
    n_actors = _n_actors(cfg, specs, n_trials)
    n_trainers = n_actors["trainer"]
    at_once = n_trainers // cfg.compute.ranks.n_ranks * cfg.compute.trials_per_actor
    disk_bytes = {
        "tokens": disk.token_bytes(shape, context, specs),
        **{name: sum(sizes.values()) for name, sizes in arrays.items()},
        **_within_budget(cfg, specs["train"], is_known),
        "trials": disk.trials_bytes(cfg, saes, at_once),
    }
    return Plan(
        run_dir=cfg.run_dir,
        store=str(cfg.run_dir if cfg.harvest.store is None else cfg.harvest.store),
        n_layers=shape.n_layers,
        n_groups=n_groups,
        n_groups_is_known=is_known,
        n_parameters=parameters,
        specs=specs,
        rows={name: spec.n_rows for name, spec in specs.items()},
        arrays=arrays,
        disk_bytes=disk_bytes,
        left_bytes=disk.left_bytes(
            run, disk_bytes, specs, disk.trials_bytes(cfg, saes[n_done:], at_once)
        ),
        actors={
            "harvester": memory.harvester(cfg, shape, parameters, specs),
            "grouper": memory.grouper(specs["pilot"]),
            "trainer": memory.trainer(cfg, shape, specs["train"], n_trainers),
            "evaluator": memory.evaluator(cfg, shape, parameters, specs["validation"]),
        },
        n_actors=n_actors,
        shared_bytes=memory.shared_bytes(cfg, specs["train"], n_groups, n_trainers),
        n_trials=n_trials,
        harvest_tokens=context * sum(spec.n_sequences for spec in specs.values()),
    )


def _within_budget(cfg: RunConfig, spec: StoreSpec, is_known: bool) -> dict[str, int]:
    """Bytes of the training store where a budget bounds them.

    Whether the budget is enough is checked where the groups are known; else before the train harvest.
    """
    budget = cfg.harvest.budget_bytes
    if budget is None or spec.n_bytes <= budget:
        return {}
    if is_known:
        shards_within(cfg, spec)
    return {"train": budget}


def _found_groups(run: RunDirectory, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """Those of the run, if it has come so far; none where they are of another model."""
    if not run.groups.is_file():
        return ()
    found = load_groups(run).partition
    return found if all(layer < shape.n_layers for group in found for layer in group) else ()


def _checked_groups(cfg: RunConfig, shape: ModelShape, context: int) -> tuple[tuple[int, ...], ...]:
    """As many as there can be, the layers shared out among them."""
    if not shape.takes(context):
        raise UserError(
            f"harvest.context: {context} is beyond the {shape.longest} positions of {cfg.model.name}; "
            f"set it to {shape.longest} or less"
        )
    if cfg.hygiene.drop_first_positions >= context:
        raise UserError(
            f"hygiene.drop_first_positions: {cfg.hygiene.drop_first_positions} drops every position of "
            f"a context of {context} tokens; lower it"
        )
    n_grouped = shape.n_layers - (cfg.group.last_layer != "grouped")
    n_groups = cfg.group.n_groups or max(1, n_grouped)
    if n_groups > n_grouped:
        raise UserError(
            f"group.n_groups: {n_groups} groups need as many layers, and {cfg.model.name} has "
            f"{n_grouped} to group (last_layer: {cfg.group.last_layer}); lower it, or set group.last_layer: grouped"
        )
    groups = tuple(tuple(range(group, n_grouped, n_groups)) for group in range(n_groups))
    return (*groups, (n_grouped,)) if cfg.group.last_layer == "alone" else groups


def _n_actors(cfg: RunConfig, specs: dict[str, StoreSpec], n_trials: int) -> dict[str, int]:
    room = max(1, (cfg.compute.cpus or psutil.cpu_count() or 1) // cfg.compute.cpus_per_actor)
    shards = max(specs["pilot"].n_shards + specs["validation"].n_shards, specs["train"].n_shards)
    readers = min(cfg.compute.harvesters or room, room)  # of shards, to write or to compare them
    return {
        "harvester": min(readers, shards),
        "grouper": min(readers, specs["pilot"].n_shards),
        "trainer": _n_trainers(cfg, room, n_trials),
        "evaluator": room,
    }


def _n_trainers(cfg: RunConfig, room: int, n_trials: int) -> int:
    """Processes; all ranks of a trial have their place at once."""
    n_ranks = cfg.compute.ranks.n_ranks
    at_once = max(1, room // n_ranks)
    return n_ranks * min(at_once, -(-n_trials // cfg.compute.trials_per_actor))


def refuse_what_cannot_fit(figures: Plan, cfg: RunConfig) -> None:
    """Compare a plan with this machine; what other machines of a cluster have is not known here.

    Raises:
        UserError: If the disk has no room for what is written, memory none for the actors, or one of
            them asks for more GPUs than there are.
    """
    bound = "" if figures.n_groups_is_known else f" at most, with {figures.n_groups} groups"
    disk.refuse_full_disk(cfg, figures.left_bytes, bound)
    if cfg.compute.address is None:
        _refuse_gpus(cfg, torch.cuda.device_count())
        _refuse_memory(figures, psutil.virtual_memory().available)


def _refuse_gpus(cfg: RunConfig, there: int) -> None:
    for setting, kind, asked in cfg.compute.asked:
        if kind == "GPU" and asked > there:
            raise UserError(
                f"compute.{setting}: {_asker(setting)} for {asked:g} GPUs, and this machine has {there}; "
                "lower it (0 computes on the CPU), or name a cluster that has them in compute.address"
            )


def _asker(setting: str) -> str:
    return "the ranks of a trial ask" if setting == "ranks_per_trial" else "an actor asks"


_LOWER = {
    "harvester": "harvest.shard_mib, harvest.batch_tokens or compute.harvesters",
    "grouper": "harvest.chunk_mib or compute.harvesters",
    "trainer": "sweep.window_chunks, sweep.d_sae, the largest batch_tokens (of train, or of "
    "sweep.vary.train) or compute.cpus (fewer at a time)",
    "evaluator": "harvest.batch_tokens or compute.cpus (fewer at a time)",
}


def _refuse_memory(figures: Plan, available: int) -> None:
    for kind, actor in figures.actors.items():
        n, each = figures.n_actors[kind], actor.host + IMPORTED_BYTES
        shared = figures.shared_bytes + IMPORTED_BYTES if figures.shared_bytes else 0
        beside = shared if kind == "trainer" else 0
        if n * each + beside > available:
            more = f", {size(beside)} shared" if beside else ""
            raise UserError(
                f"{n} {kind}s need {size(n * each + beside)} of memory ({size(each)} each{more}), and "
                f"this machine has {size(available)} to give; lower {_LOWER[kind]}"
            )
