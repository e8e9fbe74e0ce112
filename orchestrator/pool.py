"""A pool of processes that take the work of one stage after the other.

To start a process and bring in its libraries takes seconds, so they are kept from stage to stage; the
sweep, whose actors are Ray Tune's, is given their place.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError

from orchestrator.cluster import Placement
from orchestrator.shared_storage import SharedStorage

JOBS_IN_HAND = 2
"""Of each process: one that it does, and one that waits, or is done beside it in a thread."""


class Pool:
    """Processes that build any actor and call its methods."""

    def __init__(self, placement: Placement, storage: SharedStorage | None = None) -> None:
        """Start nothing yet.

        Args:
            placement: What each process gets, and how many there is room for.
            storage: What each process must find before it does anything.
        """
        self.placement, self.storage = placement, storage
        self._members: list[Any] = []
        self.n_at_work = 0
        """Processes that have jobs of the newest work list."""
        self.queues: dict[str, int] = {}
        """Of that list: jobs that are `in_hand` of a process, and those `waiting` for one."""

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

        A pure work list: a process that dies is restarted and its jobs done again, so jobs must be
        idempotent. With `overlap` a process does all the jobs that it has in hand at once, in threads.

        Raises:
            Exception: What the method or the constructor raised, as itself.
        """
        todo = list(jobs)
        if not todo:
            return
        members = self._started(min(n_actors or len(todo), len(todo)))
        made = ray.put(cloudpickle.dumps((actor, tuple(arguments), self.storage)))  # pyright: ignore
        waiting = iter(todo)
        self.n_at_work = len(members)
        inflight: dict[ray.ObjectRef, tuple[Any, tuple[Any, ...]]] = {}

        def submit(member: Any) -> None:
            for job in waiting:
                inflight[member.do.remote(made, method, job, overlap)] = member, job
                return

        for member in members * JOBS_IN_HAND:
            submit(member)
        n_left = len(todo)
        try:
            while inflight:
                [ready], _ = ray.wait(list(inflight), num_returns=1)
                member, job = inflight.pop(ready)
                try:
                    result = ray.get(ready)
                except RayTaskError as error:
                    raise (error.cause or error) from None
                submit(member)
                n_left -= 1
                self.queues = {"in_hand": len(inflight), "waiting": n_left - len(inflight)}
                yield job, result
        finally:
            if inflight:  # what is still under way, nobody waits for
                self.free()

    def call(self, actor: type, arguments: Sequence[Any], method: str, *job: Any) -> Any:
        """The result of one method of one actor, as `work` does it."""
        [(_, result)] = self.work(actor, arguments, method, [job])
        return result

    def start(self) -> None:
        """Start as many processes as there is room for, and wait until they have their place."""
        ray.get([member.ready.remote() for member in self._started(self.placement.capacity)])

    def free(self) -> None:
        """End the processes, so that others can have their place; the next work starts new ones."""
        # A generator may be closed late, and killing would start a new Ray.
        if ray.is_initialized():
            for member in self._members:
                ray.kill(member)
        self._members = []

    def _started(self, n: int) -> list[Any]:
        """The first `n` processes, or as many as there is room for."""
        options = {
            "num_cpus": self.placement.cpus,
            "num_gpus": self.placement.gpus,
            "max_concurrency": JOBS_IN_HAND,
        }
        process = ray.remote(max_restarts=-1, max_task_retries=3, **options)(_Process)
        while len(self._members) < min(n, self.placement.capacity):
            self._members.append(process.remote())
        return self._members[:n]


class _Process:
    """Builds an actor at its first job, and keeps it until a job wants another.

    So what a constructor raises reaches the driver as itself; Ray would keep only its text.
    """

    def __init__(self) -> None:
        self._made: bytes | None = None
        self._instance: Any = None
        self._building, self._working = Lock(), Lock()

    def ready(self) -> None:
        """Nothing: to be answered is to be there."""

    def do(self, made: bytes, method: str, job: tuple[Any, ...], overlap: bool) -> Any:
        with self._building:
            if made != self._made:
                self._instance = self._made = None  # never two models in memory
                actor, arguments, storage = cloudpickle.loads(made)
                if storage is not None:
                    storage.check()
                self._instance, self._made = actor(*arguments), made
        with nullcontext() if overlap else self._working:
            return getattr(self._instance, method)(*job)
