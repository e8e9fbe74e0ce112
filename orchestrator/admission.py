"""Whether a node can work on a run: it is asked before it is relied on, when the run begins or when it joins.

No path can tell: `/data` may be a mount on one node and a disk on the next. And Ray starts processes on any
node that joins, whether or not Strata is installed there.
"""

import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import InputError
from actors.model_origin import identity, is_same
from actors.model_source import ModelSource
from orchestrator.errors import UserError
from orchestrator.redaction import redacted
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.shared_storage import SharedStorage
from storage.errors import StoreError

PROBE_SECONDS = 60.0
"""That nodes have to answer in when a run begins. One that needs longer is heard later."""

_LOST = (NodeDiedError, TaskUnschedulableError, WorkerCrashedError, OutOfMemoryError)
"""What becomes of a question whose process is lost, mostly with its node."""

_MOST_LOST = 3
"""Questions to a node."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A node that can't work on the run."""

    node: str
    """Ray's id of it."""

    host: str
    why: str


@dataclass
class Admission:
    """Asks nodes, each until it has answered."""

    storage: SharedStorage
    """What each must find."""

    model: ModelSource
    expected: str | None
    """Those that the driver sees: `actors.model_origin.identity`."""

    _fit: set[str]
    _asked: set[str] = field(default_factory=set)
    _n_lost: Counter[str] = field(default_factory=Counter)
    _lock: Any = field(default_factory=Lock)
    _pending: dict["ray.ObjectRef[str | None]", tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelSource, run: RunDirectory) -> "Admission":
        """To a run that this process drives. Its own node needs none."""
        here = ray.get_runtime_context().get_node_id()
        noted = read_json(run.model) if model.is_local and run.model.is_file() else {}
        # A folder's files are not read again; of the Hub an older run may have noted no commit.
        expected = noted.get("weights") or identity(model)
        return cls(SharedStorage.of(run), model, expected, _fit={here}, _asked={here})

    def ask_all(self) -> None:
        """Have all nodes of the connected cluster that compute answer.

        Raises:
            UserError: If one of them does not see the run directory or the model, may not write there, gets no answer
                from the store, or has no Strata or another.
        """
        self._ask(ray.nodes())
        n_asked = len(self._pending)
        refused = self._answers(PROBE_SECONDS)
        if refused:
            raise UserError(f"{refused[0].why} (so on {len(refused)} of {n_asked} other nodes)")

    def refused(self, nodes: list[Mapping[str, Any]]) -> list[Refusal]:
        """Ask those of Ray's nodes that have joined; those that have answered meanwhile, and can't work."""
        with self._lock:  # a ring's harvest looks for room beside the sweep
            self._ask(nodes)
            return self._answers(0.0)

    @property
    def fit(self) -> frozenset[str]:
        """Nodes that have said that they can work on the run; others are not to be relied on, or not yet."""
        with self._lock:
            return frozenset(self._fit)

    def _ask(self, nodes: list[Mapping[str, Any]]) -> None:
        ask = ray.remote(num_cpus=0, max_retries=0)(_fault)
        for node in nodes:
            name = node["NodeID"]
            if node["Alive"] and node["Resources"].get("CPU") and name not in self._asked:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                asked = ask.options(scheduling_strategy=there).remote(
                    self.storage, self.model, self.expected
                )
                self._asked.add(name)
                self._pending[asked] = name, node["NodeManagerHostname"]

    def _answers(self, timeout: float) -> list[Refusal]:
        if not self._pending:
            return []
        answered, _ = ray.wait([*self._pending], num_returns=len(self._pending), timeout=timeout)
        refused = []
        for answer in answered:
            node, host = self._pending.pop(answer)
            try:
                why = _told(answer, host)
            except _LOST as error:
                self._n_lost[node] += 1
                if self._n_lost[node] < _MOST_LOST:
                    self._asked.discard(node)  # to be asked again, if it is there
                    continue
                why = (
                    f"node {host} loses every process that is asked whether it can work on the run ({_first_line(error)}); see what "
                    "ends processes there, mostly a lack of memory"
                )
            if why is None:
                self._fit.add(node)
            else:
                refused.append(Refusal(node=node, host=host, why=why))
        return refused


def _fault(storage: SharedStorage, model: ModelSource, expected: str | None) -> str | None:
    """What is wrong on the node where this runs, as text."""
    node = socket.gethostname()
    try:
        storage.check()
        found = identity(model)
    except UserError as error:
        return str(error)
    except (InputError, StoreError, OSError) as error:
        return f"node {node}: {error}"
    if is_same(found, expected):
        return None
    return (
        f"model.name: {model.name} on node {node} is not what it is on {storage.driver['host']}, which drives the run "
        f"(fingerprint {found}, and {expected} there); every node has to see the same folder: put it where "
        "all nodes mount shared storage, or name a model of the Hub"
    )


def _first_line(error: Exception) -> str:
    return redacted(str(error)).strip().partition("\n")[0]


def _told(answer: "ray.ObjectRef[str | None]", host: str) -> str | None:
    """What a node says is wrong.

    Raises:
        RayError: One of `_LOST`.
    """
    try:
        return ray.get(answer)
    except _LOST:
        raise
    except RayError as error:  # nothing of Strata has begun there
        reason = redacted(str(error)).strip().splitlines()[-1]
        return (
            f"node {host} can't work on the run ({reason}); install Strata on every node, with what it needs, "
            "as cluster.yaml does"
        )
