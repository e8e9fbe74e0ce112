"""A driver killed in the middle of each stage: the same command finishes, with the same results."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.runs import kill_when, start, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in sorted(folder.glob(pattern))
    }


@pytest.mark.timeout(900)
def test_a_run_killed_in_harvest_sweep_and_evaluation_ends_like_an_unbroken_one(
    tmp_path: Path, finished: tuple[Path, str]
):
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "small"

    shards = "train.zarr/commits/*.json"
    kill_when(start("run", config), lambda: bool(stamps(run, shards)))
    harvested = stamps(run, shards)
    assert not (run / "trials").exists()

    results = "trials/*/result.json"
    output = kill_when(start("run", config), lambda: bool(stamps(run, results)))
    assert "shards are there already" in output
    trained = stamps(run, results)
    assert len(trained) < 4, "killed too late to show anything"

    evaluations = "evaluations/*/*.json"
    output = kill_when(start("run", config), lambda: bool(stamps(run, evaluations)))
    assert "trials are finished already" in output
    evaluated = stamps(run, evaluations)
    assert not (run / "summary.json").exists()

    status, output = strata("run", config)
    assert status == 0, output
    assert "evaluations are there already" in output
    for pattern, before in ((shards, harvested), (results, trained), (evaluations, evaluated)):
        after = stamps(run, pattern)
        assert {name: after[name] for name in before} == before, "done twice"

    unbroken_run = finished[0].parent / "runs" / "small"
    broken, unbroken = (json.loads((r / "summary.json").read_text()) for r in (run, unbroken_run))
    assert broken["groups"] == unbroken["groups"]
    for store in ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr"):
        assert contents(run / store) == contents(unbroken_run / store)
    weights = "trials/*/sae/sae.safetensors"
    for file in sorted(run.glob(weights)):
        assert file.read_bytes() == (unbroken_run / file.relative_to(run)).read_bytes(), file

    told_once(run, broken["mlflow"])


def told_once(run: Path, identity: dict[str, str]) -> None:
    """MLflow has every stage, trial, figure and step of the run, and none of them twice."""
    client = MlflowClient(identity["tracking_uri"])
    parent = client.get_run(identity["parent_run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    names = sorted(str(child.info.run_name) for child in children)
    trials = sorted(folder.name for folder in (run / "trials").iterdir())
    stages = ["pack", "harvest_pilot", "group", "harvest_train", "count_rows", "sweep", "evaluate"]
    assert names == sorted([*stages, *trials])
    assert {child.info.status for child in (parent, *children)} == {"FINISHED"}
    for child in children:
        if child.info.run_name in trials:
            rows = (run / "trials" / child.info.run_name / "metrics.jsonl").read_text().splitlines()
            told = client.get_metric_history(child.info.run_id, "fvu")
            assert [point.step for point in told] == [json.loads(row)["step"] for row in rows]
            assert len(client.get_metric_history(child.info.run_id, "final_fvu")) == 1
    for metric in ("rows_used", "amad", "n_trials"):
        assert len(client.get_metric_history(parent.info.run_id, metric)) == 1, metric
    steps = [
        point.step
        for point in client.get_metric_history(
            parent.info.run_id, "system/cpu_utilization_percentage"
        )
    ]
    assert steps == list(range(len(steps)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
