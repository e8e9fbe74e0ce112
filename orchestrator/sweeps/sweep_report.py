"""What is told of the trials of a sweep on their way: to the tracker, and to a person."""

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrialState

from actors.trial import Trial
from orchestrator.progress import StageProgress
from orchestrator.sweeps.sweep_view import State, SweepView
from orchestrator.tracking.tracker import Tracker

_STATES: dict[str, State] = {
    TuneTrialState.PENDING: "waiting",
    TuneTrialState.RUNNING: "running",
    TuneTrialState.PAUSED: "paused",
    TuneTrialState.ERROR: "failed",
}


class Report(tune.Callback):
    """Tells the tracker, the view and the progress bar what trials report."""

    def __init__(
        self,
        tracker: Tracker,
        view: SweepView,
        progress: StageProgress,
        n_trials: int,
        places: Callable[[], int],
    ) -> None:
        """Expect so many trials to end, on the places that there are."""
        self._places = places
        self._busy = {"autoencoders": 0.0, "data": 0.0}
        """Seconds of all places."""
        self._tracker, self._view, self._progress = tracker, view, progress
        self._step: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        """When each trial reported last, in seconds of the stage."""
        self.actors: list[Any] = []
        """Of Ray, that train now."""
        self._left = n_trials
        self._left_behind: set[str] = set()
        """Failed while others of their bundle go on."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its own state, which nobody reads."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """A turn of Tune's loop: who began, waits at a rung or failed since the last one."""
        running = [trial for trial in trials if trial.status == TuneTrialState.RUNNING]
        self.actors = [trial.temporary_state.ray_actor for trial in running]
        for trial in trials:
            if trial.status in _STATES:
                for mine in trial.config["trials"]:
                    failed = mine.id in self._left_behind
                    self._view.update(mine, "failed" if failed else _STATES[trial.status])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """One report of the trials of a bundle."""
        for mine in trial.config["trials"]:
            if mine.id in result["reports"]:
                report = result["reports"][mine.id]
                self._count(mine, report, len(result["reports"]))
                self._tell(mine, report)
        self._left_behind -= {mine.id for mine in trial.config["trials"]}
        self._left_behind |= set(result["failed"])

    def _count(self, mine: Trial, report: dict[str, Any], n_beside: int) -> None:
        """Note what the time since the last report went into: of trials in one place each has its part."""
        now = self._progress.seconds
        n_tokens = (int(report["step"]) - self._step.get(mine.id, 0)) * mine.fit.batch_tokens
        # A trial that is continued comes with steps of a former call.
        since = now - self._heard.get(mine.id, 0.0)
        spent = min(n_tokens / max(report["tokens_per_second"], 0.1), since) / n_beside
        self._heard[mine.id] = now
        self._busy["data"] += spent * report["data_wait_fraction"]
        self._busy["autoencoders"] += spent * (1 - report["data_wait_fraction"])
        idle = max(0.0, self._places() * now - sum(self._busy.values()))
        self._progress.figures.seconds = {**self._busy, "start and lack of work": idle}

    def _tell(self, mine: Trial, report: dict[str, Any]) -> None:
        before = self._step.get(mine.id, 0)
        step = self._step[mine.id] = max(before, int(report["step"]))
        self._tracker.trial_progress(mine.settings(), mine.metrics_file)
        known = {"step": step, "tokens_per_second": report["tokens_per_second"]}
        if "result" not in report:
            self._view.update(mine, "running", fvu=report["fvu"], **known)
        else:
            found = report["result"]
            given_up = found["stopped_at"] is not None
            self._left -= 1
            self._progress.expect_less((mine.n_steps - step) * mine.fit.batch_tokens)
            self._view.update(mine, "given up" if given_up else "done", fvu=found["fvu"], **known)
            self._tracker.trial_result(mine.settings(), found)
        self._progress.figures.trials = self._view.states()
        self._progress.advance((step - before) * mine.fit.batch_tokens, self._note(mine, report))

    def _note(self, mine: Trial, report: dict[str, Any]) -> str:
        if self._progress.is_live:  # the view has the rest
            return f"{self._left} to go"
        newest = f"{mine.id} fvu {report['fvu']:.4f} at step {report['step']} of {mine.n_steps}"
        return f"{self._view.counts()}; {newest}"
