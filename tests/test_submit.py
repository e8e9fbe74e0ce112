"""`strata submit` and `strata run --address`, on a real cluster of two nodes, one of which does not see all folders."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from ray import cloudpickle
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from ray.util import get_node_ip_address

from orchestrator import cluster as cluster_module
from orchestrator import config_file, jobs
from orchestrator.__main__ import main
from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
from orchestrator.jobs import Request
from orchestrator.run_directory import RunDirectory
from orchestrator.shared_storage import SharedStorage
from tests.ray_nodes import Nodes, if_it_can_mount, nodes, project, submit
from tests.runs import ROOT, write_config

HOST = get_node_ip_address()
"""Of this machine, where Ray looks for what is said to be on 127.0.0.1."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with Strata's code, and beside it the folder that one node does not see."""
    folder = tmp_path_factory.mktemp("submit")
    (folder / "one-sees").mkdir()
    return project(folder / "work")


@pytest.fixture(scope="module")
def cluster(work: Path) -> Iterator[Nodes]:
    with nodes(cpus=1) as cluster:
        cluster.add(cpus=1, blind_to=work.parent / "one-sees")
        cluster.wait_for(2)
        yield cluster


@pytest.mark.ray
@pytest.mark.slow
@if_it_can_mount
def test_a_run_directory_that_one_node_does_not_see_is_refused(cluster: Nodes, work: Path):
    run = work.parent / "one-sees" / "run"
    write_config(work, run_dir=str(run), compute={"cpus": 2})  # of a laptop's private cluster
    (work / ".env").write_text("HF_TOKEN=planted-4711\n")
    (work / ".aws").mkdir()
    (work / ".aws" / "credentials").write_text("planted-4711\n")
    status, output = submit(work, "--address", cluster.dashboard)
    assert status == 2, output
    assert f"strata: run_dir: {run} on node {socket.gethostname()} is not what it is on" in output
    assert "put it where all nodes mount shared storage" in output
    assert "(so on 1 of 1 other nodes)" in output
    assert output.rstrip().endswith("ended with exit status 2; the reason stands above")
    assert "Traceback" not in output
    assert not (run / "tokens.zarr").exists()
    [sent] = cluster.folder.glob("0/session_2*/runtime_resources/working_dir_files/*/run.yaml")
    assert (sent.parent / "orchestrator").is_dir()
    assert not (sent.parent / ".env").exists()
    assert not (sent.parent / ".aws").exists()


@pytest.mark.ray
@pytest.mark.slow
@if_it_can_mount
def test_of_a_configuration_alone_the_installed_strata_makes_the_run(
    cluster: Nodes, tmp_path: Path, finished: tuple[Path, str]
):
    run = tmp_path / "finished"
    shutil.copytree(finished[0].parent / "runs" / "small", run)
    write_config(tmp_path, run_dir=str(run))
    (tmp_path / "large.bin").write_bytes(b"not to be sent")
    status, output = submit(tmp_path, "--image", "--address", cluster.dashboard)
    assert status == 0, output
    table = [line for line in finished[1].splitlines() if line.startswith("│")]
    assert table
    assert all(line in output for line in table)
    assert not [*cluster.folder.rglob("large.bin")]


@if_it_can_mount
def test_a_process_that_starts_later_where_the_folder_is_another_refuses_to_work(tmp_path: Path):
    cfg = config_file.load(write_config(tmp_path))
    storage = SharedStorage.of(RunDirectory.claim(cfg))
    program = tmp_path / "program.py"
    program.write_text(
        "import pickle, sys\nstorage = pickle.load(open(sys.argv[1], 'rb'))\nstorage.check()\n"
    )
    pickled = tmp_path / "storage"
    pickled.write_bytes(cloudpickle.dumps(storage))
    command = [sys.executable, str(program), str(pickled)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True)
    hidden = f'mount -t tmpfs none {cfg.run_dir.parent} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hidden, "sh", *command],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"UserError: run_dir: {cfg.run_dir} on node" in done.stderr


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        yield f"{HOST}:{server.getsockname()[1]}"


@pytest.fixture
def older() -> Iterator[str]:
    """The dashboard of a cluster of another Ray, as far as it is asked before it is refused."""
    with saying({"version": "4", "ray_version": "2.9.0"}) as address:
        yield address


@contextmanager
def saying(answer: object) -> Iterator[str]:
    """A server that says the same whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command says that ends with exit status 2."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_an_address_where_nothing_answers_is_refused_after_a_stated_time(
    tmp_path: Path, capsys, silent: str, monkeypatch
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(jobs, "ANSWER_SECONDS", 1.0)
    config = write_config(tmp_path)
    said = refused(capsys, "run", config, "--address", silent)
    assert f"no Ray cluster at {silent} (what listens there does not answer as Ray does" in said
    assert "within 1 s" in said
    said = refused(capsys, "submit", config, "--image", "--address", f"http://{silent}")
    assert f"--address: no Ray cluster answers at http://{silent} within 1 s" in said
    assert "`ray dashboard cluster.yaml`" in said


def test_what_speaks_as_ray_does_and_is_no_cluster_is_refused(tmp_path: Path, capsys, monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    server.start()
    try:
        said = refused(capsys, "run", write_config(tmp_path), "--address", address)
    finally:
        server.stop(None)
    assert f"no Ray cluster at {address} (what listens there does not answer as Ray does" in said
    assert "UNIMPLEMENTED" in said
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    said = refused(capsys, "run", write_config(tmp_path), "--address", "auto")
    assert "ray://127.0.0.1:10001 is a way to a cluster from outside" in said
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # of a cluster that is gone
    said = refused(capsys, "run", write_config(tmp_path), "--address", "auto")
    assert ":9 (" in said
    assert "refused" in said
    said = refused(capsys, "run", write_config(tmp_path), "--address", "somewhere")
    assert "no Ray cluster at somewhere (it is no HOST:PORT)" in said


def test_addresses_of_the_wrong_kind_are_refused_with_the_right_one(
    tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    config = write_config(tmp_path)
    said = refused(capsys, "run", config, "--address", "ray://127.0.0.1:10001")
    assert "`strata submit --address http://HOST:8265` sends it there" in said
    said = refused(capsys, "submit", config, "--image", "--address", "127.0.0.1:6379")
    assert "give http://HOST:8265" in said


@pytest.mark.parametrize("address", ["", "local"])
def test_an_address_that_would_mean_this_machine_alone_is_refused(
    tmp_path: Path, capsys, address: str
):
    config = write_config(tmp_path)
    said = refused(capsys, "run", config, "--address", address)
    assert f"compute.address: {address!r} is no cluster's; leave address out" in said
    assert "auto for the cluster that this machine belongs to" in said
    said = refused(capsys, "submit", config, "--image", "--address", address)
    assert f"--address: {address!r} is not where a cluster takes jobs" in said
    assert not (tmp_path / "runs").exists()


def test_auto_does_not_mean_this_machine_alone_either(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with (
        pytest.raises(UserError, match=r"that is local, which is no cluster; unset RAY_ADDRESS"),
        cluster_module.connected(ComputeConfig(address="auto")),
    ):
        pytest.fail("it began a Ray of its own")


def test_a_cluster_of_another_ray_is_refused(tmp_path: Path, capsys, older: str, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    said = refused(capsys, "submit", write_config(tmp_path), "--image", "--address", older)
    assert f"here is ray 2.60.0, and the cluster at {older} has ray 2.9.0" in said
    assert "install the same on both sides" in said


@pytest.mark.parametrize(
    "answer", [[], None, {"ray_version": 3}, {"version": "4"}, b"<html>welcome</html>"]
)
def test_a_server_that_is_no_dashboard_is_refused(tmp_path: Path, capsys, monkeypatch, answer):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with saying(answer) as address:
        said = refused(capsys, "submit", write_config(tmp_path), "--image", "--address", address)
    assert f"--address: what answers at {address} does not answer as Ray's dashboard does" in said


def test_a_run_sent_by_another_strata_or_python_is_refused_before_it_begins(tmp_path: Path, capsys):
    config = write_config(tmp_path)
    said = refused(capsys, "run", config, "--from-client", "strata=9.9.0 ray=2.60.0 python=3.9")
    assert "and where the run was submitted it is python 3.9, strata 9.9.0;" in said
    assert not (tmp_path / "runs").exists()


def test_versions_that_are_none_are_refused_in_words(tmp_path: Path, capsys):
    said = refused(capsys, "run", write_config(tmp_path), "--from-client", "ray=2.60.0 nonsense")
    assert "--from-client: 'ray=2.60.0 nonsense' is no list of NAME=VERSION" in said
    assert "leave it out" in said


@pytest.mark.parametrize(
    ("setting", "value", "shared"),
    [
        ("run_dir", "runs/mine", "/shared/mine"),
        ("harvest.store", "stores/mine", "/shared/mine"),
        ("tracking.uri", "sqlite:///mine.db", "sqlite:////shared/mlflow.db"),
    ],
)
def test_a_path_relative_to_this_machine_is_not_sent(
    tmp_path: Path, capsys, setting, value, shared
):
    config = write_config(tmp_path)
    there = () if setting == "run_dir" else ("--set", "run_dir=/shared/mine")
    said = refused(capsys, "submit", config, "--image", *there, "--set", f"{setting}={value}")
    assert f"{setting}: {value} is relative" in said
    assert f"--set {setting}={shared}" in said


def test_a_bucket_is_no_run_directory(tmp_path: Path, capsys):
    said = refused(capsys, "plan", write_config(tmp_path, run_dir="s3://bucket/run"))
    assert "run_dir: s3:/bucket/run is no folder" in said
    assert "harvest.store" in said


def test_a_configuration_that_is_missing_or_would_not_be_sent_is_refused(
    tmp_path: Path, capsys, monkeypatch
):
    said = refused(capsys, "submit", tmp_path / "none.yaml", "--image")
    assert "none.yaml does not exist" in said
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = refused(capsys, "submit", write_config(tmp_path))
    assert "run.yaml lies outside" in said
    assert "--image" in said


@pytest.mark.parametrize(
    ("ignored", "folder"),
    [
        *((("", ""), "runs/x"), ((".gitignore", "mine/\n"), "mine/x")),
        *(((".rayignore", "x\n"), "mine/x"), (("mine/.gitignore", "*.yaml\n"), "mine")),
    ],
)
def test_a_configuration_that_is_not_sent_with_the_working_directory_is_refused(
    tmp_path: Path, capsys, monkeypatch, ignored: tuple[str, str], folder: str
):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / folder).rename(tmp_path / folder / "config.yaml")
    name, text = ignored
    if name:
        Path(name).write_text(text)
    said = refused(capsys, "submit", folder)
    assert f"{folder}/config.yaml is not sent with {tmp_path}" in said
    assert f"`cp {folder}/config.yaml run.yaml`" in said
    shutil.copy(f"{folder}/config.yaml", "run.yaml")
    assert Request.of(Path("run.yaml"), (), tmp_path).file == Path("run.yaml")
    assert Request.of(Path(folder), (), None).folder is None


def test_a_list_of_what_is_not_sent_that_can_not_be_read_is_told(
    tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitignore").write_text("!\n")
    said = refused(capsys, "submit", write_config(tmp_path))
    assert f"{tmp_path}: Ray can't read the .gitignore or .rayignore there" in said
    assert "--image" in said


class _CutOff(JobSubmissionClient):
    """A cluster whose connection breaks once, after a log that was followed for longer than one waits for it."""

    def __init__(self) -> None:
        self._back = float("inf")

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self._back == float("inf"):
            for part in "abcd":
                yield part
                await asyncio.sleep(0.2)
            self._back = time.monotonic() + 0.2
            raise ConnectionError
        self._refuse()
        yield "abcd"
        yield "e"

    def get_job_info(self, job_id: str) -> JobDetails:
        self._refuse()
        return JobDetails(  # pyright: ignore[reportCallIssue]
            type=JobType.SUBMISSION, status=JobStatus.SUCCEEDED, entrypoint=""
        )

    def _refuse(self) -> None:
        if time.monotonic() < self._back:
            raise ConnectionError


def test_a_cut_is_waited_out_however_long_the_run_was_followed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0.6)
    monkeypatch.setattr(jobs.time, "sleep", lambda _, sleep=time.sleep: sleep(0.05))
    followed, written = object.__new__(jobs.Jobs), []
    followed._client = _CutOff()  # pyright: ignore[reportAttributeAccessIssue]
    details = followed.follow("job", written.append)
    assert details is not None
    assert "".join(written) == "abcde"


class _Silent(JobSubmissionClient):
    """A cluster whose head has stopped: it takes connections, and answers nothing."""

    def __init__(self) -> None:
        """Ask nothing."""

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    def get_job_info(self, job_id: str) -> JobDetails:
        raise TimeoutError


def test_a_cluster_that_is_silent_is_followed_no_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0.6)
    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.5)
    followed = object.__new__(jobs.Jobs)
    followed._client = _Silent()  # pyright: ignore[reportAttributeAccessIssue]
    assert followed.follow("job", print) is None
