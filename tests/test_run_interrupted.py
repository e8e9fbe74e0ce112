"""Ctrl-C, and the end that a batch system gives, in the sweep, at moments when MLflow is being told."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from orchestrator import config_file
from orchestrator.status import status
from tests.runs import SMALL_RUN, harvested, start, strata, wait_until, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_signal_ends_the_run_with_a_word_on_how_to_go_on(
    tmp_path: Path, finished: tuple[Path, str]
):
    config = harvested(finished[0], tmp_path)
    # A shell starts background jobs with SIGINT ignored, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = {"metrics.jsonl": signal.SIGINT, "result.json": signal.SIGTERM}
    for moment, end in ends.items():  # the second time it goes on from the first
        run = start("run", config)
        while not list((tmp_path / "runs" / "small" / "trials").glob(f"*/{moment}")):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        os.kill(run.pid, end)
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 1, output
        assert "strata: interrupted; the same command continues where this one stopped" in output
        assert "Traceback" not in output
        assert "***" not in output, "a stack of addresses"
        assert status(config_file.load(config))["state"] == "interrupted"
    trials = tmp_path / "runs" / "small" / "trials"
    left = next(trials.glob("*/result.json")).with_name("fit.safetensors")
    left.touch()  # as a crash between the two would
    code, output = strata("sweep", config)
    assert code == 0, output
    assert not left.exists()


@pytest.mark.parametrize(
    ("end", "moment"),
    [(signal.SIGINT, "libtorch"), (signal.SIGTERM, "libtorch"), (signal.SIGTERM, "gcs_server")],
)
def test_a_signal_that_comes_before_ray_is_there_ends_it_with_the_same_word(
    tmp_path: Path, end: signal.Signals, moment: str
):
    """While libraries are loaded, and while Ray starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = write_config(tmp_path)
    run = start("run", config)

    def has_come() -> bool:
        names = [child.name() for child in psutil.Process(run.pid).children()]
        return moment in names or moment in Path(f"/proc/{run.pid}/maps").read_text()

    wait_until(run, has_come)
    run.send_signal(end)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1, output
    said = "strata: interrupted; the same command continues where this one stopped\n"
    assert output.endswith(said)
    assert "Traceback" not in output
    if moment == "gcs_server":
        assert status(config_file.load(config))["state"] == "interrupted"


def test_trials_under_way_are_saved_before_an_interrupted_run_ends(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {**SMALL_RUN["sweep"], "tokens": 2_000_000, "checkpoint_seconds": 1e6}
    config = harvested(finished[0], tmp_path, sweep=sweep)
    trials = tmp_path / "runs" / "small" / "trials"
    run = start("sweep", config)
    wait_until(run, lambda: bool(list(trials.glob("*/metrics.jsonl"))))
    under_way = [file.parent for file in trials.glob("*/metrics.jsonl")]
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1, output
    for trial in under_way:
        assert (trial / "fit.safetensors").is_file(), output
        assert not (trial / "result.json").exists(), "ended before it was interrupted"
    assert not list(trials.glob("*/save_now"))
