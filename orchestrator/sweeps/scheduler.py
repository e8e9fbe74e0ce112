"""Ray Tune's scheduler of the sweep: which trials go on, wait or are given up, by `orchestrator.sweeps.stopping`.

Each trial is judged by itself, whatever bundle it is trained in. A bundle goes on as one: it waits while one
of its members has to that has come no further than the others, and nobody waits for ever, as those who
have come the least far of all wait for nobody.

Ray's own ASHAScheduler and MedianStoppingRule compare all trials with one another, whatever their k, and
forget with the driver. Here every (group, k, d_sae) is a field of its own, and a trial is given up by a
file in its folder: its trainer goes no further, judges what there is, and leaves a result like any other.
"""

from collections.abc import Iterable
from typing import Any

from ray.tune.experiment import Trial as TuneTrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from actors.trial import Trial
from orchestrator.sweeps.stopping import Field, Verdict, curve_of
from orchestrator.sweeps.sweep_config import StopConfig


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
        self._failed: set[str] = set()
        for trial in known:
            self._look(trial)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles schedulers into its own state, which nobody reads."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: TuneTrialState) -> None:
        """Trials that others may wait for; also those that are tried again."""
        for ours in _ours(trial):
            self._failed.discard(ours.id)
            self._look(ours)

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrialState, result: dict[str, Any]
    ) -> str:
        """What becomes of a bundle after its report; who is given up goes on, to find its end at once."""
        for ours in _ours(trial):
            if ours.id in result["failed"]:
                self._failed.add(ours.id)
            else:
                self._failed.discard(ours.id)  # it is tried again
            self._look(ours)
        return TrialScheduler.PAUSE if self._waits(trial) else TrialScheduler.CONTINUE

    def on_trial_complete(
        self, tune_controller: Any, trial: TuneTrialState, result: dict[str, Any]
    ) -> None:
        """Trials that have their results."""
        self._leave(trial)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrialState) -> None:
        """Trials that failed: nobody waits for them any more, unless they are added again."""
        self._leave(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrialState | None:
        """First who has waited and need not any more, then who has not begun."""
        trials = tune_controller.get_trials()
        for trial in trials:
            if trial.status == TuneTrialState.PAUSED and not self._waits(trial):
                return trial
        return next((trial for trial in trials if trial.status == TuneTrialState.PENDING), None)

    def _waits(self, trial: TuneTrialState) -> bool:
        """Judge the members of a bundle; whether those who are to be trained next have to wait."""
        under_way = [
            ours for ours in _ours(trial) if ours.id not in self._failed and self._share(ours) < 1
        ]
        waiting = [ours for ours in under_way if self._verdict(ours) is Verdict.WAIT]
        going = [self._share(ours) for ours in under_way if not self._field(ours).has_left(ours.id)]
        return any(self._share(ours) == min(going) for ours in waiting)

    def _share(self, trial: Trial) -> float:
        curve = self._field(trial).curves[trial.id]
        return curve[-1][0] if curve else 0.0

    def _leave(self, trial: TuneTrialState) -> None:
        for ours in _ours(trial):
            self._field(ours).leave(ours.id)

    def _look(self, trial: Trial) -> None:
        """See how far a trial has come, and so whether others are to wait for it.

        They are for one that was given up and then lost its newest steps: it is not yet there again.
        """
        field, rows, stopped_at = self._field(trial), trial.rows, trial.stopped_at
        field.curves[trial.id] = curve_of(rows, trial.n_steps)
        is_there = stopped_at is not None and bool(rows) and rows[-1]["step"] >= stopped_at
        if trial.id in self._failed or is_there or trial.result_file.is_file():
            field.leave(trial.id)
        else:
            field.come_back(trial.id)

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


def _ours(trial: TuneTrialState) -> tuple[Trial, ...]:
    return trial.config["trials"]
