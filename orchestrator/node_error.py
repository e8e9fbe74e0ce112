"""What stops work on one node and need not on another: it does not get what it needs from around it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from storage.errors import RowsError


class NodeError(Exception):
    """A node can't do its part; another may."""

    def __init__(self, node: str, host: str, why: Exception) -> None:
        """Given Ray's id of the node, its name, and what was met there."""
        super().__init__(node, host, why)
        self.node, self.host, self.why = node, host, why


@contextmanager
def blaming_this_node(*kinds: type[Exception]) -> Iterator[None]:
    """Have errors of some kinds be those of the node that this process is on, unless the data are at fault.

    Raises:
        NodeError: In place of any of them inside.
    """
    try:
        yield
    except RowsError:
        raise
    except kinds as error:
        node = ray.get_runtime_context().get_node_id()
        raise NodeError(node, socket.gethostname(), error) from error
