"""A run into a bucket, watched from outside while it works: its status, metrics, sockets and secrets."""

import json
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import config_file
from orchestrator.__main__ import main
from orchestrator.cluster_metrics import COUNTERS, GAUGES
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory
from orchestrator.status import status
from storage.places import place
from tests.object_server import BUCKET, ENVIRONMENTS, object_server, use
from tests.runs import ROOT, SMALL_RUN, start, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": "planted-password-77aa",
    "MLFLOW_TRACKING_TOKEN": "planted-token-c41d",
    "HF_TOKEN": "planted-hub-token-90be",
}
SECRETS = [*PLANTED.values(), ENVIRONMENTS["s3"]["AWS_SECRET_ACCESS_KEY"]]


@dataclass
class Watched:
    """What was seen of a run from outside."""

    config: Path
    output: str = ""
    pid: int = 0
    statuses: list[dict[str, Any]] = field(default_factory=list)
    listening: set[tuple[str, str]] = field(default_factory=set)
    metrics: dict[str, float] = field(default_factory=dict)
    """By series its newest value: gauges go when the driver does."""

    port: int | None = None
    """Where metrics were found."""
    in_bucket: dict[str, bytes] = field(default_factory=dict)

    def look(self, process: psutil.Process) -> None:
        """Once more at all its processes."""
        for each in (process, *process.children(recursive=True)):
            try:
                name, ports = each.name(), each.net_connections("tcp")
            except psutil.NoSuchProcess:
                continue
            addresses = [port.laddr for port in ports if port.status == psutil.CONN_LISTEN]
            self.listening |= {(name, address.ip) for address in addresses}
            if "DashboardAgent" in name:
                for port in [self.port] if self.port else {a.port for a in addresses}:
                    if text := scraped(port):
                        self.port = port
                        lines = (line.rpartition(" ") for line in text.splitlines())
                        self.metrics |= {series: float(value) for series, _, value in lines}


def scraped(port: int) -> str:
    """What Prometheus would find on a port; nothing where something else listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
            text = answer.read().decode()
    except (OSError, HTTPException, ValueError):
        return ""
    return "\n".join(line for line in text.splitlines() if line.startswith("ray_strata_"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with object_server() as endpoint, pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, endpoint)
        for name, value in {**PLANTED, "RAY_metrics_report_interval_ms": "500"}.items():
            monkeypatch.setenv(name, value)
        config = write_config(
            folder,
            harvest={**SMALL_RUN["harvest"], "tokens": 20_000, "store": f"s3://{BUCKET}/run"},
            sweep={**SMALL_RUN["sweep"], "tokens": 40_000, "encoders": ["dense"]},
            compute={"cpus": 1},
        )
        found, cfg = Watched(config), config_file.load(config)
        run = start("run", config)
        process, found.pid = psutil.Process(run.pid), run.pid
        next_look = time.monotonic()
        try:
            while run.poll() is None:
                if cfg.run_dir.joinpath("config.yaml").is_file():
                    found.statuses.append(status(cfg))
                if time.monotonic() > next_look:
                    found.look(process)
                    next_look = time.monotonic() + 0.5
                time.sleep(0.1)
        finally:
            run.kill()
        found.output, _ = run.communicate()
        assert run.returncode == 0, found.output
        bucket = place(f"s3://{BUCKET}/run")
        found.in_bucket = {name: bucket.read(name) for name in bucket.names()}
        yield found


def test_from_elsewhere_one_sees_stage_after_stage_go_on(watched: Watched):
    working = [s for s in watched.statuses if s["state"] == "running"]
    assert {s["holder"]["pid"] for s in working} == {watched.pid}
    staged = [s for s in working if s["stage"]]
    order = list(dict.fromkeys(s["stage"]["title"] for s in staged))
    wanted = ["harvest pilot", "harvest train", "sweep"]
    assert [title for title in order if title in wanted] == wanted
    for title in order:
        done = [s["stage"]["done"] for s in staged if s["stage"]["title"] == title]
        assert done == sorted(done)
        assert {s["error"] for s in staged} == {None}
    sweeps = [s for s in staged if s["stage"]["title"] == "sweep"]
    assert any(s["trials"] for s in sweeps)
    known = [s["stage"] for s in staged if 0 < s["stage"]["done"] < s["stage"]["total"]]
    assert known
    assert all(stage["seconds_left"] > 0 for stage in known)
    assert any(stage["limit"].startswith("limited by the ") for stage in known)
    [promised] = re.findall(r"\| `stage` \|(.*)\|", (ROOT / "docs/watching.md").read_text())
    assert set(known[0]) - {"trials"} == set(re.findall(r"`(\w+)`", promised))
    assert any(stage["megabytes"] for stage in known)


def test_everything_that_is_promised_to_prometheus_is_exported(watched: Watched):
    names = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    series = watched.metrics
    assert {line.split("{")[0] for line in series} == names
    tokens = [line for line in series if line.startswith("ray_strata_tokens_total{")]
    assert any('stage="sweep"' in line and 'run="small"' in line for line in tokens)
    [written] = [s for s in series if s.startswith("ray_strata_bytes_total") and "train" in s]
    assert series[written] > 1e6


def test_every_query_of_the_dashboard_names_metrics_that_are_exported():
    board = json.loads((ROOT / "examples" / "cluster" / "grafana.json").read_text())
    asked = " ".join(
        target["expr"] for panel in board["panels"] for target in panel.get("targets", [])
    )
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    words = asked.replace("(", " ").replace("{", " ").replace("[", " ").split()
    assert {word for word in words if word.startswith("ray_")} == exported


def test_nothing_listens_beyond_this_machine(watched: Watched):
    assert {"raylet", "gcs_server"} <= {name for name, _ in watched.listening}
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert {(name, ip) for name, ip in watched.listening if ip not in loopback} == set()


def test_mlflows_pages_listen_on_this_machine_alone(finished: tuple[Path, str]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start("ui", finished[0], "--port", str(port))
    process = psutil.Process(server.pid)
    try:
        found: set[str] = set()
        while not found:
            assert server.poll() is None, server.communicate()[0]
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # one that only starts others
                    ports = each.net_connections("inet")
                    found |= {p.laddr.ip for p in ports if p.status == psutil.CONN_LISTEN}
            time.sleep(0.2)
        assert found == {"127.0.0.1"}
    finally:
        for each in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        server.communicate()


def test_credentials_of_the_environment_are_written_nowhere(watched: Watched):
    written = {str(f): f.read_bytes() for f in watched.config.parent.rglob("*") if f.is_file()}
    [session] = Path("/tmp/ray").glob(f"session_*_{watched.pid}")
    logs = {str(f): f.read_bytes() for f in session.rglob("*") if f.is_file()}
    assert any(name.endswith("mlflow.db") for name in written)
    assert any("raylet" in name for name in logs)
    everything = {**written, **logs, **watched.in_bucket, "output": watched.output.encode()}
    found = [
        (name, secret)
        for name, data in everything.items()
        for secret in SECRETS
        if secret.encode() in data
    ]
    assert found == []


def test_a_finished_run_is_told_as_finished_and_nothing_of_it_is_touched(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    run = finished[0].parent / "runs" / "small"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    code, text = strata("status", run, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert (found["state"], found["holder"], found["error"]) == ("finished", None, None)
    assert found["trials"] == {"done": len(list(run.glob("trials/*/result.json")))}
    assert found["stage"]["done"] == found["stage"]["total"]
    assert {"pack", "harvest_pilot", "group", "sweep"} <= set(found["stage_seconds"])
    assert main(["status", str(finished[0])]) == 0
    assert capsys.readouterr().out.startswith(f"{run}: finished\n")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_where_no_run_has_begun_the_status_says_how_to_begin(tmp_path: Path):
    cfg = config_file.load(write_config(tmp_path))
    with pytest.raises(UserError, match="holds no run: none has begun there; `strata run CONFIG"):
        status(cfg)
    assert not cfg.run_dir.exists()


@pytest.mark.parametrize(
    "told",
    [
        {"a": 1},
        {"updated": "soon"},
        {"updated": float("nan"), "stage": None, "error": None},
        {"updated": 1, "error": None, "stage": [1]},
        {"updated": 1, "error": None, "stage": {"title": "sweep", "done": 1, "total": 2}},
    ],
    ids=str,
)
def test_what_another_version_says_of_its_progress_is_named(tmp_path: Path, told: dict[str, Any]):
    cfg = config_file.load(write_config(tmp_path))
    RunDirectory.claim(cfg)
    (cfg.run_dir / "progress.json").write_text(json.dumps({**told, "pid": os.getpid()}))
    with pytest.raises(UserError, match=r"progress\.json .* not what this version .* delete it"):
        status(cfg)


def test_what_another_version_says_of_the_time_it_took_is_named(tmp_path: Path):
    cfg = config_file.load(write_config(tmp_path))
    RunDirectory.claim(cfg)
    (cfg.run_dir / "stage_seconds.json").write_text('{"pack": "x"}')
    with pytest.raises(UserError, match=r"stage_seconds\.json .* a number for each .* delete it"):
        status(cfg)


def test_a_run_that_was_killed_is_interrupted_and_one_that_failed_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path)
    cfg = config_file.load(config)
    run = start("run", config)
    try:
        while not cfg.run_dir.joinpath("progress.json").is_file():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)
        assert status(cfg)["state"] == "running"
    finally:
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        for each in family[1:]:
            if each.is_running():
                each.kill()
    found = status(cfg)
    assert (found["state"], found["holder"]) == ("interrupted", None)

    nowhere = "compute={address: '127.0.0.1:1'}"
    code, text = strata("run", config, "--set", nowhere)
    assert code == 2, text
    assert main(["status", str(config)]) == 0
    text = capsys.readouterr().out
    assert "the last call failed; nothing works on it now" in text
    assert "error:  compute.address: no Ray cluster at 127.0.0.1:1" in text
