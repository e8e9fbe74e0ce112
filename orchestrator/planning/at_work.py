"""How many processes of a kind a cluster of GPUs has at work at a time, and on how many nodes they read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.config import ComputeConfig, RunConfig
from orchestrator.planning.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Harvesters, or what else has the model."""

    given: float
    """GPUs of each, or its share of one: as configured, else one, and as many as the model needs for its memory."""

    room: int
    """That the cluster holds."""

    at_most: int
    """`compute.harvesters`, for the stages that it bounds."""

    def at_work(self, n_jobs: int, bounded: bool = True) -> int:
        """Of so many jobs."""
        return min(self.room, n_jobs, self.at_most if bounded else self.room)

    def computing(self, n: int) -> float:
        """GPUs that compute while `n` are at work: each uses one, or its share; what it is given beyond takes turns."""
        return n * min(self.given, 1.0)


def actors(cfg: ComputeConfig, hardware: Hardware, turns: int) -> Actors:
    """Of a model that needs `turns` GPUs."""
    given = cfg.gpus_per_actor or 1.0
    given = max(given, turns) if turns > 1 else given
    room = _room(given, hardware)
    return Actors(given=given, room=room, at_most=cfg.harvesters or room)


@dataclass(frozen=True, kw_only=True)
class Trainers:
    """Those of a sweep."""

    readings: int
    """Of the training tokens: what trials of a group in step, and ranks, ask for on one node is read once there."""

    at_work: int
    """Processes at a time: of bundles of trials, or all ranks of trials."""

    keepers: int
    """Nodes where some are at work: each has one process that reads for them."""

    given: float
    """GPUs of each process, or its share of one."""

    @property
    def computing(self) -> int:
        """GPUs that compute: a process uses one or a share of one; what it is given beyond waits."""
        return math.ceil(self.at_work * min(self.given, 1.0))


def trainers(cfg: ComputeConfig, hardware: Hardware, trials: Sequence[int]) -> Trainers:
    """Of so many trials in each group, which are started in the order of groups.

    Ray puts one after the other on the node with most room, and the ranks of a trial on one node if it holds them.
    """
    given, n_ranks = cfg.gpus_per_trainer or 1.0, cfg.ranks.n_ranks
    room = max(1, _room(given, hardware) // n_ranks)
    nodes = math.ceil(hardware.gpus / hardware.gpus_per_node)
    nodes_each = min(nodes, math.ceil(n_ranks * given / hardware.gpus_per_node))
    apart = nodes // nodes_each
    groups = [math.ceil(n / cfg.trials_per_actor) for n in trials]
    readings = sum(
        whole * min(room, apart) + min(rest, apart)
        for whole, rest in (divmod(n, room) for n in groups)
    )
    at_once = min(room, sum(groups))
    return Trainers(
        readings=readings * nodes_each,
        at_work=at_once * n_ranks,
        keepers=min(at_once, apart) * nodes_each,
        given=given,
    )


def doubts(cfg: RunConfig, hardware: Hardware, harvesters: Actors) -> Iterator[str]:
    """What a run with these settings would not do on that cluster, and the setting to change."""
    compute = cfg.compute
    gpus = hardware.gpus
    on_node = min(gpus, hardware.gpus_per_node)
    trainer = compute.gpus_per_trainer
    together = compute.ranks.n_ranks * (trainer or 1.0)
    trainers_setting = "gpus_per_actor" if compute.gpus_per_trial is None else "gpus_per_trial"
    if not compute.gpus_per_actor:
        yield (
            "compute.gpus_per_actor: 0 computes on the CPU, and the table is of actors with "
            f"{harvesters.given:g}; set it to {harvesters.given:g}, or no harvester uses a GPU"
        )
    if not trainer and compute.gpus_per_trial is not None:
        yield (
            "compute.gpus_per_trial: 0 trains on the CPU, and the table is of trials with a GPU each; leave it "
            "out or set it to 1"
        )
    if harvesters.given > on_node:
        yield (
            f"compute.gpus_per_actor: {harvesters.given:g} is more than the {on_node} GPUs of a node, so no "
            "harvester could start; lower it, or use larger nodes"
        )
    if compute.ranks.n_ranks > 1 and together > gpus:
        yield (
            f"compute.ranks_per_trial: the {compute.ranks.n_ranks} ranks of a trial have {together:g} GPUs at "
            f"once, and there are {gpus}, so no trial could start; lower it, or plan for --gpus {together:g}"
        )
    elif trainer > on_node:
        yield (
            f"compute.{trainers_setting}: {trainer:g} for a process that trains is more than the {on_node} GPUs "
            "of a node, so no trial could start; lower it, or use larger nodes"
        )


def _room(given: float, hardware: Hardware) -> int:
    """Processes, with so many GPUs or a share of one each; one at least, which `doubts` tells of."""
    nodes, rest = divmod(hardware.gpus, hardware.gpus_per_node)
    if given < 1:
        return hardware.gpus * int(1 / given + 1e-6)
    return max(1, int(nodes * (hardware.gpus_per_node // given) + rest // given))
