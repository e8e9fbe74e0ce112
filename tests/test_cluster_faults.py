"""Runs on clusters whose nodes are lost, end, stall or can't see the store: they end as an undisturbed one."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from storage.places import place
from tests.object_server import BUCKET, object_server, refusable, use
from tests.ray_nodes import if_it_can_mount, lose, nodes, processes
from tests.runs import ROOT, SMALL_RUN, start, strata, wait_until, write_config
from tests.stores import files_of
from tests.test_run_given_up import results, weights
from tests.test_run_survives_kills import stamps

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]
HERE = {"PYTHONPATH": str(ROOT)}
STORES = ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr")
SHORT = {
    "harvest": {**SMALL_RUN["harvest"], "tokens": 40_000, "shard_mib": 0.5},
    "sweep": {
        **SMALL_RUN["sweep"],
        "tokens": 80_000,
        "checkpoint_seconds": 0.5,
        "encoders": ["dense"],
        "vary": {"train": {"lr": [1e-3, 1e-4]}},
        "stop": {"method": "asha", "grace": 0.3, "reduction": 2},
    },
}
"""Four trials, of which two are given up by comparison with the others."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = strata("run", write_config(folder, **SHORT))
    assert status == 0, output
    return folder / "runs" / "small"


def on_cluster(folder: Path, address: str, store: str | None = None) -> tuple[Path, Path]:
    """A configuration for a cluster, and its run directory."""
    changes = {
        **SHORT,
        "harvest": {**SHORT["harvest"], "store": store},
        "compute": {"address": address, "wait_seconds": 120},
    }
    return write_config(folder, **changes), folder / "runs" / "small"


def there(run: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(run.glob(pattern))


def ended(driver: subprocess.Popen[str], timeout: float = 300) -> str:
    output, _ = driver.communicate(timeout=timeout)
    assert driver.returncode == 0, output
    assert "Traceback" not in output
    return output


def same(run: Path, undisturbed: Path) -> None:
    for store in STORES:
        assert files_of(run / store) == files_of(undisturbed / store), store
    assert weights(run) == weights(undisturbed)
    stops = [{n: r["stopped_at"] for n, r in results(r).items()} for r in (run, undisturbed)]
    assert stops[0] == stops[1]
    ours, its = (json.loads((r / "summary.json").read_text()) for r in (run, undisturbed))
    assert ours["groups"] == its["groups"]


def test_a_node_lost_in_each_stage_and_one_that_is_told_to_end(tmp_path: Path, undisturbed: Path):
    with nodes(cpus=1, environment=HERE) as cluster:
        worker = cluster.add(cpus=1)
        cluster.wait_for(2)
        config, run = on_cluster(tmp_path, cluster.address)
        driver = start("run", config)
        wait_until(driver, there(run, "train.zarr/commits/*.json"))
        lose(worker)
        worker = cluster.add(cpus=1)
        wait_until(driver, there(run, "trials/*/fit.safetensors"))
        lose(worker)
        worker = cluster.add(cpus=1)
        wait_until(driver, there(run, "trials/*/result.json"))
        worker.send_signal(signal.SIGTERM)  # a spot notice, as `ray start` is told of it
        worker = cluster.add(cpus=1)
        wait_until(driver, there(run, "evaluations/*/*.json"))
        lose(worker)
        ended(driver)
    same(run, undisturbed)


def test_a_head_that_is_lost_with_its_driver_and_the_same_command_on_another(
    tmp_path: Path, undisturbed: Path
):
    for moment in ("train.zarr/commits/*.json", "trials/*/fit.safetensors"):
        with nodes(cpus=1, environment=HERE) as cluster:
            cluster.add(cpus=1)
            cluster.wait_for(2)
            config, run = on_cluster(tmp_path, cluster.address)
            driver = start("run", config)
            wait_until(driver, there(run, moment))
            lose(psutil.Process(driver.pid))
            lose(cluster.head)
            driver.communicate()
    before = stamps(run, "train.zarr/commits/*.json")
    with nodes(cpus=2, environment=HERE) as cluster:
        config, run = on_cluster(tmp_path, cluster.address)
        ended(start("run", config))
    assert stamps(run, "train.zarr/commits/*.json") == before, "harvested again"
    same(run, undisturbed)


@if_it_can_mount
def test_a_node_that_joins_and_does_not_see_the_run_directory_is_left_out(
    tmp_path: Path, undisturbed: Path
):
    with nodes(cpus=1, environment=HERE) as cluster:
        config, run = on_cluster(tmp_path, cluster.address)
        driver = start("run", config)
        wait_until(driver, there(run, "pilot.zarr/commits/*.json"))
        cluster.add(cpus=2, blind_to=tmp_path)
        output = ended(driver)
    assert output.count("is left out from here on: run_dir:") == 1
    same(run, undisturbed)


@pytest.mark.parametrize("stage", ["harvest", "sweep"])
def test_a_node_that_the_bucket_refuses_from_some_moment_on_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, stage: str
):
    with object_server() as endpoint, refusable(endpoint) as (proxy, refuses):
        use(monkeypatch, endpoint)
        store = place(f"s3://{BUCKET}/run")
        with nodes(cpus=1, environment=HERE) as cluster:
            cluster.add(cpus=1, environment={"AWS_ENDPOINT_URL": proxy})
            cluster.wait_for(2)
            config, run = on_cluster(tmp_path, cluster.address, store=str(store))
            driver = start("run", config)
            wait_until(driver, there(run, "groups.json"))
            if stage == "sweep":
                wait_until(driver, lambda: len([*run.glob("trials/*/fit.safetensors")]) > 1)
            refuses.set()
            output = ended(driver)
        assert output.count("is left out from here on") == 1
        for name in store.names():
            if name.split("/")[0] in STORES:
                assert store.read(name) == (undisturbed / name).read_bytes(), name
    assert weights(run) == weights(undisturbed)


@contextmanager
def slow(node: psutil.Process) -> Iterator[None]:
    """The workers of a node stand still for nine tenths of the time."""
    over = threading.Event()

    def tell(signalled: signal.Signals) -> None:
        for process in processes(node):
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if "ray::" in "".join(process.cmdline()[:1]):
                    process.send_signal(signalled)

    def brake() -> None:
        while not over.wait(0.1):
            tell(signal.SIGSTOP)
            time.sleep(0.9)
            tell(signal.SIGCONT)

    thread = threading.Thread(target=brake)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_node_that_is_ten_times_slower(tmp_path: Path, undisturbed: Path):
    with nodes(cpus=1, environment=HERE) as cluster:
        worker = cluster.add(cpus=1)
        cluster.wait_for(2)
        config, run = on_cluster(tmp_path, cluster.address)
        driver = start("run", config)
        wait_until(driver, there(run, "pilot.zarr/commits/*.json"))
        with slow(worker):
            ended(driver)
    same(run, undisturbed)
