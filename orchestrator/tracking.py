"""MLflow: one parent run per run directory, a child per stage and per trial.

The run directory is the record; MLflow is told. Runs are looked up by tag before they are made, and
metrics carry the time at which they were taken, so telling MLflow the same thing twice changes
nothing. When it stops answering, training goes on, and the next call tells it what it missed.
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from rich.console import Console

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, write_json

RETRY_SECONDS = 60.0
KEY, RUN_DIR = "strata.key", "strata.run_dir"
MAX_PARAM_CHARACTERS = 6000


def default_uri(run_dir: Path) -> str:
    """One SQLite file for all runs that lie beside each other, so that they can be compared."""
    return f"sqlite:///{run_dir.parent / 'mlflow.db'}"


class Tracker:
    """Tells MLflow what one run does."""

    def __init__(self, cfg: RunConfig, run: RunDirectory, console: Console) -> None:
        """Find or make the run's parent run.

        Raises:
            UserError: If the tracking server does not answer. Nothing has been started then.
        """
        self.uri = cfg.tracking.uri or default_uri(run.path)
        self.experiment = cfg.name
        self._run, self._console = run, console
        self._silent_until = 0.0
        self._speaker = ThreadPoolExecutor(1, "mlflow")
        _check_file(self.uri)
        self._told: dict[str, int] = {}
        self.complete = True
        try:
            self._client = MlflowClient(tracking_uri=self.uri)
            self._experiment_id = self._find_experiment()
            self.parent_run_id = self._find_parent(cfg)
            self._children = self._find_children()
        except Exception as error:
            if not _is_outage(error):
                raise
            raise UserError(
                f"tracking.uri: {self.uri} does not answer ({_first_line(error)}); start the server, "
                "correct the address, or leave tracking.uri out to use a local file. Nothing was "
                f"started, and what {run.path} holds is kept"
            ) from None

    def stage(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Tell of a finished stage."""

        def tell() -> None:
            run_id = self._child(name, {"kind": "stage"})
            self._log(run_id, params, [{"step": 0, "timestamp_ms": _now(), **metrics}])
            self._client.set_terminated(run_id)

        self._deliver(tell)

    def trial_progress(self, settings: Mapping[str, Any], metrics_file: Path) -> None:
        """Tell what a trial has measured since the last call."""
        self._deliver(lambda: self._tell_progress(settings, metrics_file))

    def trial_result(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Tell a trial's result, and all its metrics if MLflow does not have them; once only."""
        name = settings["trial"]
        folder = self._run.trials / name
        receipt = folder / "mlflow.json"
        if receipt.is_file() and json.loads(receipt.read_text())["tracking_uri"] == self.uri:
            return

        def tell() -> None:
            self._told.pop(name, None)
            self._tell_progress(settings, folder / "metrics.jsonl")
            run_id = self._child(name, {"kind": "trial"})
            taken = int(folder.joinpath("result.json").stat().st_mtime * 1000)
            final = {f"final_{key}": result[key] for key in ("fvu", "l0", "dead_fraction")}
            sizes = {key: result[key] for key in ("n_parameters", "encoder_flops_per_token")}
            if result.get("stopped_at") is not None:
                sizes["stopped_at"] = result["stopped_at"]
            self._log(run_id, {}, [{"step": 0, "timestamp_ms": taken, **final, **sizes}])
            self._client.log_artifacts(run_id, str(folder / "sae"), "sae")
            self._client.set_terminated(run_id)
            write_json(receipt, {"tracking_uri": self.uri, "run_id": run_id})

        self._deliver(tell)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Tell figures of the run as a whole."""
        row = {"step": 0, "timestamp_ms": _now(), **metrics}
        self._deliver(lambda: self._log(self.parent_run_id, {}, [row]))

    def figure(self, figure: Figure, file: str) -> None:
        """Keep a figure with the parent run, under `figures/`."""
        self._deliver(
            lambda: self._client.log_figure(self.parent_run_id, figure, f"figures/{file}")
        )

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the parent run."""
        self._deliver(lambda: self._client.log_artifact(self.parent_run_id, str(path), folder))

    def finish(self, status: str) -> None:
        """Close the parent run, as FINISHED, FAILED or KILLED."""
        self._deliver(lambda: self._client.set_terminated(self.parent_run_id, status))

    def identity(self) -> dict[str, str]:
        """Where to find the run in MLflow."""
        return {
            "tracking_uri": self.uri,
            "experiment": self.experiment,
            "parent_run_id": self.parent_run_id,
        }

    def _deliver(self, tell: Callable[[], None]) -> None:
        """Tell MLflow something; if it does not answer, say so once and go on without.

        A thread of its own does the telling: Ctrl-C ends the wait, never a transaction half-way.
        """
        if time.monotonic() < self._silent_until:
            self.complete = False
            return
        try:
            self._speaker.submit(tell).result()
        except Exception as error:
            if not _is_outage(error):
                raise
            if self.complete:
                self._console.print(
                    f"warning: MLflow at {self.uri} stopped answering ({_first_line(error)}); training "
                    f"goes on, everything is kept in {self._run.path}, and the same command "
                    "tells MLflow what it missed",
                    highlight=False,
                )
            self.complete = False
            self._silent_until = time.monotonic() + RETRY_SECONDS

    def _tell_progress(self, settings: Mapping[str, Any], metrics_file: Path) -> None:
        name = settings["trial"]
        rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
        new = [row for row in rows if row["step"] > self._told.get(name, 0)]
        params = settings if name not in self._told else {}
        self._log(self._child(name, {"kind": "trial"}), params, new)
        self._told[name] = max((row["step"] for row in rows), default=0)

    def _log(self, run_id: str, params: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
        metrics = [
            Metric(key, float(value), int(row["timestamp_ms"]), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in ("step", "timestamp_ms")
        ]
        given = [
            Param(key, str(value)[:MAX_PARAM_CHARACTERS])
            for key, value in params.items()
            if value is not None
        ]
        for start in range(0, max(len(metrics), 1), 1000):  # MLflow's limit for one batch
            self._client.log_batch(
                run_id, metrics[start : start + 1000], given if not start else []
            )

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found:
            return found.experiment_id
        local = self.uri.startswith("sqlite:")
        artifacts = (self._run.path.parent / "mlartifacts").as_uri() if local else None
        return self._client.create_experiment(self.experiment, artifact_location=artifacts)

    def _find_parent(self, cfg: RunConfig) -> str:
        tag = str(self._run.path)
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{RUN_DIR}` = '{tag}'", max_results=1
        )
        run_id = found[0].info.run_id if found else None
        if run_id is None:
            created = self._client.create_run(
                self._experiment_id,
                run_name=self._run.path.name,
                tags={RUN_DIR: tag, "model": cfg.model.name, "corpus": cfg.corpus.source},
            )
            run_id = created.info.run_id
            self._client.log_artifact(run_id, str(self._run.config))
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _find_children(self) -> dict[str, str]:
        found, token = {}, None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                f"tags.`mlflow.parentRunId` = '{self.parent_run_id}'",
                page_token=token,
            )
            found |= {run.data.tags[KEY]: run.info.run_id for run in page if KEY in run.data.tags}
            token = page.token
            if not token:
                return found

    def _child(self, name: str, tags: Mapping[str, str]) -> str:
        if name not in self._children:
            created = self._client.create_run(
                self._experiment_id,
                run_name=name,
                tags={KEY: name, "mlflow.parentRunId": self.parent_run_id, **tags},
            )
            self._children[name] = created.info.run_id
        return self._children[name]


def _check_file(uri: str) -> None:
    """Refuse an SQLite file that can't be written: MLflow would go on trying for minutes."""
    if not uri.startswith("sqlite:///"):
        return
    file = Path(uri.removeprefix("sqlite:///"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as error:
        raise UserError(
            f"tracking.uri: {file} can't be written ({error.strerror}); give a file that can, or leave "
            "tracking.uri out to keep it beside the run directory"
        ) from None


def _is_outage(error: Exception) -> bool:
    """Whether MLflow could not be reached, or could not write: not a fault of the call."""
    return isinstance(error, MlflowException | OSError) or type(error).__module__.startswith(
        ("sqlalchemy", "requests", "urllib3")
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def _now() -> int:
    return int(time.time() * 1000)
