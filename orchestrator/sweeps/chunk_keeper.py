"""One read for all trials of a node: decoded parts of the training store, in the node's shared memory.

A process of each node reads what the trials there ask for, once, and keeps what was asked for last in Ray's
object store, where every process of the node sees it without a copy. Trials that are far apart have it read
again; whatever becomes of that process, they can read for themselves.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.places import Location

READS_AT_ONCE = 16
"""Of trials that ask at the same time, those that wait for another's read included."""

PATIENCE_SECONDS = 300.0
"""Longer than a store is given to answer; then a trial reads for itself."""

Part = tuple[str, str, int]
"""`chunk` of an array, or `column` of a shard: its kind, the name, the number."""


class ChunkKeeper:
    """What reads for a node. It answers several at once, in threads."""

    def __init__(self, location: Location, n_bytes: int) -> None:
        """Keep up to `n_bytes` of the store at a place."""
        self._store, self._room = ActivationStore.open(location), n_bytes
        self._lock = Lock()
        self._parts: OrderedDict[Part, Future[tuple[ray.ObjectRef, int] | None]] = OrderedDict()
        """Those that are there or on their way, the one asked for last at the end."""

    def part(self, *asked: Any) -> list[ray.ObjectRef] | None:
        """A `Part`, as a reference in a list so that Ray passes it on as it is; None if it can't be read.

        Whoever asks first has it read; who asks meanwhile waits for that.
        """
        with self._lock:
            found = self._parts.get(asked)
            coming = self._parts.setdefault(asked, Future())
            self._parts.move_to_end(asked)
        if found is None:
            kept = None
            try:
                rows = self._read(*asked)
                kept = ray.put(rows), rows.nbytes
            except (StoreError, RayError):
                pass  # the trial will meet it too, and tell it
            finally:
                with self._lock:
                    if kept is None:
                        del self._parts[asked]
                    coming.set_result(kept)
                    self._make_room()
        got = coming.result()
        return None if got is None else [got[0]]

    def _read(self, kind: str, name: str, number: int) -> np.ndarray:
        spec = self._store.spec
        if kind == "chunk":
            return self._store.read_stored(name, *spec.chunk_range(number))
        return self._store.column(name, *spec.shard_range(number))

    def _make_room(self) -> None:
        """Drop what was asked for longest ago; who still uses it keeps it."""
        there = {key: part.result() for key, part in self._parts.items() if part.done()}
        sizes = {key: got[1] for key, got in there.items() if got}
        held = sum(sizes.values())
        for key, n_bytes in sizes.items():
            if held <= self._room:
                break
            del self._parts[key]
            held -= n_bytes


class NodeChunks:
    """A `storage.chunk_source.ChunkSource`: what the keeper of this node has."""

    def __init__(self, keepers: Mapping[str, Any]) -> None:
        """Given the keepers by node; a node that came later has none."""
        self._keepers = keepers

    def chunk(self, array: str, chunk: int) -> np.ndarray | None:
        """A chunk of an array."""
        return self._part("chunk", array, chunk)

    def column(self, name: str, shard: int) -> np.ndarray | None:
        """A column of a shard."""
        return self._part("column", name, shard)

    def _part(self, *asked: Any) -> np.ndarray | None:
        keeper = self._keepers.get(ray.get_runtime_context().get_node_id())
        if keeper is None:
            return None
        try:
            found = ray.get(keeper.part.remote(*asked), timeout=PATIENCE_SECONDS)
            if found is None:
                return None
            return ray.get(found[0], timeout=PATIENCE_SECONDS)
        except RayError:  # the keeper is gone, or its chunks are
            return None


@contextmanager
def keeping_chunks(location: Location, n_bytes: int) -> Iterator[NodeChunks]:
    """A keeper on every node, for the time inside.

    Args:
        location: Of the store.
        n_bytes: That a keeper may keep, at most; on a node with less shared memory two thirds of that.
    """
    keeper = ray.remote(ChunkKeeper)
    keepers: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = int(node["Resources"].get("object_store_memory", 0))
            keepers[node["NodeID"]] = keeper.options(
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=READS_AT_ONCE,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(location, min(n_bytes, there * 2 // 3))
    try:
        yield NodeChunks(keepers)
    finally:
        if ray.is_initialized():
            for process in keepers.values():
                ray.kill(process)
