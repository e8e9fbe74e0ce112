"""A whole run on a cluster of two nodes: sent, left, found again, stopped, continued, and the same in the end."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.object_server import ENVIRONMENTS, object_server, refusing_server
from tests.ray_nodes import RAY, Nodes, if_it_can_mount, nodes, project, submit
from tests.runs import ROOT, SMALL_RUN, wait_until, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]


def client(work: Path, address: str, log: Path) -> subprocess.Popen[str]:
    """`strata submit run.yaml`, whose output goes to a file."""
    command = [sys.executable, "-m", "orchestrator", "submit", "run.yaml", "--address", address]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=work, stdout=file, stderr=subprocess.STDOUT, text=True)


def weights(run: Path) -> dict[str, bytes]:
    files = sorted(run.glob("trials/*/sae/sae.safetensors"))
    return {file.parents[1].name: file.read_bytes() for file in files}


def test_a_run_that_is_left_followed_again_stopped_and_sent_again_ends_as_an_unbroken_one(
    tmp_path: Path, finished: tuple[Path, str]
):
    work, run, log = project(tmp_path / "work"), tmp_path / "shared" / "run", tmp_path / "log"
    write_config(work, run_dir=str(run), compute={})
    with nodes(cpus=1) as cluster:
        cluster.add(cpus=1)
        cluster.wait_for(2)

        first = client(work, cluster.dashboard, log)
        wait_until(first, lambda: (run / "pilot.zarr").is_dir())
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 1
        said = log.read_text()
        job = re.search(r"as job (\S+)", said)
        assert job
        assert f"strata: left; job {job[1]} is still at work" in said

        status, output = submit(work, "--address", cluster.dashboard, "--set", "seed=7")
        assert status == 2
        assert f"is at work already, with other settings, as job {job[1]}" in output

        second = client(work, cluster.dashboard, log)
        wait_until(second, lambda: "strata    /" in log.read_text())
        assert f"is at work already, as job {job[1]}" in log.read_text()
        stop = re.search(r"`ray (job stop [^`]+)` stops it", log.read_text())
        assert stop
        subprocess.run(
            [*RAY, *shlex.split(stop[1])], check=True, capture_output=True, env=cluster.environment
        )
        assert second.wait(60) == 1
        said = log.read_text()
        assert "was stopped; the same command continues the run" in said
        assert "strata: interrupted; the same command continues where this one stopped" in said
        assert "*** SIGTERM" not in said

        status, output = submit(work, "--address", cluster.dashboard)
        assert status == 0, output
        assert output.count("Running entrypoint for job") == 1
        assert "best" in output
    assert weights(run) == weights(finished[0].parent / "runs" / "small")


def refused(folder: Path, cluster: Nodes, *before: str) -> str:
    """What `strata run run.yaml` says, given on a node of a cluster, and ending with exit status 2."""
    command = [sys.executable, "-m", "orchestrator", "run", "run.yaml"]
    done = subprocess.run(
        [*before, *command, "--address", cluster.address],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@if_it_can_mount
def test_a_machine_that_is_no_node_is_sent_to_submit(tmp_path: Path):
    write_config(tmp_path)
    with nodes(cpus=1) as cluster:
        # Where no process of the cluster is seen, as on another machine.
        said = refused(tmp_path, cluster, "unshare", "-p", "-f", "--mount-proc")
    assert f"this machine is no node of the cluster at {cluster.address}" in said
    assert "`strata submit`" in said


def test_a_cluster_of_another_ray_takes_no_driver(tmp_path: Path):
    write_config(tmp_path)
    with nodes(cpus=1, ray_version="2.59.0") as cluster:
        said = refused(tmp_path, cluster)
    assert f"the cluster at {cluster.address} has another Ray or Python" in said
    assert "2.59.0" in said


def test_a_cluster_that_wants_a_token_says_so(tmp_path: Path):
    write_config(tmp_path)
    with nodes(
        cpus=1, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "4f" * 16}
    ) as cluster:
        said = refused(tmp_path, cluster)
    assert f"the cluster at {cluster.address} takes no driver without its token" in said
    assert "RAY_AUTH_TOKEN_PATH" in said


def test_a_node_without_strata_is_named(tmp_path: Path):
    write_config(tmp_path)
    (tmp_path / "without" / "orchestrator").mkdir(parents=True)
    (tmp_path / "without" / "orchestrator" / "__init__.py").write_text("raise ImportError('none')")
    with nodes(cpus=1) as cluster:
        cluster.add(cpus=1, environment={"PYTHONPATH": str(tmp_path / "without")})
        cluster.wait_for(2)
        said = refused(tmp_path, cluster)
    assert f"strata: node {socket.gethostname()} can't work on the run (ImportError: none)" in said
    assert "install Strata on every node" in said


def test_a_bucket_that_one_node_may_not_read_is_refused(tmp_path: Path):
    work = project(tmp_path / "work")
    harvest = {**SMALL_RUN["harvest"], "store": "s3://bucket/run"}
    write_config(work, run_dir=str(tmp_path / "run"), harvest=harvest, compute={})
    with (
        object_server() as endpoint,
        refusing_server(403) as refusing,
        nodes(cpus=1, environment={**ENVIRONMENTS["s3"], "AWS_ENDPOINT_URL": endpoint}) as cluster,
    ):
        cluster.add(cpus=1, environment={"AWS_ENDPOINT_URL": refusing})
        cluster.wait_for(2)
        status, output = submit(work, "--address", cluster.dashboard)
    assert status == 2, output
    said = (
        "can't read s3://bucket/run/config.yaml: the server refuses these credentials (403 Refused)"
    )
    assert f"strata: node {socket.gethostname()}: {said}; allow them to list, read, write" in output
    assert "(so on 1 of 1 other nodes)" in output
    assert "planted" not in output
    assert not (tmp_path / "run" / "trials").exists()


FILLER = """
import sys, ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
ray.init(sys.argv[1], log_to_driver=False)
held = []
for size in (2**23, 2**20, 2**17, 2**14, 2**11):
    try:
        while True:
            held.append(ray.put(bytes(size)))
    except (ObjectStoreFullError, OutOfDiskError):
        pass
print("full", flush=True)
sys.stdin.read()
"""


ASKER = """
import sys, ray
from orchestrator.cluster import connected
from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
try:
    with connected(ComputeConfig(address=sys.argv[1])):
        held = [ray.put(bytes(2**26)) for _ in range(4)]
except UserError as error:
    print(error)
"""


def test_what_needs_room_in_an_object_store_that_others_have_filled_says_so_and_a_run_needs_none(
    tmp_path: Path,
):
    config = write_config(tmp_path, run_dir=str(tmp_path / "run"), compute={"cpus": None})
    no_disk = {"RAY_local_fs_capacity_threshold": "0.0001"}  # to move objects to
    with (
        nodes(cpus=1, environment=no_disk) as cluster,
        subprocess.Popen(
            [sys.executable, "-c", FILLER, cluster.address],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as filler,
    ):
        assert filler.stdout
        assert "full" in filler.stdout.readline()
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
        asked = subprocess.run(
            [sys.executable, "-c", ASKER, cluster.address],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        run = subprocess.run(
            [sys.executable, "-m", "orchestrator", "run", config, "--address", cluster.address],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        filler.communicate()
    assert "the cluster's object store is full" in asked.stdout
    assert "`ray status`" in asked.stdout
    assert run.returncode == 0, run.stdout + run.stderr
