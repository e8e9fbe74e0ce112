"""What a run will need, before anything starts: disk, memory, rows and trials."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from actors.language_model import ModelShape, parameter_count
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.labels import size
from orchestrator.planning import memory
from orchestrator.planning.memory import IMPORTED_BYTES, ActorMemory
from orchestrator.stores import shards_within, store_spec
from orchestrator.sweeps.candidates import candidates, corners, n_candidates
from sae.config import SaeConfig
from storage.layout import StoreSpec
from storage.places import place
from storage.sizes import store_bytes

_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one run. The number of groups is not known before the pilot is read."""

    run_dir: Path
    store: str
    """Where the stores lie: the run directory, or what `harvest.store` names."""

    n_layers: int

    n_groups: int
    """As configured, else the most there can be."""

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
    """The figures of a configuration, from the model's config file alone.

    Raises:
        UserError: If the context is longer than the model's or dropped whole, or the model has too
            few layers, or the disk budget has no room for what readers need.
    """
    context = cfg.harvest.context or shape.context
    n_groups = _checked_groups(cfg, shape, context)
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
    n_trials = sum(n_candidates(cfg, group) for group in range(n_groups))
    arrays = {name: store_bytes(spec) for name, spec in specs.items()}
    parameters = parameter_count(cfg.model)
    n_actors = _n_actors(cfg, specs, n_trials)
    n_trainers = n_actors["trainer"]
    return Plan(
        run_dir=cfg.run_dir,
        store=str(cfg.run_dir if cfg.harvest.store is None else cfg.harvest.store),
        n_layers=shape.n_layers,
        n_groups=n_groups,
        n_groups_is_known=cfg.group.n_groups is not None,
        n_parameters=parameters,
        specs=specs,
        rows={name: spec.n_rows for name, spec in specs.items()},
        arrays=arrays,
        disk_bytes={
            "tokens": _token_bytes(shape, context, specs),
            **{name: sum(sizes.values()) for name, sizes in arrays.items()},
            **_within_budget(cfg, specs["train"]),
            "trials": sum(_trial_bytes(cfg, shape, group) for group in range(n_groups)),
        },
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


def _within_budget(cfg: RunConfig, spec: StoreSpec) -> dict[str, int]:
    """Bytes of the training store where a budget bounds them.

    Whether the budget is enough is checked where the groups are known; else before the train harvest.
    """
    budget = cfg.harvest.budget_bytes
    if budget is None or spec.n_bytes <= budget:
        return {}
    if cfg.group.n_groups is not None:
        shards_within(cfg, spec)
    return {"train": budget}


def _checked_groups(cfg: RunConfig, shape: ModelShape, context: int) -> int:
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
    return n_groups


def _token_bytes(shape: ModelShape, context: int, specs: dict[str, StoreSpec]) -> int:
    """Of the packed tokens: ids as compression leaves them at most; documents nearly vanish."""
    n_tokens = context * sum(specs[name].n_population for name in ("train", "validation"))
    return n_tokens * (shape.vocabulary - 1).bit_length() // 8


def _trial_bytes(cfg: RunConfig, shape: ModelShape, group: int) -> int:
    """Of the trials of one group.

    What Optuna will suggest is not known: each of its trials is taken to be the largest there can be.
    """
    known = [trial_bytes(found.sae) for found in candidates(cfg, group, shape.d_model)]
    if cfg.sweep.search.method == "optuna":
        return n_candidates(cfg, group) * max(map(trial_bytes, corners(cfg, shape.d_model, group)))
    return sum(known)


def trial_bytes(sae: SaeConfig) -> int:
    """Bytes that a trial writes: weights twice, two moments, a counter per latent."""
    return sae.n_parameters * 4 * _FLOAT + sae.d_sae * 8


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
    free = free_disk_bytes(figures.run_dir)
    there = bytes_under(figures.run_dir)
    if figures.local_disk_bytes > free + there:
        parts = ", ".join(f"{name} {size(n)}" for name, n in figures.disk_bytes.items())
        bound = "" if figures.n_groups_is_known else f" at most, with {figures.n_groups} groups"
        raise UserError(
            f"the plan needs {size(figures.local_disk_bytes)} of disk{bound} ({parts}), and "
            f"{figures.run_dir} has {size(free + there)}; lower harvest.tokens, set "
            "group.n_groups, or move run_dir to a larger disk"
        )
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


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def bytes_under(path: Path) -> int:
    """What the run has written already: it need not be written again."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
