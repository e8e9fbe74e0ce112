"""A sweep whose trials are trained by two processes each: in Ray Tune, on the embedded model."""

import json
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from storage.files import read_json_lines
from tests.runs import SMALL_RUN, harvested, start, strata, wait_until
from tests.test_run_given_up import results, there, weights
from tests.test_run_trainer_killed import processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.crash, pytest.mark.timeout(900)]
COMPUTE = {"cpus": 2, "ranks_per_trial": 2}
SWEEP = {**SMALL_RUN["sweep"], "checkpoint_seconds": 0.2}

NEAR, SWAPPED = 1e-5, 1e-3
"""Of weights, and of FVU, after 235 steps in float32. 2e-7 was seen, a last digit; but where the last latent of a batch and
the next are as near as that they may change places, and from there on the two are no longer alike: one of four trials
was seen to do so between steps 48 and 60, with an FVU that is another by 1e-4 in the end."""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, finished: tuple[Path, str]) -> Path:
    """The run directory of a sweep by two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("by_two")
    status, output = strata("sweep", harvested(finished[0], folder, sweep=SWEEP, compute=COMPUTE))
    assert status == 0, output
    return folder / "runs" / "small"


def test_two_ranks_end_near_one_process(by_two: Path, finished: tuple[Path, str]):
    alone = finished[0].parent / "runs" / "small"
    ours, theirs = results(by_two), results(alone)
    assert ours.keys() == theirs.keys()
    apart, fvus = {}, {}
    for name, result in theirs.items():
        apart[name] = [abs(ours[name]["fvu"] - result["fvu"])]
        files = (run / "trials" / name / "sae" / "sae.safetensors" for run in (by_two, alone))
        mine, whole = map(load_file, files)
        assert mine.keys() == whole.keys()
        apart[name] += [float((mine[key] - whole[key]).abs().max()) for key in whole]
        files = (run / "trials" / name / "metrics.jsonl" for run in (by_two, alone))
        rows = [read_json_lines(file) for file in files]
        assert len(rows[0]) == len(rows[1]), "reports are told once"
        fvus[name] = [abs(a["fvu"] - b["fvu"]) for a, b in zip(*rows, strict=True)]
        assert torch.isfinite(mine["w_dec"]).all()
        assert json.loads((by_two / "trials" / name / "sae" / "sae.json").read_text())
    assert sum(max(found) < NEAR for found in apart.values()) >= len(apart) - 1, apart
    assert max(max(found[:3]) for found in fvus.values()) < NEAR, fvus
    assert max(found[0] for found in apart.values()) < SWAPPED, apart


def test_a_rank_that_is_killed_costs_its_trial_what_came_after_the_checkpoint(
    tmp_path: Path, by_two: Path, finished: tuple[Path, str]
):
    config = harvested(finished[0], tmp_path, sweep=SWEEP, compute=COMPUTE)
    run, driver = tmp_path / "runs" / "small", start("sweep", config)
    wait_until(driver, partial(there, run, "fit.safetensors"))
    ranks = processes(driver, "RankProcess")
    assert len(ranks) == 2
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for rank in ranks
        for connection in rank.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    ranks[1].kill()
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, output
    assert "Traceback" not in output
    assert not any(rank.is_running() for rank in ranks), "the other one is of no use"
    assert weights(run) == weights(by_two)
