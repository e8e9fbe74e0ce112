"""A whole run on a cluster of two nodes: sent, left, found again, stopped, continued, and the same in the end."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray_nodes import RAY, nodes, project
from tests.runs import wait_until, write_config
from tests.test_submit import if_it_can_mount, submit

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


@if_it_can_mount
def test_a_machine_that_is_no_node_is_sent_to_submit(tmp_path: Path):
    work = project(tmp_path / "work")
    write_config(work, run_dir=str(tmp_path / "run"), compute={})
    with nodes(cpus=1) as cluster:
        # Where no process of the cluster is seen, as on another machine.
        done = subprocess.run(
            [
                *("unshare", "-p", "-f", "--mount-proc"),
                *(sys.executable, "-m", "orchestrator", "run", "run.yaml"),
                *("--address", cluster.address),
            ],
            cwd=work,
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2, done.stderr
    assert f"this machine is no node of the cluster at {cluster.address}" in done.stderr
    assert "`strata submit`" in done.stderr


def test_a_cluster_of_another_ray_takes_no_driver(tmp_path: Path):
    work = project(tmp_path / "work")
    write_config(work, run_dir=str(tmp_path / "run"), compute={})
    with nodes(cpus=1, ray_version="2.59.0") as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "run", "run.yaml", "--address", cluster.address],
            cwd=work,
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2, done.stderr
    assert f"the cluster at {cluster.address} has another Ray or Python" in done.stderr
    assert "2.59.0" in done.stderr
