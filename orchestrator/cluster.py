"""Ray: connecting, and what each kind of actor asks for."""

import logging
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import ray
from ray.exceptions import RayTaskError

from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError

CONNECT_SECONDS = 10.0
STARTS = 3
"""Times that Ray is started on this machine; a busy one can miss the 30 s that Ray gives itself."""

OBJECT_STORE_BYTES = 256 * 2**20  # activations never travel through Ray: receipts and configs do


@contextmanager
def connected(cfg: ComputeConfig) -> Iterator[None]:
    """A Ray cluster for the time inside: a private one, or the one at `cfg.address`.

    Raises:
        UserError: If no cluster answers at the address, or one actor asks for more than there is.
    """
    if cfg.address:
        _check_listens(cfg.address)
        _join(cfg.address)
    else:
        _start(cfg.cpus)
    try:
        check_fits(cfg)
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(_no_cluster(address, error)) from None


def _start(cpus: int | None) -> None:
    for attempt in range(STARTS):
        try:
            ray.init(
                "local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray has no class of its own for it
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if attempt == STARTS - 1:
                raise UserError(
                    f"Ray did not start within 30 s, {STARTS} times over; it starts in seconds on a "
                    "machine with a core and 2 GiB of memory to spare: end other work, then give "
                    "the same command"
                ) from None


def _check_listens(address: str) -> None:
    """Ask the port itself first: Ray would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto`, which Ray looks up by itself
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(_no_cluster(address, error)) from None


def _no_cluster(address: str, error: Exception) -> str:
    return (
        f"compute.address: no Ray cluster at {address} ({error}); start one with "
        "`ray start --head`, or leave the address out to use this machine alone"
    )


def check_fits(cfg: ComputeConfig) -> None:
    """Refuse, with a UserError, actors that ask for more than the whole cluster has."""
    total = ray.cluster_resources()
    for key, asked in (("CPU", cfg.cpus_per_actor), ("GPU", cfg.gpus_per_actor)):
        if asked > total.get(key, 0):
            raise UserError(
                f"compute.{key.lower()}s_per_actor: {asked} is more than the cluster's "
                f"{total.get(key, 0):g} {key}s, so no actor could start; lower it or add nodes"
            )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What every actor of a pool gets, and how many there are room for."""

    cpus: int
    gpus: float
    capacity: int

    @classmethod
    def of(cls, cfg: ComputeConfig) -> "Placement":
        """As many actors as the connected cluster has room for."""
        total = ray.cluster_resources()
        capacity = int(total["CPU"] // cfg.cpus_per_actor)
        if cfg.gpus_per_actor:
            capacity = min(capacity, int(total["GPU"] / cfg.gpus_per_actor))
        return cls(cpus=cfg.cpus_per_actor, gpus=cfg.gpus_per_actor, capacity=max(1, capacity))

    @property
    def device(self) -> str:
        """Where an actor computes. Ray decides which GPU `cuda` means inside the actor."""
        return "cuda" if self.gpus else "cpu"


def work(
    placement: Placement,
    actor: type,
    arguments: Sequence[Any],
    method: str,
    jobs: Iterable[tuple[Any, ...]],
    n_actors: int | None = None,
    at_once: int = 1,
) -> Iterator[Any]:
    """Results of `actor(*arguments).method(*job)` for every job, as they come, from a pool of actors.

    A pure work list: an actor that dies is restarted and its jobs done again, so jobs must be
    idempotent. An actor has two jobs, of which it does `at_once` at a time, in threads; that is all
    the queueing there is.

    Raises:
        Exception: What the method raised, as itself.
    """
    todo = list(jobs)
    if not todo:
        return
    n_actors = min(n_actors or placement.capacity, placement.capacity, len(todo))
    options = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "max_concurrency": at_once}
    remote = ray.remote(max_restarts=3, max_task_retries=3, **options)(_Worker)
    pool: list[Any] = [remote.remote(actor, arguments) for _ in range(n_actors)]
    waiting = iter(todo)
    inflight: dict[ray.ObjectRef, Any] = {}

    def submit(member: Any) -> None:
        for job in waiting:
            inflight[member.do.remote(method, job)] = member
            return

    for member in pool * 2:
        submit(member)
    try:
        while inflight:
            [ready], _ = ray.wait(list(inflight), num_returns=1)
            member = inflight.pop(ready)
            try:
                yield ray.get(ready)
            except RayTaskError as error:
                raise (error.cause or error) from None
            submit(member)
    finally:
        if (
            ray.is_initialized()
        ):  # a generator may be closed late, and killing would start a new Ray
            for member in pool:
                ray.kill(member)


def call(
    placement: Placement, actor: type, arguments: Sequence[Any], method: str, *job: Any
) -> Any:
    """The result of one method of one actor, as `work` does it."""
    return next(work(placement, actor, arguments, method, [job], 1))


class _Worker:
    """Builds its actor at the first job.

    So what a constructor raises reaches the driver as itself; Ray would keep only its text.
    """

    def __init__(self, actor: type, arguments: Sequence[Any]) -> None:
        self._actor, self._arguments, self._instance = actor, arguments, None
        self._building = Lock()

    def do(self, method: str, job: tuple[Any, ...]) -> Any:
        with self._building:
            if self._instance is None:
                self._instance = self._actor(*self._arguments)
        return getattr(self._instance, method)(*job)
