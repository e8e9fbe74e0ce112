"""An actor for tests of the pool; in a module that Ray's workers can import."""

import os
import time
import uuid
from pathlib import Path
from threading import Barrier

import ray

from actors.errors import InputError
from storage.errors import RowsError, StoreError


class Counter:
    """Squares numbers; may be told to die or to complain."""

    def __init__(self, folder: Path, refuses: bool = False) -> None:
        if refuses:
            raise InputError("this counter was given nonsense; give it sense")
        self._folder = folder
        self._meeting = Barrier(2)
        self._at_work = 0
        self._name = uuid.uuid4().hex

    def square(self, number: int) -> int:
        return number * number

    def square_after_dying_once(self, number: int) -> int:
        marker = self._folder / f"died-{number}"
        if number % 3 == 0 and not marker.exists():
            marker.touch()
            os._exit(1)
        return number * number

    def die(self, number: int) -> None:
        os._exit(1)

    def somewhere(self, number: int) -> str:
        """The node that this is on, where a file named after it puts the store out of reach; slow without `hurry`."""
        if not (self._folder / "hurry").exists():
            time.sleep(0.3)
        node = ray.get_runtime_context().get_node_id()
        if (self._folder / node).exists():
            raise StoreError(f"the store is out of reach on {node}; see to it")
        return node

    def make_nonsense(self, _number: int) -> None:
        raise RowsError("these rows are not finite; see to the model")

    def complain(self) -> None:
        raise InputError("this job makes no sense; give another")

    def meet(self, _number: int) -> int:
        """Wait until a second job is here at the same time; which instance this is."""
        self._meeting.wait(timeout=60)
        return id(self)

    def alone(self, _number: int) -> bool:
        """Whether no other job is here at the same time."""
        self._at_work += 1
        time.sleep(0.1)
        alone = self._at_work == 1
        self._at_work -= 1
        return alone

    def process(self) -> dict[str, object]:
        """Where and which instance this is."""
        return {"pid": os.getpid(), "made": self._name}
