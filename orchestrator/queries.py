"""Questions to MLflow: which runs there are, and the server of its pages."""

import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console

from orchestrator.errors import UserError


def known_runs(uri: str) -> Iterator[tuple[str, ...]]:
    """Parent runs, newest first: name, experiment, status, start, groups, trials, FVU, CE recovered.

    Raises:
        UserError: If there is no store at the address.
    """
    from mlflow import MlflowClient

    from orchestrator.tracking import RUN_DIR

    _check_exists(uri)
    client = MlflowClient(tracking_uri=uri)
    experiments = {e.experiment_id: e.name for e in client.search_experiments()}
    found = client.search_runs(
        list(experiments), f"tags.`{RUN_DIR}` LIKE '%'", order_by=["attributes.start_time DESC"]
    )
    for run in found:
        metrics = run.data.metrics
        started = datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
        yield (
            run.data.tags[RUN_DIR],
            experiments[run.info.experiment_id],
            run.info.status.lower(),
            started,
            *(f"{metrics[key]:.0f}" if key in metrics else "" for key in ("n_groups", "n_trials")),
            *(
                f"{metrics[key]:.4f}" if key in metrics else ""
                for key in ("mean_best_fvu", "worst_ce_recovered")
            ),
        )


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
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(port)])


def _check_exists(uri: str) -> None:
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not file.is_file():
        raise UserError(
            f"{file} does not exist, so there are no runs here yet; make one (`strata demo`), or "
            "name the configuration or run directory whose runs you want"
        )
