"""MLflow: one parent run per run directory, a child per stage and per trial (docs/mlflow.md).

The run directory is the record; MLflow is told, by the driver alone and in a thread of its own: no
trainer waits for it, nor does Ray Tune. When it stops answering, training goes on, and the next call
tells it what it missed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow import MlflowClient
from rich.console import Console

from orchestrator.config import RunConfig
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.registry import model_name, register_best
from orchestrator.tracking.run_tags import run_tags
from orchestrator.tracking.run_tree import RunTree
from orchestrator.tracking.speaker import Speaker
from orchestrator.tracking.system_metrics import SystemMetrics
from orchestrator.tracking.tracking_uri import check, default_uri, is_outage, refusal, why
from storage.files import read_json_lines

PROGRESS_SECONDS = 10.0
"""A trial's new figures are told together, at most so often."""

RESULTS = ("fvu", "l0", "dead_fraction", "data_wait_fraction")
"""Of a result, told as `final_...`."""

JUDGED = (
    *("ce_recovered", "ce_recovered_mean", "kl"),
    *("cosine", "norm_ratio", "relative_bias", "dense_fraction"),
)
"""Of an evaluation, told as `..._layer_<l>`; FVU is told with the result."""

NUMBERS = (
    *("group", "k", "h", "m", "n", "d_sae"),
    *("n_parameters", "encoder_parameters", "encoder_flops_per_token"),
    *("batch_tokens", "weight_decay", "auxk_coefficient"),
)
"""Settings that are metrics too: MLflow's parameters are text and can't be compared as numbers."""


class Tracker:
    """Tells MLflow what one run does."""

    def __init__(self, cfg: RunConfig, run: RunDirectory, console: Console) -> None:
        """Find or make the run's parent run.

        Raises:
            UserError: If the tracking server does not answer, or refuses. Nothing has been started then.
        """
        self.uri = cfg.tracking.uri or default_uri(run.path)
        self.experiment = cfg.name
        self._run, self._console = run, console
        check(self.uri)
        self._journal = Journal(run.path / "mlflow.json")
        self._journal.settle()
        local = self.uri.startswith("sqlite:")
        artifacts = (run.path.parent / "mlartifacts").as_uri() if local else None
        try:
            self._client = MlflowClient(tracking_uri=self.uri)
            self._tree = RunTree(self._client, cfg.name, artifacts, self._journal.key)
            self._parent, created = self._tree.open(run.path.name, run_tags(cfg, run.path))
            if created:
                self._client.log_artifact(self._parent.id, str(run.config))
        except Exception as error:
            if not is_outage(error):
                raise
            raise refusal(error, self.uri, run.path) from None
        self._speaker = Speaker(is_outage, self._warn)
        self._next_progress: dict[str, float] = {}
        self._kind = "trial"
        self._at_work: dict[str, Callable[[str], None]] = {}
        """By trial, what tells that it was left off, and why."""
        self._status = "RUNNING"
        self._speaker.tell(self._tell_journal)
        self._system_file = run.system_metrics
        self._system = SystemMetrics(
            self._system_file, lambda: self._speaker.tell(self._tell_system)
        )

    @property
    def complete(self) -> bool:
        """Whether MLflow was told everything that it has been time for."""
        return self._speaker.complete

    def stage(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Tell of a finished stage, and wait until MLflow knows all there is to know.

        Its `seconds`, of all calls together, are told with its metrics.
        """
        seconds = self._run.stage_seconds().get(name)
        spent = {} if seconds is None else {"seconds": seconds}
        entry = self._journal.note_stage(name, params, {**metrics, **spent})
        self._speaker.tell(lambda: self._tell_stage(name, entry))
        self._speaker.flush()

    def trial_progress(self, settings: Mapping[str, Any], metrics_file: Path) -> None:
        """Tell what a trial has measured since the last call, or leave it to a later call."""
        name = settings["trial"]
        self._at_work[name] = lambda status: self._tell_left_off(settings, metrics_file, status)
        if time.monotonic() >= self._next_progress.get(name, 0.0):
            self._next_progress[name] = time.monotonic() + PROGRESS_SECONDS
            self._speaker.tell(lambda: self._tell_progress(settings, metrics_file))

    def trial_result(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Tell a trial's result, and all its metrics if MLflow does not have them; once only."""
        self._at_work.pop(settings["trial"], None)
        self._speaker.tell(lambda: self._tell_result(settings, result))

    def of_baselines(self, run: RunDirectory) -> "Tracker":
        """What tells of trials whose files lie in `run`: MLflow has them as `baseline`, beside trials."""
        other = copy(self)
        other._run, other._kind = run, "baseline"
        return other

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Tell figures of the run as a whole."""
        rows = self._journal.note_metrics(metrics)
        self._speaker.tell(lambda: self._tree.log_rows(self._parent, rows))

    def winners(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Register the best of each group (docs/mlflow.md).

        Args:
            groups: As in the summary: `id`, `layers` and `best`.
        """
        for group in groups:
            self._speaker.tell(lambda group=group: self._tell_best(group))

    def judged(self, evaluations: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
        """Tell how trials were judged: by trial and layer, the measures of `LayerReport`."""
        for name, layers in evaluations.items():
            self._speaker.tell(lambda name=name, layers=layers: self._tell_judged(name, layers))

    def figure(self, figure: Figure, file: str) -> None:
        """Keep a figure with the parent run, under `figures/`."""
        self._speaker.tell(
            lambda: self._client.log_figure(self._parent.id, figure, f"figures/{file}")
        )
        self._speaker.flush()  # matplotlib draws in one thread at a time

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the parent run."""
        self._speaker.tell(lambda: self._client.log_artifact(self._parent.id, str(path), folder))

    def finish(self, status: str) -> None:
        """Close the parent run, as FINISHED, FAILED or KILLED, and with it trials without a result.

        SCHEDULED is a run that has come as far as it was asked to, and can be continued.
        """
        if status != self._status:
            self._status = status
            self._system.stop()
            if status in ("FINISHED", "SCHEDULED"):
                self._speaker.flush()
                spent = self._journal.metric("tracking_cpu_seconds") + self._speaker.cpu_seconds
                self.metrics({"tracking_cpu_seconds": round(spent, 3)})
            for left_off in self._at_work.values():
                self._speaker.tell(lambda tell=left_off: tell(status))
            self._speaker.tell(lambda: self._tree.end_all(status))
        self._speaker.flush()

    def identity(self) -> dict[str, str]:
        """Where to find the run in MLflow."""
        return {
            "tracking_uri": self.uri,
            "experiment": self.experiment,
            "parent_run_id": self._parent.id,
        }

    def _warn(self, error: BaseException) -> None:
        self._console.print(
            f"warning: MLflow at {self.uri} stopped answering ({why(error)}); training "
            f"goes on, everything is kept in {self._run.path}, and the same command "
            "tells MLflow what it missed",
            highlight=False,
            soft_wrap=True,
        )

    def _tell_journal(self) -> None:
        if self._journal.metrics:
            self._tree.log_rows(self._parent, self._journal.metrics)
        for name, entry in list(self._journal.stages.items()):  # stages end meanwhile
            self._tell_stage(name, entry)

    def _tell_stage(self, name: str, entry: Mapping[str, Any]) -> None:
        stage, taken = self._tree.child(name, "stage"), entry["timestamp_ms"]
        self._tree.log_params(stage, entry["params"])
        self._tree.log_rows(stage, [{"step": 0, "timestamp_ms": taken, **entry["metrics"]}])
        self._tree.end(stage, "FINISHED", max(taken, stage.start_ms))

    def _tell_system(self) -> None:
        rows = read_json_lines(self._system_file)
        self._tree.log_curve(self._parent, rows, "system/cpu_utilization_percentage")

    def _tell_progress(self, settings: Mapping[str, Any], metrics_file: Path) -> None:
        trial = self._tree.child(settings["trial"], self._kind)
        if trial.status != "RUNNING":
            self._receipt(settings["trial"]).unlink(missing_ok=True)  # it may be trained once more
            self._client.update_run(trial.id, status="RUNNING")
            trial.status = "RUNNING"
        if trial.steps is None:
            self._tree.log_params(trial, settings)
            numbers = {key: settings[key] for key in NUMBERS if settings[key] is not None}
            numbers["peak_lr"] = settings["lr"]  # `lr` is that of each step
            start = {"step": 0, "timestamp_ms": trial.start_ms, **numbers}
            self._tree.log_rows(trial, [start])
        self._tree.log_curve(trial, read_json_lines(metrics_file), "fvu")

    def _tell_left_off(self, settings: Mapping[str, Any], file: Path, status: str) -> None:
        self._tell_progress(settings, file)
        self._tree.end(self._tree.child(settings["trial"], self._kind), status)

    def _tell_result(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        name = settings["trial"]
        if self._is_told(name):
            return
        folder = self._run.trials / name
        self._tell_progress(settings, folder / "metrics.jsonl")
        trial = self._tree.child(name, self._kind)
        taken = _written_ms(folder / "result.json")
        figures = {f"final_{key}": result[key] for key in RESULTS}
        figures |= {f"fvu_layer_{layer}": fvu for layer, fvu in result["fvu_per_layer"].items()}
        figures |= {key: result[key] for key in ("tokens", "seconds")}
        if result.get("stopped_at") is not None:
            figures["stopped_at"] = result["stopped_at"]
        self._tree.log_rows(trial, [{"step": 0, "timestamp_ms": taken, **figures}])
        self._client.log_artifacts(trial.id, str(folder / "sae"), "sae")
        self._tree.end(trial, "FINISHED", max(taken, trial.start_ms))
        write_json(self._receipt(name), {"tracking_uri": self.uri, "run_id": trial.id})

    def _tell_judged(self, name: str, layers: Mapping[int, Mapping[str, Any]]) -> None:
        if not self._is_told(name):
            return
        figures = {
            f"{measure}_layer_{layer}": report[measure]
            for layer, report in layers.items()
            for measure in JUDGED
            if report[measure] is not None
        }
        recovered = [report["ce_recovered"] for report in layers.values()]
        if None not in recovered:
            figures["worst_ce_recovered"] = min(recovered)
        files = (self._run.evaluations / name).glob("*.json")
        taken = max(_written_ms(file) for file in files)
        row = {"step": 0, "timestamp_ms": taken, **figures}
        self._tree.log_rows(self._tree.child(name, self._kind), [row])

    def _tell_best(self, group: Mapping[str, Any]) -> None:
        best = group["best"]
        if not self._is_told(best["trial"]):
            return  # MLflow was away meanwhile, and the next call tells both
        trial = self._tree.child(best["trial"], self._kind)
        facts = {"trial": best["trial"], "run_dir": self._run.path, "layers": group["layers"]}
        facts |= {key: best[key] for key in ("k", "fvu", "l0")}
        tags = {key: str(value) for key, value in facts.items()}
        register_best(self._client, model_name(self.experiment, group["id"]), trial.id, tags)

    def _is_told(self, name: str) -> bool:
        """Whether the run that this store has for the trial was told the trial's result."""
        receipt, trial = self._receipt(name), self._tree.known_child(name)
        if trial is None or not receipt.is_file():
            return False
        return read_json(receipt) == {"tracking_uri": self.uri, "run_id": trial.id}

    def _receipt(self, name: str) -> Path:
        return self._run.trials / name / "mlflow.json"


def _written_ms(file: Path) -> int:
    return int(file.stat().st_mtime * 1000)
