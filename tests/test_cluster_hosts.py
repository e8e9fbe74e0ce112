"""A cluster of separate hosts: network namespaces on one bridge, with `ray start` in each."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ray_nodes import OBJECT_STORE_BYTES, RAY
from tests.runs import ROOT, wait_until, write_config
from tests.test_cluster_faults import SHORT, ended, same, there, undisturbed

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["undisturbed"]  # the fixture
SOON_DEAD: Mapping[str, str] = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_hosts() -> bool:
    name = f"strata-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@dataclass
class Hosts:
    """Namespaces, each with an address and a name of its own, that see one another and the same disk."""

    folder: Path
    _names: list[str] = field(default_factory=list)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def begin(self) -> None:
        """The bridge, in a namespace without a host."""
        self._switch = f"strata-{os.getpid()}-switch"
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._switch, "link", "set", "bridge", "up")

    def add(self) -> int:
        """One more host; its number."""
        number = len(self._names) + 1
        name, port = f"strata-{os.getpid()}-{number}", f"port{number}"
        ip("netns", "add", name)
        self._names.append(name)
        ip("-n", self._switch, *f"link add {port} type veth peer name eth0 netns {name}".split())
        ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        return number

    def address(self, number: int) -> str:
        return f"10.77.0.{number}"

    def plugged(self, number: int, state: str) -> None:
        """Plug its cable in (`up`) or out (`down`)."""
        ip("-n", self._switch, "link", "set", f"port{number}", state)

    def start(
        self, number: int, command: Sequence[str], **options: object
    ) -> subprocess.Popen[str]:
        """A command on a host."""
        named = f'hostname host{number} && exec "$@"'
        process = subprocess.Popen(
            [
                *("ip", "netns", "exec", self._names[number - 1]),
                *("unshare", "-u", "sh", "-c", named, "sh", *command),
            ],
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **SOON_DEAD, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            **options,  # pyright: ignore
        )
        self._processes.append(process)
        return process

    def ray_start(self, number: int, *words: str) -> None:
        """A node of Ray on a host."""
        folder = self.folder / f"{number}-{len(self._processes)}"
        command = [
            *(*RAY, "start", "--block", *words, "--node-ip-address", self.address(number)),
            *("--num-cpus", "1", "--temp-dir", str(folder), "--disable-usage-stats"),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
        ]
        self.start(number, command, cwd="/", stdout=subprocess.DEVNULL)

    def wait_for(self, number: int, port: int) -> None:
        """Until something listens there."""
        asked = f"</dev/tcp/{self.address(number)}/{port}"
        deadline = time.monotonic() + 90
        while self.start(number, ["bash", "-c", asked], stdout=subprocess.DEVNULL).wait():
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.5)

    def end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(60)
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def hosts() -> Iterator[Hosts]:
    found = Hosts(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
    try:
        found.begin()
        yield found
    finally:
        found.end()
        shutil.rmtree(found.folder, ignore_errors=True)


@pytest.mark.skipif(
    not can_make_hosts(), reason="needs network namespaces (root on Linux), to have separate hosts"
)
def test_a_host_whose_cable_is_pulled_while_it_trains(tmp_path: Path, undisturbed: Path):
    config = write_config(tmp_path, **SHORT, compute={"address": "10.77.0.1:6379"})
    run = tmp_path / "runs" / "small"
    with hosts() as cluster:
        head, worker = cluster.add(), cluster.add()
        cluster.ray_start(head, "--head", "--port", "6379", "--include-dashboard", "false")
        cluster.wait_for(head, 6379)
        cluster.ray_start(worker, "--address", f"{cluster.address(head)}:6379")
        driver = cluster.start(
            head,
            [sys.executable, "-m", "orchestrator", "run", str(config)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        wait_until(driver, lambda: len([*run.glob("trials/*/fit.safetensors")]) > 1)
        cluster.plugged(worker, "down")
        wait_until(driver, there(run, "evaluations/*/*.json"))
        other = cluster.add()
        cluster.ray_start(other, "--address", f"{cluster.address(head)}:6379")
        ended(driver)
    same(run, undisturbed)
