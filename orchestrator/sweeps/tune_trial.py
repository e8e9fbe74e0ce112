"""A bundle of trials as Ray Tune runs it."""

import math
from typing import Any

from ray import tune

from actors.bundle import Bundle
from actors.trial import Trial
from orchestrator.errors import UserError
from orchestrator.node_error import blaming_this_node
from orchestrator.sweeps.rank_group import RankGroup
from orchestrator.sweeps.rank_process import Workplace
from storage.errors import StoreError

FEWEST_REPORTS, MOST_REPORTS = 20, 500
"""Of a trial: rungs are told apart by them; and each is a line of a file that is written anew."""

STEPS_PER_REPORT = 500
"""Of long trials, which are to be seen moving."""


def reports(n_steps: int) -> int:
    """Of a trial of so many steps."""
    return min(max(FEWEST_REPORTS, math.ceil(n_steps / STEPS_PER_REPORT)), MOST_REPORTS)


class TuneTrial(tune.Trainable):
    """A `Bundle` as Ray Tune wants it; the process is kept from one to the next, and so are its ranks.

    A report is `{"reports": by trial what its trainer reports, "failed": ids, "done": whether all ended}`.
    """

    _bundle: Bundle | RankGroup

    _ranks: RankGroup | None = None
    """Where trials have several."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride] (tune.with_parameters)
        self,
        config: dict[str, Any],
        workplace: Workplace,
        gpus: float,
    ) -> None:
        """Begin or continue the trials that the configuration holds, where the run directory is seen.

        What goes wrong is raised by the first step: of what a constructor raises, Ray keeps the text alone.
        """
        self._fault: Exception | None = None
        trials: tuple[Trial, ...] = config["trials"]
        self._stride = math.ceil(trials[0].n_steps / reports(trials[0].n_steps))
        try:
            with blaming_this_node(UserError, StoreError):
                workplace.storage.check()
            with blaming_this_node(StoreError, OSError):
                self._bundle = self._begun(trials, workplace, gpus)
            self._continues = self._bundle.step > 0
        except Exception as error:  # noqa: BLE001
            self._fault = error

    def _begun(
        self, trials: tuple[Trial, ...], workplace: Workplace, gpus: float
    ) -> Bundle | RankGroup:
        if workplace.grid.n_ranks == 1:
            return Bundle(trials, workplace.device, workplace.n_threads, workplace.shared)
        if self._ranks is None:
            self._ranks = RankGroup(workplace, gpus)
        self._ranks.begin(trials)
        return self._ranks

    def step(self) -> dict[str, Any]:
        """Train up to the next report; after the last one of a trial its result is there.

        Trials that are continued first say where they stand: they may have to wait there, or end.
        One that fails is left behind, and fails for Tune, which tries it again, when the others have ended.
        """
        if self._fault is not None:
            raise self._fault
        left = self._stride - self._bundle.step % self._stride
        with blaming_this_node(StoreError, OSError):
            reports = self._bundle.advance(0 if self._continues else left)
        self._continues = False
        failures = self._bundle.failures
        if self._bundle.is_over and not reports and failures:
            raise next(iter(failures.values()))
        return {
            "reports": reports,
            "failed": list(failures),
            "done": self._bundle.is_over and not failures,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trials' own checkpoints; Tune's, which it asks for before a pause, is empty."""
        with blaming_this_node(StoreError, OSError):
            self._bundle.pause()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trainers began where their own checkpoints were."""

    def cleanup(self) -> None:
        """End the ranks: this process may be ended much later."""
        if self._ranks is not None:
            self._ranks.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over other trials in the same process."""
        vars(self).pop("_bundle", None)  # never two in memory; after a fault there is none
        self.setup(new_config)  # pyright: ignore[reportCallIssue] (tune.with_parameters)
        return True
