"""Ctrl-C, and the end that a batch system gives, in the sweep, at moments when MLflow is being told."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.runs import harvested, start

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
