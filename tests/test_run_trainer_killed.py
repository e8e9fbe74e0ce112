"""A sweep whose trainer, or whose whole node of Ray, is killed ends with the weights of an unbroken one."""

import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.runs import SMALL_RUN, harvested, start, strata, wait_until
from tests.test_run_given_up import results, there, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEEP = {**SMALL_RUN["sweep"], "checkpoint_seconds": 0.2}


def processes(driver: subprocess.Popen[str], *names: str) -> list[psutil.Process]:
    """Those below the driver whose command line begins with one of some names."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            command = process.cmdline()[:1]
            if command and any(name in command[0] for name in names):
                found.append(process)
    return found


def begun(folder: Path, finished: Path) -> tuple[subprocess.Popen[str], Path, Path]:
    """A sweep that has written its first checkpoint; its configuration and run directory."""
    config = harvested(finished, folder, sweep=SWEEP)
    run, driver = folder / "runs" / "small", start("sweep", config)
    wait_until(driver, partial(there, run, "fit.safetensors"))
    return driver, config, run


def test_a_trainer_that_is_killed_goes_on_in_another_process_of_the_same_run(
    tmp_path: Path, finished: tuple[Path, str]
):
    driver, _, run = begun(tmp_path, finished[0])
    # Between two trials there is none for a moment.
    wait_until(driver, lambda: bool(processes(driver, "Trainable")))
    processes(driver, "Trainable")[0].kill()
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, output
    assert "Traceback" not in output
    assert weights(run) == weights(finished[0].parent / "runs" / "small")


@pytest.mark.crash
def test_trials_whose_processes_end_over_and_over_are_an_error_that_says_why(
    tmp_path: Path, finished: tuple[Path, str]
):
    driver, config, run = begun(tmp_path, finished[0])
    while driver.poll() is None:
        for process in processes(driver, "Trainable"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)
    output, _ = driver.communicate()
    assert driver.returncode == 2, output
    assert "Traceback" not in output
    assert "mostly memory is the reason" in output
    status, output = strata("sweep", config)
    assert status == 0, output
    assert weights(run) == weights(finished[0].parent / "runs" / "small")


@pytest.mark.crash  # Ray itself takes two minutes to give its node up
def test_a_sweep_whose_node_is_killed_is_continued_by_the_same_command(
    tmp_path: Path, finished: tuple[Path, str]
):
    driver, config, run = begun(tmp_path, finished[0])
    for process in processes(driver, "raylet", "gcs_server", "ray::"):
        process.kill()
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode not in (0, 2), output
    assert "the same command goes on where this one stopped" in output
    before = results(run)
    status, output = strata("sweep", config)
    assert status == 0, output
    assert weights(run) == weights(finished[0].parent / "runs" / "small")
    assert {name: results(run)[name] for name in before} == before, "done twice"


@pytest.mark.crash
def test_a_damaged_checkpoint_is_told_after_the_other_trials_and_deleted_it_is_made_again(
    tmp_path: Path, finished: tuple[Path, str]
):
    driver, config, run = begun(tmp_path, finished[0])
    # Trainers outlive the driver for a moment, and would write another one.
    for process in [*processes(driver, ""), psutil.Process(driver.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    driver.communicate()
    [*damaged] = run.glob("trials/*/fit.safetensors")
    for file in damaged:
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1  # of a weight, where safetensors sees nothing
        file.write_bytes(data)
    status, output = strata("sweep", config)
    assert status == 2, output
    assert "Traceback" not in output
    assert "fit.safetensors is damaged (its tensors are not those that were written)" in output
    assert "delete that file" in output
    left = [file for file in damaged if not (file.parent / "result.json").is_file()]
    assert len(results(run)) == 4 - len(left)
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "test"]
    trials = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert {trial.info.status for trial in trials} <= {"FINISHED", "FAILED"}
    for file in left:
        file.unlink()
    status, output = strata("sweep", config)
    assert status == 0, output
    assert weights(run) == weights(finished[0].parent / "runs" / "small")
