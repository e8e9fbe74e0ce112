"""The ten questions of docs/mlflow.md, asked of a finished run as they stand there."""

import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.__main__ import main
from orchestrator.run_directory import read_json
from tests.runs import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEXT = (ROOT / "docs" / "mlflow.md").read_text()
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
QUESTIONS = {
    int(number): text
    for number, text in re.findall(r"^### (\d+)\. (.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
N_TRIALS = 4

Results = dict[str, dict[str, Any]]
Names = dict[str, Any]


@pytest.fixture(scope="module")
def folder(finished: tuple[Path, str]) -> Path:
    return finished[0].parent


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    files = sorted((folder / "runs" / "small" / "trials").glob("*/result.json"))
    found = [read_json(file) for file in files]
    assert len(found) == N_TRIALS
    return {result["trial"]: result for result in found}


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "small" / "summary.json").read_text())


def as_here(code: str) -> str:
    """The document's run and experiment are those of the finished run."""
    code = code.replace("runs/mine", "runs/small").replace("strata-g0", "test-g0")
    return code.replace('"strata"', '"test"')


@pytest.fixture
def asked(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[int], Any]:
    """Does what stands under a question: what a command prints, or the names that Python has then."""
    monkeypatch.chdir(folder)

    def answer(number: int) -> Any:
        ((language, block),) = BLOCK.findall(QUESTIONS[number])
        if language == "bash":
            strata, *arguments = shlex.split(as_here(block))
            assert strata == "strata"
            assert main(arguments) == 0
            return capsys.readouterr().out
        ((_, once),) = BLOCK.findall(TEXT[: TEXT.index("### 1.")])
        script = tmp_path / "question.py"
        script.write_text(as_here(once + block))
        return runpy.run_path(str(script))

    return answer


def test_there_are_ten_questions_each_with_its_search():
    assert list(QUESTIONS) == list(range(1, 11))
    assert all(len(BLOCK.findall(text)) == 1 for text in QUESTIONS.values())


def test_1_which_runs_there_are(asked: Callable[[int], str]):
    row = next(line for line in asked(1).splitlines() if " finished " in line)
    assert re.search(r"finished.* 2 .* 4 .*0\.\d{4}.*0\.\d{4}", row), row


def test_2_trials_best_of_each_group_first(asked: Callable[[int], str], results: Results):
    listed = [name for name in re.findall(r"g\d-k8-\S+", asked(2)) if name in results]
    assert listed == sorted(
        results, key=lambda name: (results[name]["group"], results[name]["fvu"])
    )


def test_3_kronecker_trials_at_one_k(asked: Callable[[int], str], results: Results):
    listed = set(re.findall(r"g\d-k8-\S+", asked(3)))
    assert listed == {name for name, result in results.items() if result["encoder"] == "kron"}
    assert len(listed) == 2


def test_4_good_and_small(asked: Callable[[int], str], results: Results):
    found = {trial["name"]: trial for trial in json.loads(asked(4))}
    assert set(found) == {
        name
        for name, result in results.items()
        if result["fvu"] < 0.9 and result["encoder_parameters"] < 30_000
    }
    assert 0 < len(found) < N_TRIALS
    for name, trial in found.items():
        assert trial["metrics"]["final_fvu"] == pytest.approx(results[name]["fvu"])
        assert trial["params"]["d_sae"] == "256"


def test_5_how_the_best_trial_learned(asked: Callable[[int], Names], results: Results):
    names = asked(5)
    of_group = [result for result in results.values() if result["group"] == 0]
    assert names["best"].info.run_name == min(of_group, key=lambda result: result["fvu"])["trial"]
    steps, fvus = zip(*names["curve"], strict=True)
    assert list(steps) == sorted(set(steps))
    assert fvus[-1] < fvus[0]


def test_6_waiting_and_pace(asked: Callable[[int], Names], results: Results):
    pace = asked(6)["pace"]
    assert set(pace) == set(results)
    for name, (waited, rate) in pace.items():
        assert waited == pytest.approx(results[name]["data_wait_fraction"])
        assert rate > 0


def test_7_which_layer_a_winner_serves_worst(
    asked: Callable[[int], Names], summary: dict[str, Any]
):
    recovered = {g["best"]["trial"]: g["best"]["ce_recovered"] for g in summary["groups"]}
    names = asked(7)
    assert names["recovered"] == {
        trial: pytest.approx(layers) for trial, layers in recovered.items()
    }
    assert names["worst"] == {
        trial: min(layers, key=lambda layer: layers[layer]) for trial, layers in recovered.items()
    }


def test_8_what_else_has_the_same_configuration(
    asked: Callable[[int], Names], summary: dict[str, Any]
):
    names = asked(8)
    assert [run.info.run_id for run in names["alike"]] == [summary["mlflow"]["parent_run_id"]]
    assert re.fullmatch("[0-9a-f]{16}", names["mine"].data.tags["config_hash"])


def test_9_what_the_machine_did(asked: Callable[[int], Names]):
    load = asked(9)["load"]
    assert all(0 < value <= 100 for value in load["cpu_utilization_percentage"])
    assert len(load["cpu_utilization_percentage"]) >= 1
    assert min(load["system_memory_usage_megabytes"]) > 0


def test_10_the_best_of_a_group_can_be_used(asked: Callable[[int], Names], summary: dict[str, Any]):
    names = asked(10)
    assert names["facts"]["trial"] == summary["groups"][0]["best"]["trial"]
    x, layers = torch.randn(5, 128), torch.full((5,), summary["groups"][0]["layers"][0])
    assert names["autoencoder"].reconstruct(x, layers).x_hat.shape == x.shape
