"""The ranks of a trial, seen from the process that Ray Tune knows: what `actors.bundle.Bundle` is for one.

That process holds no autoencoder, and none of its calls can be caught in a collective operation: it sees at
once that a rank is gone, ends the others and fails, and Tune begins anew from the checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.trial import Trial
from orchestrator.sweeps.rank_process import RankProcess, Standing, Workplace
from sae.parallel import RefusedElsewhereError

PATIENCE_SECONDS = 10.0
"""For other ranks' answers, once one has failed: they may wait for it, and they may know better why."""


class RankGroup:
    """Processes that train one trial after the other, each of them together."""

    def __init__(self, workplace: Workplace, gpus: float) -> None:
        """Start them, in the places that were reserved with this process's own, and have them meet.

        Args:
            workplace: What each is given; it has a core for each of its threads.
            gpus: Of each.
        """
        process = ray.remote(num_cpus=workplace.n_threads, num_gpus=gpus)(RankProcess)
        n_ranks = workplace.grid.n_ranks
        self._members: list[Any] = [process.remote(workplace) for _ in range(n_ranks)]
        self._standing: Standing | None = None
        [(host, port)] = self._answers([self._members[0].listen.remote()])
        self._answers([member.join.remote(i, host, port) for i, member in enumerate(self._members)])
        self.failures: dict[str, Exception] = {}
        """None: the one trial that a rank has fails with its process."""

    def begin(self, trials: Sequence[Trial]) -> None:
        """Begin or continue trials, of which there is one; those that were trained before are let go."""
        self._standing = self._ask("begin", trials)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._known.step

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended."""
        return self._known.is_over

    def advance(self, n_steps: int) -> dict[str, dict[str, Any]]:
        """`Bundle.advance`, by all ranks."""
        self._standing = self._ask("advance", n_steps)
        return self._known.reports

    def pause(self) -> None:
        """`Bundle.pause`, by all ranks."""
        self._ask("pause")

    def close(self) -> None:
        """End the processes."""
        for member in self._members:
            ray.kill(member)

    @property
    def _known(self) -> Standing:
        assert self._standing is not None, "it has begun"
        return self._standing

    def _ask(self, method: str, *arguments: Any) -> Any:
        """The first rank's answer, when all have answered."""
        return self._answers(
            [getattr(member, method).remote(*arguments) for member in self._members]
        )[0]

    def _answers(self, asked: list["ray.ObjectRef[Any]"]) -> list[Any]:
        """What all have answered.

        Raises:
            Exception: Of those that failed, of the one that tells most. The processes are ended, as others
                still wait for what failed.
        """
        errors: list[Exception] = []
        pending = asked
        while pending:
            ready, pending = ray.wait(pending, timeout=PATIENCE_SECONDS if errors else None)
            if not ready:
                break
            errors += [error for answer in ready if (error := _error_of(answer))]
        if errors:
            self.close()
            raise min(errors, key=_says_little)
        return ray.get(asked)


def _error_of(answer: "ray.ObjectRef[Any]") -> Exception | None:
    try:
        ray.get(answer)
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:  # the process is gone
        return error
    return None


def _says_little(error: Exception) -> bool:
    """Whether it is only what comes of another rank's error: of torch, a connection that broke."""
    return isinstance(error, RefusedElsewhereError | RuntimeError)
