"""Where actors have their place: nodes differ, come and go, and some prove unfit.

Ray places every actor by what it asks for. What is here says for how many there is room, so that no more
are started, and when waiting for room is over. An actor asks plainly, not by a placement group: it has one
bundle, which is on one node either way, and its request waiting in Ray's queue is what an autoscaler goes by.
The ranks of a trial are the exception: they have their places all at once, by a placement group of Tune's.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray._private.state import state
from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator.admission import Admission
from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
from orchestrator.node_error import NodeError

_LOOK_SECONDS = 1.0
_SHARES = 10_000
"""Of a GPU: as finely as Ray counts."""

Result = TypeVar("Result")


@dataclass
class Nodes:
    """The nodes of the connected cluster that a run may use."""

    tell: Callable[[str], None]
    """Who hears of those that it leaves out, and of waiting for others."""

    left_out: set[str] = field(default_factory=set)
    """Those that proved unfit, by Ray's ids."""

    admission: Admission | None = None
    """Who asks those that join whether they can work on the run; None: nobody does."""

    _seen: tuple[float, dict[str, Mapping[str, float]]] = (0.0, {})

    def usable(self, now: bool = False) -> dict[str, Mapping[str, float]]:
        """What each has, by its id, of those that are `present` and have said that they can work on the run."""
        present = self.present(now)
        fit = self.admission.fit if self.admission else present.keys()
        return {node: has for node, has in present.items() if node in fit}

    def present(self, now: bool = False) -> dict[str, Mapping[str, float]]:
        """The same of those that are alive, not about to go, and not left out.

        As a second ago at most, or `now`.
        """
        looked, found = self._seen
        if now or not found or time.monotonic() - looked > _LOOK_SECONDS:
            going, nodes = state.get_draining_nodes(), ray.nodes()
            for refused in self.admission.refused(nodes) if self.admission else ():
                self.leave_out(refused.node, refused.host, refused.why)
            found = {
                node["NodeID"]: node["Resources"]
                for node in nodes
                if node["Alive"] and node["NodeID"] not in going
            }
            self._seen = time.monotonic(), found
        return {node: has for node, has in found.items() if node not in self.left_out}

    def leave_out(self, node: str, host: str, why: object) -> None:
        """Use a node no more, and say so."""
        if node not in self.left_out:
            self.left_out.add(node)
            self.tell(f"warning: node {host} is left out from here on: {why}")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What every actor of a kind gets, and where."""

    cpus: int
    gpus: float

    gpus_setting: str
    """What `gpus` was set by."""

    nodes: Nodes

    patience: float
    """Seconds that a cluster which may grow is given to have room; 0 on this machine alone, which does not."""

    at_most: int | None = None
    """Actors, whatever there is room for."""

    n_ranks: int = 1
    """Actors that have their places at once, as a trial's ranks do; they count as one where room is counted."""

    @classmethod
    def of(cls, cfg: ComputeConfig, nodes: Nodes) -> "Placement":
        """Of harvesters and evaluators."""
        return cls._of(cfg, nodes, cfg.gpus_per_actor, "gpus_per_actor")

    @classmethod
    def of_trainers(cls, cfg: ComputeConfig, nodes: Nodes) -> "Placement":
        """The same of trainers, which may have a share of a GPU of their own."""
        setting = "gpus_per_actor" if cfg.gpus_per_trial is None else "gpus_per_trial"
        return cls._of(cfg, nodes, cfg.gpus_per_trainer, setting, cfg.ranks.n_ranks)

    @classmethod
    def _of(
        cls, cfg: ComputeConfig, nodes: Nodes, gpus: float, setting: str, n_ranks: int = 1
    ) -> "Placement":
        patience = cfg.wait_seconds if cfg.address else 0.0
        return cls(
            cpus=cfg.cpus_per_actor,
            gpus=gpus,
            gpus_setting=setting,
            nodes=nodes,
            patience=patience,
            n_ranks=n_ranks,
        )

    @property
    def device(self) -> str:
        """Where an actor computes. Ray decides which GPU `cuda` means inside the actor."""
        return "cuda" if self.gpus else "cpu"

    @property
    def bundle(self) -> dict[str, float]:
        """What one actor asks for, as Ray names it."""
        return {"CPU": float(self.cpus), "GPU": self.gpus}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What it asks for at once."""
        return [self.bundle] * self.n_ranks

    @property
    def where(self) -> dict[str, Any]:
        """Where those may be, for a placement group."""
        return {"bundle_label_selector": [self._selector] * self.n_ranks} if self._selector else {}

    @property
    def options(self) -> dict[str, Any]:
        """What one actor asks for and where it may be, for `ray.remote`."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": self._selector}

    @property
    def _selector(self) -> dict[str, str]:
        left_out = ",".join(sorted(self.nodes.left_out))
        return {"ray.io/node-id": f"!in({left_out})"} if left_out else {}

    def room(self) -> int:
        """Actors, or trials by ranks, that the usable nodes hold, were nothing else there."""
        there = self._held_by(self.nodes.usable().values())
        return there if self.at_most is None else min(there, self.at_most)

    def _held_by(self, nodes: Iterable[Mapping[str, float]]) -> int:
        return sum(map(self._held_by_one, nodes)) // self.n_ranks

    def _held_by_one(self, has: Mapping[str, float]) -> int:
        n = int(has.get("CPU", 0) // self.cpus)
        if self.gpus >= 1:
            n = min(n, int(has.get("GPU", 0) // self.gpus))
        elif self.gpus:  # no actor has shares of two GPUs
            n = min(n, int(has.get("GPU", 0)) * (_SHARES // round(self.gpus * _SHARES)))
        return n

    def wait_for_room(self) -> None:
        """Until there is room for one actor, or for the ranks of one trial.

        Raises:
            UserError: If there is none, and none comes in time.
        """
        if self.room():
            return
        if self.patience:
            what = f"{self.cpus} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
            lacking = f"no node has {what} for an actor"
            if self.n_ranks > 1:
                lacking = f"there are not {what} for each of the {self.n_ranks} ranks of a trial"
            self.nodes.tell(
                f"cluster   {lacking}; waiting up to {self.patience:.0f} s for more nodes "
                "(compute.wait_seconds)"
            )
            asked = placement_group(self.bundles, **self.where)
            try:
                if asked.wait(self.patience):
                    return
            finally:
                remove_placement_group(asked)
        raise self.no_room()

    def no_room(self) -> UserError:
        """Why no actor has a place."""
        nodes = list(self.nodes.usable().values())
        waited = f", after {self.patience:.0f} s (compute.wait_seconds)" if self.patience else ""
        n_left_out = len(self.nodes.left_out)
        if n_left_out:
            waited += f", {n_left_out} more being left out for the reasons told above"
        for kind, setting in (("CPU", "cpus_per_actor"), ("GPU", self.gpus_setting)):
            asked, most = self.bundle[kind], max((has.get(kind, 0) for has in nodes), default=0)
            if asked > most:
                return UserError(
                    f"compute.{setting}: {asked:g} is more than any node of the cluster has, which is "
                    f"{most:g} {kind}s at most{waited}, so no actor can start; lower it or add nodes"
                )
        present = self.nodes.present()
        if not self.room() and self._held_by(present.values()):
            return UserError(
                f"compute: {len(present) - len(nodes)} nodes would have room, and have not said{waited} whether they can "
                "work on the run (they look for the run directory, the store and the model); see what keeps them "
                "(`ray status`, Ray's logs there), or add others"
            )
        if self.n_ranks > 1 and not self.room():
            there = sum(map(self._held_by_one, nodes))
            return UserError(
                f"compute.ranks_per_trial: {self.n_ranks} is more than the ranks that the cluster has room "
                f"for, which is {there}{waited} ({self.cpus} CPUs and {self.gpus:g} GPUs each), so no trial "
                "can start; lower it or add nodes"
            )
        if not self.room():
            return UserError(
                f"compute.cpus_per_actor, compute.{self.gpus_setting}: no node of the cluster has "
                f"{self.cpus} CPUs and {self.gpus:g} GPUs at once{waited}, so no actor can start; lower one "
                "or add nodes"
            )
        return UserError(
            f"compute: there is room for {self.room()} actors on the cluster, and none has got its place"
            f"{waited}; others hold it (`ray status`), or this run does: within harvest.disk_budget a harvester and a "
            "trainer work side by side, which takes two places; wait for the others, raise wait_seconds, or add nodes"
        )

    def has_room_without(self, node: str) -> bool:
        """Whether other usable nodes than this one hold an actor, or the ranks of a trial."""
        others = (has for other, has in self.nodes.present().items() if other != node)
        return self._held_by(others) > 0

    def leave_out(self, fault: NodeError) -> None:
        """Use a node no more.

        Raises:
            Exception: What was met there, if no other node has room.
        """
        if fault.node not in self.nodes.left_out and not self.has_room_without(fault.node):
            raise fault.why
        self.nodes.leave_out(fault.node, fault.host, fault.why)

    def elsewhere(self, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns; a node whose fault ends it is left out of the next one.

        Raises:
            Exception: As `leave_out`.
        """
        while True:
            try:
                return attempt()
            except NodeError as fault:
                self.leave_out(fault)
