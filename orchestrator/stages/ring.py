"""The training store within `harvest.disk_budget`: harvested beside training, a few segments at a time.

The readers say which shards they need (`storage.ring`); a thread of the driver has these harvested, and
releases those that no reader needs any more. Order and numbers are those of the whole store.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from signal import SIGTERM
from threading import Event

from actors.harvester import Harvester
from orchestrator.errors import UserError
from orchestrator.pool import JOBS_IN_HAND, Pool
from orchestrator.session import Session
from orchestrator.stages.harvest import harvester_arguments
from orchestrator.stores import shards_within
from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.ring import RingWriter

_POLL_SECONDS = 0.2


@contextmanager
def harvesting_beside(session: Session, pool: Pool) -> Iterator[None]:
    """Have the training store harvested as its readers ask for it, for the time inside.

    The pool must have been freed: the harvesters take its place before the trials take the rest.

    Raises:
        UserError: If there is no room for a harvester and a trainer at the same time.
        Exception: What stopped a harvester; the readers are told, so that they wait no longer, and where that
            can't be written this process is interrupted.
    """
    store = ActivationStore.open(session.run.train)
    room = shards_within(session.cfg, store.spec)
    if room is None:
        yield
        return
    places = pool.placement.room()
    n_ranks = session.cfg.compute.ranks.n_ranks
    n_actors = min(session.cfg.compute.harvesters or places // 2, places - n_ranks)
    if n_actors < 1:
        raise UserError(
            "harvest.disk_budget: harvesters and trainers work at the same time, and there is room for "
            f"{places} actors, of which a trial takes {n_ranks}; raise compute.cpus, lower "
            "compute.cpus_per_actor, or leave disk_budget out"
        )
    harvesters = Pool(replace(pool.placement, at_most=n_actors), pool.storage)
    harvesters.start()
    writer = RingWriter(store, session.run.ring, room)
    arguments = harvester_arguments(session, pool)
    over = Event()

    def harvest() -> None:
        while not over.wait(_POLL_SECONDS):
            shards = writer.next_shards()[: n_actors * JOBS_IN_HAND]
            jobs = [(session.run.train, shard) for shard in shards]
            for _ in harvesters.work(Harvester, arguments, "harvest", jobs, overlap=True):
                if over.is_set():
                    break  # what is under way is given up

    def harvest_or_tell() -> None:
        try:
            harvest()
        except Exception as error:
            try:
                writer.fail(str(error))
            except (StoreError, OSError):
                if not over.is_set():  # as on a full disk, where nobody can be told
                    os.kill(os.getpid(), SIGTERM)
            raise

    session.say(
        f"harvest   train: beside the sweep, {room} of {store.spec.n_shards} shards at a time "
        "(harvest.disk_budget)"
    )
    with ThreadPoolExecutor(1) as beside:
        harvesting = beside.submit(harvest_or_tell)
        try:
            yield
        finally:
            over.set()
            wait([harvesting])
            harvesters.free()
            harvesting.result()  # what stopped it is why the trials stopped
    session.say(f"harvest   train: {writer.n_released} shards were released on the way")
