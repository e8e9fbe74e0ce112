"""A store that holds only the shards that readers need next: what they ask for, and when it is there.

Readers go through the shards in one order, segment by segment. Each says in a file of its own which
segment it is at; whoever writes the store reads these files, writes what is asked for and releases
what nobody asks for. No reader waits for another, but the fastest for room.
"""

import json
from collections.abc import Sequence
from threading import Event, Lock
from typing import Any

from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.places import Location, place

_POLL_SECONDS = 0.1
_FAILED = "failed"


class RingReader:
    """One reader of a ring."""

    def __init__(self, requests: Location, name: str) -> None:
        """Ask for nothing yet.

        Args:
            requests: Where readers leave what they ask for, and nothing else is.
            name: Of this reader, the same after a restart.
        """
        self._requests, self._file = place(requests), f"{name}.json"
        self._asked: dict[str, Any] = {}
        self._asking = Lock()
        """One waits for shards while another lets go of some, or leaves."""
        self._left = Event()

    @property
    def has_left(self) -> bool:
        """Whether nothing is asked for any more."""
        return self._left.is_set()

    def wait_for(
        self,
        store: ActivationStore,
        epoch: int,
        shards: range,
        then: Sequence[range] = (),
        held: Sequence[range] = (),
    ) -> bool:
        """Ask for a segment, and wait until it is there.

        Args:
            store: The ring.
            epoch: The one that it is for.
            shards: Of the segment.
            then: Segments that are read after it.
            held: Segments that are still in use, until `let_go`.

        Returns:
            Whether it is there; False after `leave`.

        Raises:
            StoreError: If the writer has failed.
        """
        self._ask(
            epoch=epoch,
            held=[shard for segment in held for shard in segment],
            now=list(shards),
            then=[shard for segment in then for shard in segment],
        )
        while set(shards) & set(store.missing()):
            if self._left.wait(_POLL_SECONDS):
                return False
            if self._requests.size(_FAILED) is not None:
                raise StoreError(self._requests.read(_FAILED).decode())
        return True

    def let_go(self) -> None:
        """Say that what was held is used up."""
        if self._asked.get("held"):
            self._ask(held=[])

    def leave(self) -> None:
        """Ask for nothing any more; whoever waits is told."""
        self._left.set()
        with self._asking:
            self._requests.delete(self._file)

    def _ask(self, **changed: Any) -> None:
        with self._asking:
            self._asked |= changed
            if not self.has_left:
                self._requests.write(self._file, [json.dumps(self._asked).encode()])


class RingWriter:
    """What decides which shards are there."""

    def __init__(self, store: ActivationStore, requests: Location, room: int) -> None:
        """Forget what former readers asked for.

        Args:
            store: The ring.
            requests: Where readers leave what they ask for.
            room: Shards that may be there at a time; two segments at least.
        """
        self._store, self._requests, self._room = store, place(requests), room
        self.n_released = 0
        """So far."""
        for name in self._requests.names():
            self._requests.delete(name)

    def next_shards(self) -> list[int]:
        """The shards to write now, the most urgent first; room for them is made.

        What a reader is at stays, whatever the room. A reader asks and then looks whether the shard is
        there; here it is marked as gone, and then looked whether it is asked for. So one of the two
        sees the other.
        """
        wanted = self._asked_for("held", "now", "then")[: self._room]
        missing = set(self._store.missing())
        to_write = [shard for shard in wanted if shard in missing]
        there = [shard for shard in range(self._store.spec.n_shards) if shard not in missing]
        over = len(there) + len(to_write) - self._room
        for shard in there:
            if over > 0 and shard not in wanted and self._release(shard):
                over -= 1
        return to_write[: len(to_write) - max(0, over)]

    def _release(self, shard: int) -> bool:
        released = self._store.release(
            shard, unless=lambda: shard in self._asked_for("held", "now")
        )
        self.n_released += released
        return released

    def fail(self, why: str) -> None:
        """Tell all who wait that nothing more will come."""
        self._requests.write(_FAILED, [why.encode()])

    def _asked_for(self, *kinds: str) -> list[int]:
        """The shards asked for, by kind, and of a kind what the slowest reader needs first."""
        asked = []
        for name in self._requests.names():
            if not name.endswith(".json"):
                continue  # half written, and soon to have its name
            try:
                asked.append(json.loads(self._requests.read(name)))
            except FileNotFoundError:  # the reader has just left
                continue
        asked.sort(key=lambda request: (request["epoch"], request["now"]))
        order = [shard for kind in kinds for request in asked for shard in request[kind]]
        return list(dict.fromkeys(order))
