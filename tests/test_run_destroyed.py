"""A harvest destroyed at twenty moments ends with the bytes of one that nothing disturbed."""

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import SMALL_RUN, start, strata, write_config
from tests.stores import files_of

pytestmark = [pytest.mark.ray, pytest.mark.crash]
HARVEST = {
    **SMALL_RUN["harvest"],
    "tokens": 180_000,
    "shard_mib": 0.5,
}  # many shards, so that there is much to destroy
STORES = ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr")
MOMENTS = 20


def commits(run: Path) -> int:
    return len(list(run.glob("*.zarr/commits/*.json")))


def destroy(what: str, driver: subprocess.Popen[str], rng: random.Random) -> None:
    """Kill the driver, one of its actors' processes, or all of Ray."""
    everything = psutil.Process(driver.pid).children(recursive=True)
    actors = [p for p in everything if p.is_running() and "ray::" in " ".join(p.cmdline()[:1])]
    if what == "driver":
        driver.send_signal(signal.SIGKILL)
    for process in everything if what == "ray" else rng.sample(actors, min(1, len(actors))):
        if what != "driver":
            process.kill()


@pytest.mark.timeout(3000)
def test_a_harvest_destroyed_at_twenty_moments_ends_with_the_bytes_of_an_unbroken_one(tmp_path):
    rng = random.Random(0)
    unbroken = write_config(tmp_path / "unbroken", harvest=HARVEST)
    status, output = strata("harvest", unbroken)
    assert status == 0, output
    config = write_config(tmp_path / "broken", harvest=HARVEST)
    run = tmp_path / "broken/runs/small"
    destroyed = []
    while len(destroyed) < MOMENTS:
        what = rng.choice(["driver", "actor", "ray"])
        before, driver = commits(run), start("harvest", config)
        while commits(run) == before and driver.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        if driver.poll() is not None:
            assert driver.returncode == 0, driver.communicate()[0]
            break  # nothing was left to do
        destroy(what, driver, rng)
        destroyed.append(what)
        if what == "actor":  # the harvest goes on by itself; the next moment is the driver's
            time.sleep(rng.uniform(0, 5))
            driver.kill()
        try:
            output, _ = driver.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise AssertionError(
                f"hung after {what} was killed: {driver.communicate()[0]}"
            ) from None
        assert "Traceback" not in output or what == "ray", output
    assert len(destroyed) >= MOMENTS // 2, destroyed
    status, output = strata("harvest", config)
    assert status == 0, output
    for name in STORES:
        assert files_of(run / name) == files_of(tmp_path / "unbroken/runs/small" / name), name
