"""Several autoencoders of one group that train on the same batches, in one process.

A batch is read, copied to the device and decoded once, and then each member takes its step. A member is a
trial like any other: it has its folder, checkpoint, place in the data and result, and ends with the same bits
as if it had been trained alone.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from actors.errors import InputError
from actors.save_clock import SaveClock
from actors.trainer import Spent, Trainer, feed_of
from actors.trial import Trial
from sae.ranks import ALONE, Ranks
from storage.chunk_source import ChunkSource


def bundles(trials: Iterable[Trial], size: int) -> list[tuple[Trial, ...]]:
    """Trials that train on the same batches, up to `size` together, in the order of the first of each."""
    alike: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        batches = (trial.group, trial.fit.batch_tokens, trial.window_chunks, trial.seed)
        alike.setdefault((*batches, trial.n_steps), []).append(trial)
    return [
        tuple(some[first : first + size])
        for some in alike.values()
        for first in range(0, len(some), size)
    ]


class Bundle:
    """Trains the trials of one of `bundles` that have no result yet."""

    def __init__(
        self,
        trials: Sequence[Trial],
        device: str = "cpu",
        n_threads: int = 1,
        shared: ChunkSource | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Continue each member from its checkpoint, or begin it.

        Args:
            trials: One of `bundles`.
            device: Where they are trained.
            n_threads: Of the CPU.
            shared: Who is asked first for parts of the store that are not read in place.
            ranks: Who shares the autoencoders; each has such a bundle, and all do the same with it.
        """
        self._feed = feed_of(trials[0], device, shared, ranks)
        self.failures: dict[str, Exception] = {}
        """By trial, what stopped a member; the others go on without it."""
        self._members: list[Trainer] = []
        for trial in trials:
            if ranks.of_first(trial.result_file.is_file()):
                continue
            try:
                self._members.append(Trainer(trial, self._feed, device, n_threads, ranks))
            except InputError as error:
                if len(trials) == 1:
                    raise
                # Its traceback would hold the half-made autoencoder.
                self.failures[trial.id] = InputError(str(error))
        for _ in self.failures:
            self._feed.leave()
        self._clock = SaveClock([member.trial for member in self._members], ranks)
        self._counted_from = Spent()

    @property
    def step(self) -> int:
        """Steps done by those who have done the fewest."""
        return min((member.step for member in self._members), default=0)

    @property
    def is_over(self) -> bool:
        """Whether every member has ended."""
        return not self._members

    def advance(self, n_steps: int) -> dict[str, dict[str, Any]]:
        """Train for `n_steps` more steps; whoever has come further waits for the others.

        Returns:
            By trial, what `Trainer.report` tells, if anything; of those that have ended also the `result`.
        """
        first, goal = self.step, self.step + n_steps
        ends = {member: min(goal, member.last_step) for member in self._members}
        self._start_counting()
        while moving := [member for member in self._members if member.step < ends[member]]:
            step = min(member.step for member in moving)
            if step > first and self._clock.is_due():
                self._count()
                self._save()
                self._start_counting()
            for member in moving:
                if member.step == step and not self._train(member):
                    ends[member] = step
        self._count()
        reports = {m.trial.id: {**row} for m in self._members if (row := m.report()) is not None}
        over = any(member.finished for member in self._members)
        if n_steps and (over or self._clock.is_due()):
            self._save()
        for member in [member for member in self._members if member.finished]:
            reports[member.trial.id] |= {"result": member.finish()}
            self._members.remove(member)
        return reports

    def pause(self) -> None:
        """Write all checkpoints and let go of the data; a new bundle goes on."""
        for member in self._members:
            member.pause()

    def _save(self) -> None:
        """All at the same step, so that a crash leaves nobody far behind."""
        with self._clock.saving():
            for member in self._members:
                member.save()

    def _start_counting(self) -> None:
        self._counted_from = Spent(seconds=time.monotonic(), waited=self._feed.waited)

    def _count(self) -> None:
        """Tell the members what has been spent since then."""
        start = self._counted_from
        spent = Spent(
            seconds=time.monotonic() - start.seconds, waited=self._feed.waited - start.waited
        )
        for member in self._members:
            member.spend(spent)

    def _train(self, member: Trainer) -> bool:
        """One step of a member; whether it can take another."""
        self._feed.at(member.cursor)  # what fails here fails for all
        try:
            return member.train()
        except (ValueError, RuntimeError) as error:  # of torch, and of `sae`
            self.failures[member.trial.id] = error
            self._members.remove(member)
            self._feed.leave()
            return False
