"""What Prometheus can ask a cluster about a run: figures of the stage at work, through Ray's own endpoint.

Every node of a Ray cluster answers on its `MetricsExportPort`; these come from the node of the driver.
Ray puts `ray_` before each name, and `_total` after a counter's. `examples/cluster/grafana.json` shows them.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from orchestrator.progress import StageProgress

COUNTERS: Mapping[str, str] = {
    "strata_tokens": "Tokens that a stage has done: packed, harvested, or trained on.",
    "strata_bytes": "Bytes that a harvest has written to stores.",
    "strata_actor_seconds": "Time of all actors of a stage, by what it went into.",
}

GAUGES: Mapping[str, str] = {
    "strata_stage_done": "Of the stage at work, from 0 to 1.",
    "strata_stage_seconds_left": "Until the stage at work ends, at its rate so far.",
    "strata_jobs": "Jobs of the stage at work by queue: in_hand of an actor, or waiting for one.",
    "strata_data_wait": "Share of the trials' time in which they wait for data, from 0 to 1.",
    "strata_trials": "Trials of the sweep by state.",
}

_KIND = {"strata_actor_seconds": "part", "strata_jobs": "queue", "strata_trials": "state"}
"""What tells series of one name and stage apart."""


class ClusterMetrics:
    """Sends the figures of one run's stages to Ray (`Watcher`); inside a Ray session only."""

    def __init__(self, run: str) -> None:
        """Of the run of that name, which is the tag `run` of everything."""
        self._run = run
        self._counters = {name: Counter(name, text, _tags(name)) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(name, text, _tags(name)) for name, text in GAUGES.items()}
        self._told: dict[tuple[str, str, str], float] = {}
        """By counter, stage and kind what it stands at."""

    def moved(self, progress: StageProgress) -> None:
        """Send where a stage is."""
        figures, seconds = progress.figures, progress.figures.seconds
        if progress.unit == "tokens":
            self._count(progress, "strata_tokens", float(progress.done))
        self._count(progress, "strata_bytes", float(figures.n_bytes))
        for part, spent in seconds.items():
            self._count(progress, "strata_actor_seconds", spent, part)
        self._set(progress, "strata_stage_done", progress.done / max(progress.total, 1))
        if progress.seconds_left is not None:
            self._set(progress, "strata_stage_seconds_left", progress.seconds_left)
        for queue, n_jobs in figures.queues.items():
            self._set(progress, "strata_jobs", float(n_jobs), queue)
        for state, n_trials in figures.trials.items():
            self._set(progress, "strata_trials", float(n_trials), state)
        busy = seconds.get("data", 0.0) + seconds.get("autoencoders", 0.0)
        if busy:
            self._set(progress, "strata_data_wait", seconds["data"] / busy)

    def ended(self, progress: StageProgress) -> None:
        """Send that nothing of it is left to wait for."""
        self.moved(progress)
        self._set(progress, "strata_stage_seconds_left", 0.0)

    def _count(self, progress: StageProgress, name: str, value: float, kind: str = "") -> None:
        tags = self._tagged(progress, name, kind)
        more = value - self._told.get((name, progress.title, kind), 0.0)
        if more > 0:
            self._told[name, progress.title, kind] = value
            self._counters[name].inc(more, tags)

    def _set(self, progress: StageProgress, name: str, value: float, kind: str = "") -> None:
        self._gauges[name].set(value, self._tagged(progress, name, kind))

    def _tagged(self, progress: StageProgress, name: str, kind: str) -> dict[str, str]:
        of_kind = {_KIND[name]: kind} if name in _KIND else {}
        return {"run": self._run, "stage": progress.title, **of_kind}


def _tags(name: str) -> tuple[str, ...]:
    return ("run", "stage", *([_KIND[name]] if name in _KIND else []))
