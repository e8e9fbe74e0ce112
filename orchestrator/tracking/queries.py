"""Questions to MLflow: which runs and trials there are, and the server of its pages."""

import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from rich.console import Console
from rich.table import Table

from orchestrator.errors import UserError
from orchestrator.labels import encoder_label, figure
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.run_tree import KEY
from orchestrator.tracking.tracking_uri import check_form, is_outage, trouble, why

Found = dict[str, Any]
"""A run as JSON has it: its names, status and times, and MLflow's parameters, metrics and tags."""

_LARGEST = sys.float_info.max
"""What MLflow's stores make of infinity."""


def find(uri: str, kind: str, where: str | None, run_dir: Path | None) -> list[Found]:
    """Runs (`kind` is `run`) newest first, or trials (`trial`), the best of each k of a group first.

    Args:
        uri: Of the store or server.
        kind: What MLflow's tag of that name says.
        where: A search in MLflow's syntax that they must meet.
        run_dir: Only trials of the run there.

    Raises:
        UserError: If there is no store at the address, it does not answer, or `where` is no search.
    """
    _check_exists(uri)
    parts = [f"tags.kind = '{kind}'", "tags.run_dir LIKE '%'"]
    if where:
        parts.append(where)
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = {e.experiment_id: e.name for e in client.search_experiments()}
        if run_dir is not None:
            parent = _parent(client, list(experiments), run_dir)
            parts.append(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'")
        runs = list(_search(client, list(experiments), " and ".join(parts)))
    except Exception as error:
        if not is_outage(error):
            raise
        raise _refusal(error, uri, where) from None
    found = [_as_json(run, experiments[run.info.experiment_id]) for run in runs]
    return sorted(found, key=_place) if kind == "trial" else found


def run_table(uri: str, found: list[Found]) -> Table:
    """Runs for people."""
    columns = ("run", "experiment", "status", "started", "groups", "trials", "best FVU")
    table = _table(f"Runs in {uri}", (*columns, "CE recovered"), right=("groups", "trials"))
    for run in found:
        metrics = run["metrics"]
        table.add_row(
            *(run["tags"]["run_dir"], run["experiment"], run["status"].lower()),
            datetime.fromisoformat(run["started"]).strftime("%Y-%m-%d %H:%M"),
            *(_figure(metrics, key, ".0f") for key in ("n_groups", "n_trials")),
            *(_figure(metrics, key, ".4f") for key in ("mean_best_fvu", "worst_ce_recovered")),
        )
    return table


def trial_table(uri: str, found: list[Found]) -> Table:
    """Trials for people."""
    columns = ("run", "trial", "status", "group", "encoder", "k", "FVU", "L0", "encoder parameters")
    numbers = ("group", "k", "FVU", "L0", "encoder parameters")
    table = _table(f"Trials in {uri}", columns, right=numbers)
    for trial in found:
        metrics, params = trial["metrics"], trial["params"]
        table.add_row(
            *(Path(trial["tags"]["run_dir"]).name, trial["name"]),
            "given up" if "stopped_at" in metrics else trial["status"].lower(),
            *(params.get("group", ""), encoder_label(params) if "encoder" in params else ""),
            params.get("k", ""),
            *(_figure(metrics, "final_fvu", ".4f"), _figure(metrics, "final_l0", ".1f")),
            _figure(metrics, "encoder_parameters", ",.0f"),
        )
    return table


def serve(uri: str, port: int, console: Console) -> None:
    """Become MLflow's server for a store, on this machine alone; does not return.

    Raises:
        UserError: If there is no store, or something listens on the port already.
    """
    if uri.startswith(("http:", "https:")):
        console.print(f"The tracking server has pages of its own: {uri}", highlight=False)
        return
    _check_exists(uri)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use; give another with --port")
    console.print(f"MLflow's pages: http://127.0.0.1:{port}  (Ctrl-C ends them)", highlight=False)
    # Seven processes for jobs that no run has, unless somebody wants them.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port)])


def _parent(client: MlflowClient, experiments: list[str], run_dir: Path) -> str:
    """The parent run of a run directory, wherever that lay when MLflow was told of it; '' if there is none."""
    journal = run_dir / "mlflow.json"
    if not journal.is_file():
        return ""
    found = next(_search(client, experiments, f"tags.`{KEY}` = '{Journal(journal).key}'"), None)
    return found.info.run_id if found else ""


def _search(client: MlflowClient, experiments: list[str], query: str) -> Iterator[Run]:
    token = None
    while True:
        order = ["attributes.start_time DESC"]
        page = client.search_runs(experiments, query, order_by=order, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _as_json(run: Run, experiment: str) -> Found:
    """Without figures that are none: JSON has no NaN, and of infinity MLflow keeps the largest number."""
    ended = run.info.end_time
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "experiment": experiment,
        "status": run.info.status,
        "started": _time(run.info.start_time),
        "ended": _time(ended) if ended else None,
        "params": dict(run.data.params),
        "metrics": {key: x for key, x in run.data.metrics.items() if abs(x) < _LARGEST},
        "tags": {key: tag for key, tag in run.data.tags.items() if "mlflow." not in key},
    }


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat("T", "seconds")


def _place(trial: Found) -> tuple[str, float, float, float]:
    metrics = trial["metrics"]
    of_kind = [metrics.get(key, float("inf")) for key in ("group", "k", "final_fvu")]
    return trial["tags"]["run_dir"], *of_kind


def _refusal(error: Exception, uri: str, where: str | None) -> UserError:
    wrong = isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"
    if where and wrong:
        return UserError(
            f"--filter: {where!r} is no search that MLflow takes ({why(error)}); it takes comparisons "
            "of params.X (text, in quotes), metrics.X and tags.X joined by `and`, such as "
            "\"params.k = '16' and metrics.final_fvu < 0.1\": correct it (docs/mlflow.md has ten)"
        )
    return UserError(trouble(error, uri))


def _table(title: str, columns: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _figure(metrics: dict[str, float], key: str, form: str) -> str:
    return figure(metrics[key], form) if key in metrics else ""


def _check_exists(uri: str) -> None:
    check_form(uri)
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not file.is_file():
        raise UserError(
            f"{file} does not exist, so there are no runs here yet; make one (`strata demo`), or "
            "name the configuration or run directory whose runs you want"
        )
