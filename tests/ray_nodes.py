"""Real Ray clusters of several nodes on this machine, each node in processes of its own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest

from tests.runs import ROOT

RAY = (sys.executable, "-m", "ray.scripts.scripts")
AS_VERSION = "import sys, ray; ray.__version__ = sys.argv.pop(1); from ray.scripts.scripts import main; main()"
OBJECT_STORE_BYTES = 100 * 2**20

CAN_MOUNT = shutil.which("unshare") and not subprocess.call(
    ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], stderr=subprocess.DEVNULL
)
if_it_can_mount = pytest.mark.skipif(
    not CAN_MOUNT, reason="needs mount namespaces (root on Linux), to hide a folder from a node"
)


def _free_port(stack: ExitStack) -> int:
    """Below the range that Ray gives its workers; held until the stack ends, and not where other processes look."""
    for port in range(6400 + os.getpid() % 1000 * 3, 9999):
        asked = stack.enter_context(socket.socket())
        try:
            asked.bind(("127.0.0.1", port))
        except OSError:
            continue
        return port
    raise AssertionError("no port is free")


@dataclass
class Nodes:
    """A cluster, and what its commands need."""

    address: str
    """For drivers: HOST:PORT."""

    dashboard: str
    """For jobs: a URL."""

    environment: dict[str, str]
    """Of all nodes."""

    folder: Path
    """Short, as the sockets in it may have names of 107 bytes. Each node has one of its own in it, as it would on
    a machine of its own: they clear away what jobs sent."""

    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def head(self) -> psutil.Process:
        """The first node."""
        return psutil.Process(self._processes[0].pid)

    def add(
        self,
        cpus: int,
        blind_to: Path | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        gpus: int = 0,
    ) -> psutil.Process:
        """One more node; with `blind_to` it has an empty folder of its own there, GPUs are of no kind."""
        command: Sequence[str] = [
            *(*RAY, "start", "--block", "--address", self.address, "--num-cpus", str(cpus)),
            *("--num-gpus", str(gpus)),
            *self._common(),
        ]
        if blind_to is not None:
            mounted = f'mount -t tmpfs none {blind_to} && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mounted, "sh", *command]
        return self._begin(command, environment)

    def wait_for(self, n: int) -> None:
        """Until so many nodes are alive."""
        url = f"{self.dashboard}/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        token = self.environment.get("RAY_AUTH_TOKEN", "")
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=5) as answer:
                    if answer.read().count(b'"node_id"') >= n:
                        return
            except OSError:
                pass
            assert time.monotonic() < deadline, f"{n} nodes were not alive within 120 s"
            time.sleep(0.3)

    def _common(self) -> Sequence[str]:
        folder = self.folder / str(len(self._processes))
        return (
            *("--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)),
            *("--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"),
            *("--dashboard-agent-listen-port", "0"),
        )

    def begin_head(self, cpus: int, ray_version: str | None) -> None:
        """The first node."""
        ray = RAY if ray_version is None else (sys.executable, "-c", AS_VERSION, ray_version)
        port, dashboard = (url.rpartition(":")[2] for url in (self.address, self.dashboard))
        self._begin(
            [
                *(*ray, "start", "--head", "--block", "--port", port, "--num-cpus", str(cpus)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
                *self._common(),
            ]
        )

    def end(self) -> None:
        """All nodes, the head last."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(60)

    def _begin(
        self, command: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})
    ) -> psutil.Process:
        process = subprocess.Popen(
            command,
            cwd="/",  # not the checkout: what runs is what a job sends
            env={**self.environment, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        return psutil.Process(process.pid)


@contextmanager
def nodes(
    cpus: int,
    ray_version: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Nodes]:
    """A cluster whose head has so many CPUs, and ends with the block; with `ray_version` it says to be of that one."""
    with ExitStack() as stack:
        port, dashboard = (_free_port(stack) for _ in range(2))
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    everywhere = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        **environment,
    }
    cluster = Nodes(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", everywhere, folder)
    try:
        cluster.begin_head(cpus, ray_version)
        cluster.wait_for(1)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def processes(node: psutil.Process) -> list[psutil.Process]:
    """All of a node: Ray's own, and the workers."""
    return [node, *node.children(recursive=True)]


def lose(node: psutil.Process) -> None:
    """As when the machine is gone: all of it at once, and without a word."""
    found = processes(node)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.suspend()  # so that nobody sees others die
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def project(folder: Path) -> Path:
    """A working directory to submit from: Strata's own code, and nothing else."""
    folder.mkdir()
    for name in ("sae", "storage", "actors", "orchestrator"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `strata submit run.yaml`, given in a folder, by the code that lies there."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "submit", "run.yaml", *arguments],
        cwd=folder,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ,
    )
    return done.returncode, done.stdout
