"""When checkpoints are due: after a while, or because the driver, which is about to end, asks for them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from actors.trial import Trial
from sae.ranks import Ranks

_MOST_SPENT = 0.05
"""Of the time, on writing checkpoints: those of large autoencoders on shared disks are far apart."""

_LOOK_SECONDS = 0.5
"""Between two looks for the driver's request: each asks the file system."""


class SaveClock:
    """Tells when to write the next checkpoints of trials that are trained together."""

    def __init__(self, trials: Sequence[Trial], ranks: Ranks) -> None:
        """The time counts from now."""
        self._trials, self._ranks = trials, ranks
        self._saved_at = self._looked_at = time.monotonic()
        self._cost = 0.0
        """Seconds that the last ones took to write."""

    def is_due(self) -> bool:
        """Whether checkpoints are to be written now, as the first rank sees it."""
        now = time.monotonic()
        wanted = min((trial.checkpoint_seconds for trial in self._trials), default=0.0)
        passed = now - self._saved_at >= max(wanted, self._cost / _MOST_SPENT)
        return bool(self._ranks.of_first(passed or self._is_asked(now)))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of all of them."""
        start = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def _is_asked(self, now: float) -> bool:
        if now - self._looked_at < _LOOK_SECONDS:
            return False
        self._looked_at = now
        return any(trial.save_request.exists() for trial in self._trials)
