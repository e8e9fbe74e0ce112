"""A run's place in MLflow: its experiment, its parent run, and a child per stage and per trial.

Runs are looked up by tag before they are made, so a run that is continued has none twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from orchestrator.errors import UserError

KEY = "strata.key"
KIND = "custom_model_development"  # what MLflow's pages call "Model training"
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's limits for one request
MAX_PARAM_CHARACTERS = 6000


@dataclass
class TrackedRun:
    """A run in MLflow, and what it is known to have."""

    id: str
    start_ms: int
    status: str = "RUNNING"
    params: set[str] = field(default_factory=set)
    steps: set[int] | None = None
    """Of its rows; None: not asked yet."""

    @classmethod
    def of(cls, run: Run) -> "TrackedRun":
        """As MLflow found it."""
        return cls(
            run.info.run_id, run.info.start_time, run.info.status, params=set(run.data.params)
        )


class RunTree:
    """The parent run and its children. Every call asks the server and may raise what MLflow raises."""

    def __init__(
        self, client: MlflowClient, experiment: str, artifacts: str | None, key: str
    ) -> None:
        """Find or make the experiment; `artifacts` is where a new one keeps them.

        Raises:
            UserError: If the experiment was deleted.
        """
        self._client, self._key = client, key
        found = client.get_experiment_by_name(experiment)
        if found and found.lifecycle_stage == "deleted":
            raise UserError(
                f"name: the experiment {experiment} was deleted in MLflow, and its name stays taken; "
                f"restore it (`mlflow experiments restore -x {found.experiment_id}`), or give another "
                "name. Nothing was started"
            )
        self.experiment_id = (
            found.experiment_id
            if found
            else client.create_experiment(experiment, artifacts, {"mlflow.experimentKind": KIND})
        )
        self._tags: dict[str, str] = {}
        self._children: dict[str, TrackedRun] = {}

    def open(self, name: str, tags: Mapping[str, str]) -> tuple[TrackedRun, bool]:
        """The parent run, made if need be (then the second is true); all its children have the tags."""
        self._tags = dict(tags)
        found = next(self._search(f"tags.`{KEY}` = '{self._key}'"), None)
        created = found is None
        if found is None:
            own = {KEY: self._key, "kind": "run"}
            found = self._client.create_run(
                self.experiment_id, run_name=name, tags={**self._tags, **own}
            )
        self.parent = TrackedRun.of(found)
        self._client.update_run(self.parent.id, status="RUNNING")
        children = list(self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent.id}'"))
        for run in (found, *children):
            if run.data.tags.get("run_dir") != self._tags.get("run_dir"):  # it was moved
                self._client.set_tag(run.info.run_id, "run_dir", self._tags["run_dir"])
        for child in children:
            self._children[str(child.info.run_name)] = TrackedRun.of(child)
        return self.parent, created

    def known_child(self, name: str) -> TrackedRun | None:
        """A child that is there already."""
        return self._children.get(name)

    def child(self, name: str, kind: str) -> TrackedRun:
        """The child of that name, made if need be."""
        if name not in self._children:
            own = {MLFLOW_PARENT_RUN_ID: self.parent.id, "kind": kind}
            created = self._client.create_run(
                self.experiment_id, run_name=name, tags={**self._tags, **own}
            )
            self._children[name] = TrackedRun.of(created)
        return self._children[name]

    def end(self, run: TrackedRun, status: str, end_ms: int | None = None) -> None:
        """Mark a run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run.id, status, end_ms)
        run.status = status

    def end_all(self, status: str) -> None:
        """Mark the parent run, and with it those children that an earlier call has left running."""
        for run in (*self._children.values(), self.parent):
            if run is self.parent or run.status == "RUNNING":
                self.end(run, status)

    def log_params(self, run: TrackedRun, params: Mapping[str, Any]) -> None:
        """Give a run its parameters; one that it has keeps its value, as MLflow wants it."""
        new = [
            Param(key, str(value)[:MAX_PARAM_CHARACTERS])
            for key, value in params.items()
            if value is not None and key not in run.params
        ]
        for start in range(0, len(new), PARAMS_PER_BATCH):
            self._client.log_batch(run.id, params=new[start : start + PARAMS_PER_BATCH])
        run.params |= {param.key for param in new}

    def log_rows(self, run: TrackedRun, rows: Sequence[Mapping[str, Any]]) -> None:
        """Give a run rows of figures, each with `step` and `timestamp_ms`; a row is told whole."""
        widest = max(map(len, rows), default=1)
        stride = max(1, METRICS_PER_BATCH // widest)
        for start in range(0, len(rows), stride):
            metrics = [
                Metric(name, float(value), int(row["timestamp_ms"]), int(row["step"]))
                for row in rows[start : start + stride]
                for name, value in row.items()
                if name not in ("step", "timestamp_ms")
            ]
            self._client.log_batch(run.id, metrics)

    def log_curve(self, run: TrackedRun, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
        """Give a run those rows whose step it does not have; `metric` is in every row.

        After a crash a trainer repeats its last steps: they are in MLflow, and stay there once.
        """
        if run.steps is None:
            told = self._client.get_metric_history(run.id, metric)
            run.steps = {point.step for point in told}
        new = [row for row in rows if row["step"] not in run.steps]
        self.log_rows(run, new)
        run.steps |= {row["step"] for row in new}

    def _search(self, query: str) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return
