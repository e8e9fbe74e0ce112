"""Ray Tune's scheduler of the sweep: which trials go on, wait or are given up, by `orchestrator.stopping`.

Ray's own ASHAScheduler and MedianStoppingRule compare all trials with one another, whatever their k, and
forget with the driver. Here every (group, k, d_sae) is a field of its own, and a trial is given up by a
file in its folder: its trainer goes no further, judges what there is, and leaves a result like any other.
"""

from collections.abc import Iterable
from typing import Any

from ray.tune.experiment import Trial as TuneTrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from actors.trainer import Trial
from orchestrator.stopping import Field, Verdict, curve_of
from orchestrator.sweep_config import StopConfig


class LikeWithLike(FIFOScheduler):
    """Stops trials, comparing only those of one field."""

    def __init__(self, cfg: StopConfig, known: Iterable[Trial], all_known: bool) -> None:
        """Take up what trials have reported in former calls.

        Args:
            cfg: The rule.
            known: Trials of the sweep, those that have ended included.
            all_known: Whether there will be no others.
        """
        super().__init__()
        self._cfg, self._all_known = cfg, all_known
        self._fields: dict[tuple[int, int, int], Field] = {}
        for trial in known:
            self._look(trial)
            if trial.result_file.is_file() or trial.stopped_at is not None:
                self._field(trial).leave(trial.id)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles schedulers into its own state, which nobody reads."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: TuneTrialState) -> None:
        """A trial that others may wait for."""
        self._look(_ours(trial))

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrialState, result: dict[str, Any]
    ) -> str:
        """What becomes of a trial after its report; who is given up goes on, to find its end at once."""
        self._look(_ours(trial))
        waits = self._verdict(_ours(trial)) is Verdict.WAIT
        return TrialScheduler.PAUSE if waits else TrialScheduler.CONTINUE

    def on_trial_complete(
        self, tune_controller: Any, trial: TuneTrialState, result: dict[str, Any]
    ) -> None:
        """A trial that has its result."""
        self._field(_ours(trial)).leave(_ours(trial).id)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrialState) -> None:
        """A trial that failed for good: nobody waits for it any more."""
        self._field(_ours(trial)).leave(_ours(trial).id)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrialState | None:
        """First who has waited and need not any more, then who has not begun."""
        trials = tune_controller.get_trials()
        for trial in trials:
            if (
                trial.status == TuneTrialState.PAUSED
                and self._verdict(_ours(trial)) is not Verdict.WAIT
            ):
                return trial
        return next((trial for trial in trials if trial.status == TuneTrialState.PENDING), None)

    def _look(self, trial: Trial) -> None:
        self._field(trial).curves[trial.id] = curve_of(trial.rows, trial.n_steps)

    def _verdict(self, trial: Trial) -> Verdict:
        if trial.stopped_at is not None:
            return Verdict.GO  # to its end
        verdict = self._field(trial).verdict(trial.id)
        if verdict is Verdict.STOP:
            trial.stop_at(trial.rows[-1]["step"])
        return verdict

    def _field(self, trial: Trial) -> Field:
        key = (trial.group, trial.sae.k, trial.sae.d_sae)
        return self._fields.setdefault(key, Field(self._cfg, waits=self._all_known))


def _ours(trial: TuneTrialState) -> Trial:
    return trial.config["trial"]
