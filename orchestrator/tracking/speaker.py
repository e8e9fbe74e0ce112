"""Tells a server things one after the other, in a thread of its own: nobody waits for its answers."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

RETRY_SECONDS = 60.0


class Speaker:
    """A queue of calls to a server that may fail to answer.

    They are made in the order in which they were given. When one meets an outage, that is said once, it
    and those of the next minute are left out, and `complete` is false from then on. Ctrl-C ends a
    wait, never a call half-way: whatever waits in the queue when the process ends is still told.
    """

    def __init__(
        self, is_outage: Callable[[BaseException], bool], warn: Callable[[BaseException], None]
    ) -> None:
        """Start with nothing to tell; `warn` is called at the first outage."""
        self._is_outage, self._warn = is_outage, warn
        self._thread = ThreadPoolExecutor(1, "speaker")
        self._silent_until = 0.0
        self._fault: BaseException | None = None
        self.complete = True
        self.cpu_seconds = 0.0

    def tell(self, call: Callable[[], None]) -> None:
        """Have the call made after those before it; returns at once."""
        self._thread.submit(self._make, call).add_done_callback(self._judge)

    def flush(self) -> None:
        """Wait until everything given so far was told or left out.

        Raises:
            BaseException: What a call raised since, if it was no outage.
        """
        self._thread.submit(lambda: None).result()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _make(self, call: Callable[[], None]) -> None:
        if time.monotonic() < self._silent_until:
            self.complete = False
            return
        start = time.thread_time()
        try:
            call()
        finally:
            self.cpu_seconds += time.thread_time() - start

    def _judge(self, made: "Future[None]") -> None:
        error = made.exception()
        if error is None:
            return
        if not self._is_outage(error):
            self._fault = error
            return
        if self.complete:
            self._warn(error)
        self.complete = False
        self._silent_until = time.monotonic() + RETRY_SECONDS
