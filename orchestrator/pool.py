"""A pool of processes that take the work of one stage after the other.

To start a process and bring in its libraries takes seconds, so they are kept from stage to stage; the
sweep, whose actors are Ray Tune's, is given their place. Processes come and go with the nodes of the
cluster: they are started where there is room, also while work goes on, and the jobs of one that is lost
are done by others.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from orchestrator.admission import Admission
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.node_error import NodeError, blaming_this_node
from orchestrator.placement import Nodes, Placement
from orchestrator.run_directory import RunDirectory
from orchestrator.shared_storage import SharedStorage
from storage.errors import StoreError

JOBS_IN_HAND = 2
"""Of each process: one that it does, and one that waits, or is done beside it in a thread."""

ASKED_BEYOND_ROOM = 16
"""Processes that are asked for beyond what a cluster that may grow has room for: an autoscaler goes by that."""

DEATHS = 3
"""That a job is given up after, of processes on nodes that live on; and starts, if none comes up."""

_LOOK_SECONDS = 1.0


@dataclass(eq=False)
class _Member:
    """A process that was asked for."""

    process: Any
    up: "ray.ObjectRef[str]"
    """Its node, once it has its place."""

    node: str | None = None
    in_hand: int = 0

    newest_list: Any = None
    """The work list that it has had a job of last."""


@dataclass(eq=False)
class _Job:
    arguments: tuple[Any, ...]
    deaths: int = 0
    """Of processes that had it in hand."""


class Pool:
    """Processes that build any actor and call its methods."""

    def __init__(self, placement: Placement, storage: SharedStorage | None = None) -> None:
        """Start nothing yet.

        Args:
            placement: What each process gets, and how many there is room for.
            storage: What each process must find before it does anything.
        """
        self.placement, self.storage = placement, storage
        self._members: list[_Member] = []
        self._failed_starts = 0
        self.n_at_work = 0
        """Processes that have jobs of the newest work list."""
        self.queues: dict[str, int] = {}
        """Of that list: jobs that are `in_hand` of a process, and those `waiting` for one."""

    @classmethod
    def of_run(cls, cfg: RunConfig, run: RunDirectory, tell: Callable[[str], None]) -> "Pool":
        """The pool of a run, on the connected cluster.

        Raises:
            UserError: If there is no room for an actor, or a node can't work on the run.
        """
        nodes = Nodes(tell)
        placement = Placement.of(cfg.compute, nodes)
        placement.wait_for_room()
        Placement.of_trainers(cfg.compute, nodes).wait_for_room()
        admission = Admission.of(cfg.model, run)
        admission.ask_all()
        nodes.admission = admission
        since = time.monotonic()
        while not placement.room():  # no node has answered yet
            if time.monotonic() - since > placement.patience:
                raise placement.no_room()
            time.sleep(_LOOK_SECONDS)
        return cls(placement, admission.storage)

    def work(
        self,
        actor: type,
        arguments: Sequence[Any],
        method: str,
        jobs: Iterable[tuple[Any, ...]],
        n_actors: int | None = None,
        overlap: bool = False,
    ) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Every job with the result of `actor(*arguments).method(*job)`, as they come.

        A pure work list: jobs of a process that is lost are done by another, so they must be
        idempotent; a node that the run's files are out of reach of is left out. With `overlap` a process
        does all the jobs that it has in hand at once, in threads.

        Raises:
            UserError: If no process gets a place in time, or a job is the end of every process that tries it.
            Exception: What the method or the constructor raised, as itself.
        """
        todo = deque(_Job(job) for job in jobs)
        if not todo:
            return
        made = ray.put(cloudpickle.dumps((actor, tuple(arguments), self.storage)))  # pyright: ignore
        inflight: dict[ray.ObjectRef, tuple[_Member, _Job]] = {}
        alone_since = time.monotonic()
        try:
            while todo or inflight:
                n_left = len(todo) + len(inflight)
                self._recruit(min(n_left, n_actors or n_left))
                while (member := self._next_hand(made, len(todo), n_actors)) is not None:
                    job = todo.popleft()
                    member.in_hand += 1
                    member.newest_list = made
                    sent = member.process.do.remote(made, method, job.arguments, overlap)
                    inflight[sent] = member, job
                self.n_at_work = len({member for member, _ in inflight.values()})
                if inflight:
                    alone_since = time.monotonic()
                self._refuse_to_wait_longer_than_said(alone_since)
                ready = self._answered(inflight)
                if ready is None:
                    continue
                member, job = inflight.pop(ready)
                member.in_hand -= 1
                try:
                    result = self._result(ready, member, job)
                except _AgainError:
                    todo.appendleft(job)
                    continue
                self.queues = {"in_hand": len(inflight), "waiting": len(todo)}
                yield job.arguments, result
        finally:
            if inflight:  # what is still under way, nobody waits for
                self.free()
            self._withdraw_requests()

    def call(self, actor: type, arguments: Sequence[Any], method: str, *job: Any) -> Any:
        """The result of one method of one actor, as `work` does it."""
        [(_, result)] = self.work(actor, arguments, method, [job])
        return result

    def start(self) -> None:
        """Start as many processes as there is room for, and wait until they have their place.

        Raises:
            UserError: If they do not get it in time.
        """
        since = time.monotonic()
        self._recruit(self.placement.room())
        while any(member.node is None for member in self._members):
            self._refuse_to_wait_longer_than_said(since)
            self._answered({})

    def free(self) -> None:
        """End the processes, so that others can have their place; the next work starts new ones."""
        for member in list(self._members):
            self._dismiss(member)

    def _recruit(self, wanted: int) -> None:
        """Have processes for so many jobs, as far as there is room, and none on nodes that are about to go."""
        present = self.placement.nodes.present()
        for member in list(self._members):
            if member.node is not None and member.node not in present and not member.in_hand:
                self._dismiss(member)
        serving = sum(member.node is None or member.node in present for member in self._members)
        room = self.placement.room()
        if self.placement.patience and self.placement.at_most is None:
            room += ASKED_BEYOND_ROOM
        for _ in range(min(wanted, room) - serving):
            options = {**self.placement.options, "max_concurrency": JOBS_IN_HAND}
            process: Any = ray.remote(**options)(_Process).remote()
            self._members.append(_Member(process, process.node.remote()))

    def _next_hand(self, work: Any, n_todo: int, at_most: int | None) -> _Member | None:
        """Who of `at_most` takes the next of so many jobs of a list: a second one when there is one for everybody."""
        usable = self.placement.nodes.usable()
        there = [member for member in self._members if member.node in usable]
        # Whoever comes up later does not take the place of one that is at it.
        there = sorted(there, key=lambda member: member.newest_list is not work)[:at_most]
        # Those asked for beyond room may never come.
        n_coming = min(len(self._members[:at_most]), self.placement.room()) - len(there)
        free = min(there, key=lambda member: member.in_hand, default=None)
        if not n_todo or free is None or free.in_hand == JOBS_IN_HAND:
            return None
        return free if not free.in_hand or n_todo > n_coming else None

    def _answered(self, inflight: dict[ray.ObjectRef, Any]) -> ray.ObjectRef | None:
        """A job that is done; None if none is within a second. Takes note of who has come up."""
        coming = {member.up: member for member in self._members if member.node is None}
        asked = [*coming, *inflight]
        if not asked:
            time.sleep(_LOOK_SECONDS)
            return None
        answers, _ = ray.wait(asked, num_returns=1, timeout=_LOOK_SECONDS)
        if not answers:
            return None
        [answer] = answers
        if answer in inflight:
            return answer
        member = coming[answer]
        try:
            member.node = ray.get(answer)
            self._failed_starts = 0
        except RayActorError as error:
            self._dismiss(member)
            self._failed_starts += 1
            # Where others are at work it may be one node's fault, which is being asked what it lacks.
            if self._failed_starts > DEATHS and all(other.node is None for other in self._members):
                raise UserError(
                    f"no process comes up on the cluster, after {self._failed_starts} tries; see to it that "
                    f"every node can start one (`ray status`, Ray's logs): {error}"
                ) from None
        return None

    def _result(self, ready: ray.ObjectRef, member: _Member, job: _Job) -> Any:
        """What a job has come to.

        Raises:
            _AgainError: If another process is to do it.
            Exception: As `work`.
        """
        try:
            return ray.get(ready)
        except RayTaskError as error:
            if not isinstance(error.cause, NodeError):
                raise (error.cause or error) from None
            self.placement.leave_out(error.cause)
            for other in [other for other in self._members if other.node == error.cause.node]:
                self._dismiss(other)
        except RayActorError as error:
            if member in self._members:  # it was not we who ended it
                self._dismiss(member)
                # One that has gone with its node is first out of reach.
                job.deaths += not isinstance(error, ActorUnavailableError) and (
                    member.node in self.placement.nodes.usable(now=True)
                )
            if job.deaths > DEATHS:
                raise UserError(
                    f"a job ended {job.deaths} processes that tried it ({job.arguments}); mostly memory is the "
                    f"reason: give each actor more of it (fewer of them, smaller batches): {error}"
                ) from None
        except ObjectLostError:  # it went with its node
            pass
        raise _AgainError

    def _refuse_to_wait_longer_than_said(self, since: float) -> None:
        if time.monotonic() - since > (self.placement.patience or math.inf):
            raise self.placement.no_room()

    def _withdraw_requests(self) -> None:
        """For processes that there was no room for."""
        coming = [member for member in self._members if member.node is None]
        if coming and ray.is_initialized():
            for member in coming[: max(0, len(self._members) - self.placement.room())]:
                self._dismiss(member)

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        # A generator may be closed late, and killing would start a new Ray.
        if ray.is_initialized():
            ray.kill(member.process)


class _AgainError(Exception):
    """A job is to be done once more."""


class _Process:
    """Builds an actor at its first job, and keeps it until a job wants another.

    So what a constructor raises reaches the driver as itself; Ray would keep only its text.
    """

    def __init__(self) -> None:
        self._made: bytes | None = None
        self._instance: Any = None
        self._building, self._working = Lock(), Lock()

    def node(self) -> str:
        """Where it is; to be answered is to be there."""
        return ray.get_runtime_context().get_node_id()

    def do(self, made: bytes, method: str, job: tuple[Any, ...], overlap: bool) -> Any:
        with self._building:
            if made != self._made:
                self._instance = self._made = None  # never two models in memory
                actor, arguments, storage = cloudpickle.loads(made)
                if storage is not None:
                    with blaming_this_node(UserError, StoreError):
                        storage.check()
                with blaming_this_node(StoreError, OSError):
                    self._instance, self._made = actor(*arguments), made
        with blaming_this_node(StoreError, OSError), nullcontext() if overlap else self._working:
            return getattr(self._instance, method)(*job)
