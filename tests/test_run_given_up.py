"""Sweeps with early stopping and with suggestions, on the embedded model; some killed on the way."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.text import Text

from orchestrator.run_directory import read_json
from tests.runs import SMALL_RUN, harvested, kill_when, start, strata, strata_in_terminal

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEEP = {
    **SMALL_RUN["sweep"],
    "tokens": 60_000,
    "encoders": ["dense"],
    "vary": {"train": {"lr": [1e-6, 1e-5, 1e-3]}},
    "stop": {"method": "asha", "grace": 0.2, "reduction": 3},
    "groups": {1: {"vary": {"train": {"lr": [1e-3]}}}},
}


def results(run: Path) -> dict[str, dict[str, Any]]:
    files = sorted(run.glob("trials/*/result.json"))
    return {file.parent.name: read_json(file) for file in files}


def weights(run: Path) -> dict[str, bytes]:
    files = sorted(run.glob("trials/*/sae/sae.safetensors"))
    return {file.parents[1].name: file.read_bytes() for file in files}


def frames(output: str) -> set[str]:
    """What a terminal has shown of trials: group, encoder, k, other settings and state."""
    lines = [Text.from_ansi(line).plain.split() for line in output.splitlines()]
    rows = [words for words in lines if len(words) > 5 and words[1] == "dense"]
    # Between them stand step, FVU and tokens/s.
    return {" ".join((*words[:4], *words[7:])) for words in rows}


def there(run: Path, file: str) -> bool:
    return any(run.glob(f"trials/*/{file}"))


def test_trials_that_learn_too_little_are_given_up_and_win_nothing(
    tmp_path: Path, finished: tuple[Path, str]
):
    config = harvested(finished[0], tmp_path, sweep=SWEEP)
    run = tmp_path / "runs" / "small"
    status, output = strata_in_terminal("sweep", config, width=100, height=24)
    assert status == 0, output
    assert frames(output) >= {
        *("0 dense 8 batch_topk-lr1e-06 running", "0 dense 8 batch_topk-lr1e-06 paused"),
        *("0 dense 8 batch_topk-lr1e-06 given up", "0 dense 8 batch_topk-lr1e-05 given up"),
        *("0 dense 8 batch_topk-lr0.001 running", "1 dense 8 batch_topk waiting"),
    }
    found = results(run)
    n_steps = -(-60_000 // 512)
    stopped = {name: result["stopped_at"] for name, result in found.items()}
    stride = -(-n_steps // 20)
    rung = next(step for step in range(stride, n_steps, stride) if step / n_steps >= 0.2)
    assert stopped == {
        "g0-k8-dense-batch_topk-lr1e-06": rung,
        "g0-k8-dense-batch_topk-lr1e-05": rung,
        "g0-k8-dense-batch_topk-lr0.001": None,
        "g1-k8-dense-batch_topk": None,
    }
    share = (2 * n_steps + 2 * rung) / (4 * n_steps)
    assert f"2 of 4 trials were given up early; all together were trained for {share:.0%}" in output
    assert found["g0-k8-dense-batch_topk-lr1e-06"]["tokens"] == rung * 512
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "test"]
    early = client.search_runs([experiment.experiment_id], "params.lr = '1e-06'")
    assert [run.data.metrics["stopped_at"] for run in early] == [rung]
    assert [run.info.status for run in early] == ["FINISHED"]


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_a_sweep_killed_under_asha_gives_up_whom_an_unbroken_one_does(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {
        **SWEEP,
        "encoders": ["dense", {"kron": {"m": [4], "n": [4]}}],
        "vary": {"train": {"lr": [3e-4, 1e-3]}},
        "groups": {},
    }
    ends = []
    for name in ("unbroken", "killed"):
        config = harvested(finished[0], tmp_path / name, sweep=sweep)
        run = tmp_path / name / "runs" / "small"
        if name == "killed":
            kill_when(start("sweep", config), partial(there, run, "fit.safetensors"))
            kill_when(start("sweep", config), partial(there, run, "stopped.json"))
            kill_when(start("sweep", config), partial(there, run, "result.json"))
        status, output = strata("sweep", config)
        assert status == 0, output
        before = weights(run)
        status, output = strata("sweep", config)
        assert status == 0, output
        assert "to go" not in output
        assert weights(run) == before
        ends.append(({n: r["stopped_at"] for n, r in results(run).items()}, weights(run)))
    assert ends[0] == ends[1]
    # Of four in each group two pass the first rung, and one the second.
    assert sorted(step is None for step in ends[0][0].values()) == [False] * 6 + [True] * 2


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_a_run_killed_under_optuna_ends_with_the_trials_it_had(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {
        **SMALL_RUN["sweep"],
        "tokens": 30_000,
        "encoders": ["dense", {"kron": {"m": [2, 4], "n": [4]}}],
        "vary": {"train": {"lr": {"min": 1e-4, "max": 1e-2, "log": True}}},
        "search": {"method": "optuna", "trials": 4},
        "stop": {"method": "median"},
    }
    config = harvested(finished[0], tmp_path, sweep=sweep)
    run = tmp_path / "runs" / "small"
    kill_when(start("run", config), lambda: len(results(run)) >= 3)
    kept = json.loads((run / "suggested.json").read_text())
    done = results(run)
    status, output = strata("run", config)
    assert status == 0, output
    suggested = json.loads((run / "suggested.json").read_text())
    assert suggested[: len(kept)] == kept
    found = results(run)
    assert len(suggested) == len(found) == 2 * 4
    assert {name: found[name] for name in done} == done
    summary = json.loads((run / "summary.json").read_text())
    assert summary["n_trials"] == 8
    assert all(group["best"]["stopped_at"] is None for group in summary["groups"])


@pytest.mark.crash
def test_trials_that_diverge_are_given_up_there_and_the_others_win(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {
        **SMALL_RUN["sweep"],
        "encoders": ["dense"],
        "tokens": 5_000,
        "vary": {"train": {"lr": [1e-3, 1e30]}},
    }
    config = harvested(finished[0], tmp_path, sweep=sweep)
    status, output = strata("run", config)
    assert status == 0, output
    assert "warning" in output
    assert (
        "2 of 4 trials diverged and were given up there (g0-k8-dense-batch_topk-lr1e+30, " in output
    )
    run = tmp_path / "runs" / "small"
    ends = {name: result["stopped_at"] for name, result in results(run).items()}
    assert ends == {
        f"g{group}-k8-dense-batch_topk-lr{lr}": stopped
        for group in (0, 1)
        for lr, stopped in (("0.001", None), ("1e+30", 1))
    }
    best = json.loads((run / "summary.json").read_text())["groups"][1]["best"]["trial"]
    assert best == "g1-k8-dense-batch_topk-lr0.001"


@pytest.mark.crash
def test_nobody_waits_at_a_rung_for_one_beside_it_that_has_diverged(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {
        **SWEEP,
        "tokens": 20_000,
        "vary": {"train": {"lr": [1e-3, 2e-3, 1e30]}},
        "groups": {},
    }
    config = harvested(finished[0], tmp_path, sweep=sweep, compute={"trials_per_actor": 3})
    status, output = strata("sweep", config, timeout=300)
    assert status == 0, output
    stopped = {
        name.rpartition("-")[2]: result["stopped_at"]
        for name, result in results(tmp_path / "runs" / "small").items()
        if name.startswith("g0-")
    }
    assert stopped["lr1e+30"] == 1
    assert sorted(end is None for end in stopped.values()) == [False, False, True]
