"""An MLflow server that dies in the middle of a run: nothing is lost, and it is told afterwards."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import pytest
from mlflow import MlflowClient

from orchestrator.tracking.registry import ALIAS, model_name
from tests.runs import harvested, start, strata

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    """A port that stays free while the server is away: neither Ray nor the system gives these to anybody."""
    for port in random.sample(range(21_000, 31_000), 100):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server that answers."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/server.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except (URLError, OSError):
            time.sleep(0.5)
        else:
            return server
    stop(server)
    raise AssertionError("the MLflow server did not come up in 120 s")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Kill the server with its workers."""
    subprocess.run(["pkill", "-9", "-s", str(server.pid)], check=False)
    server.wait()


@pytest.mark.timeout(900)
def test_training_goes_on_without_the_server_and_it_is_told_afterwards(
    tmp_path: Path, finished: tuple[Path, str]
):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = harvested(finished[0], tmp_path, tracking={"uri": uri})
    results = tmp_path / "runs" / "small" / "trials"

    server = serve(tmp_path, port)
    run = start("run", config)
    try:
        while not list(results.glob("*/metrics.jsonl")):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
    finally:
        stop(server)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    assert f"warning: MLflow at {uri} stopped answering" in output
    assert "Winners" in output
    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    assert not summary["mlflow"]["complete"]

    server = serve(tmp_path, port)
    try:
        status, output = strata("run", config)
        assert status == 0, output
        client = MlflowClient(uri)
        parent = client.get_run(summary["mlflow"]["parent_run_id"])
        children = client.search_runs(
            [parent.info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' AND tags.kind = 'trial'",
        )
        assert parent.info.status == "FINISHED"
        assert len(children) == 4
        for child in children:
            assert child.info.status == "FINISHED"
            told = client.get_metric_history(child.info.run_id, "fvu")
            rows = (results / str(child.info.run_name) / "metrics.jsonl").read_text().splitlines()
            assert [m.step for m in told] == [json.loads(row)["step"] for row in rows]
        for group in summary["groups"]:
            version = client.get_model_version_by_alias(model_name("test", group["id"]), ALIAS)
            assert version.tags["trial"] == group["best"]["trial"]
        search = "metrics.final_fvu < 1 and params.encoder = 'dense'"
        status, output = strata("runs", config, "--trials", "--json", "--filter", search)
        assert status == 0, output
        dense = [child.info.run_name for child in children if "h" not in child.data.params]
        assert sorted(trial["name"] for trial in json.loads(output)) == sorted(map(str, dense))
        assert len(dense) == 2
        status, output = strata("runs", config, "--trials", "--filter", "metrics.nope > 0")
        assert (status, output.strip()) == (0, "No trial meets 'metrics.nope > 0'")
    finally:
        stop(server)
