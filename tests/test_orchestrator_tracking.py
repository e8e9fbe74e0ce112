"""What MLflow is told by one run and by several, once however often it is told."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.tracking.journal import Journal
from orchestrator.tracking.queries import find
from orchestrator.tracking.system_metrics import SystemMetrics
from orchestrator.tracking.tracker import NUMBERS, Tracker
from storage.files import read_json_lines
from tests.runs import ROOT, write_config

Result = dict[str, Any]


@pytest.fixture
def run(finished: tuple[Path, str], tmp_path: Path) -> RunDirectory:
    """A run of its own with the trials of a finished one, beside a store that has that one already."""
    there = finished[0].parent / "runs"
    cfg = config_file.load(write_config(tmp_path))
    directory = RunDirectory.of(cfg)
    shutil.copytree(there / "small" / "trials", directory.trials)
    shutil.copytree(there / "small" / "evaluations", directory.evaluations)
    for receipt in directory.trials.glob("*/mlflow.json"):
        receipt.unlink()
    directory.config.write_text(config_file.dump(cfg))
    shutil.copy(there / "mlflow.db", tmp_path / "runs")
    return directory


def config(run: RunDirectory) -> RunConfig:
    return config_file.load(run.path)


def tracker(run: RunDirectory) -> Tracker:
    return Tracker(config(run), run, Console(quiet=True))


def results(run: RunDirectory) -> list[Result]:
    return [read_json(file) for file in sorted(run.trials.glob("*/result.json"))]


def children(client: MlflowClient, told: Tracker) -> dict[str, Any]:
    parent = client.get_run(told.identity()["parent_run_id"])
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len({child.info.run_name for child in found}) == len(found), "told twice"
    return {str(child.info.run_name): child for child in found}


@pytest.mark.ray
def test_steps_that_a_killed_trainer_repeats_are_told_once(run: RunDirectory):
    result = results(run)[0]
    file = run.trials / result["trial"] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    half = len(rows) // 2

    def write(some: list[dict[str, Any]]) -> None:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in some))

    first = tracker(run)
    write(rows[: half + 2])
    first.metrics({"amad": 0.25})
    first.stage("group", {"shards": 3}, {"amad": 0.25})
    first.trial_progress(result, file)
    first.finish("KILLED")
    client = MlflowClient(first.uri)
    assert children(client, first)[result["trial"]].info.status == "KILLED"

    repeated = [{**row, "timestamp_ms": row["timestamp_ms"] + 10**6} for row in rows[half:]]
    write(rows[:half] + repeated)
    second = tracker(run)
    second.metrics({"amad": 0.25})
    second.stage("group", {"shards": 1}, {"amad": 0.25})  # another value of a parameter: no fault
    second.trial_result(result, result)
    second.trial_result(result, result)
    second.finish("FINISHED")
    assert second.complete

    assert second.identity() == first.identity()
    told = children(client, second)
    assert set(told) == {"group", result["trial"]}
    assert {child.info.status for child in told.values()} == {"FINISHED"}
    for metric in ("fvu", "tokens_per_second"):
        points = client.get_metric_history(told[result["trial"]].info.run_id, metric)
        assert [point.step for point in points] == [row["step"] for row in rows]
    once = [
        *(
            (told[result["trial"]].info.run_id, name)
            for name in ("final_fvu", "encoder_parameters")
        ),
        *(
            (run_id, "amad")
            for run_id in (told["group"].info.run_id, second.identity()["parent_run_id"])
        ),
    ]
    for run_id, metric in once:
        assert len(client.get_metric_history(run_id, metric)) == 1, metric
    told_numbers = told[result["trial"]].data.metrics
    for key in NUMBERS:
        if result[key] is not None:
            assert told_numbers[key] == pytest.approx(result[key])


@pytest.mark.ray
def test_a_trial_that_a_killed_driver_left_running_ends_as_the_run_that_goes_on_does(
    run: RunDirectory,
):
    result = results(run)[0]
    killed = tracker(run)
    killed.trial_progress(result, run.trials / result["trial"] / "metrics.jsonl")
    killed.stage("group", {}, {"amad": 0.25})
    client = MlflowClient(killed.uri)
    assert children(client, killed)[result["trial"]].info.status == "RUNNING"
    tracker(run).finish("FAILED")  # before that trial reported
    ended = {name: child.info.status for name, child in children(client, killed).items()}
    assert ended == {"group": "FINISHED", result["trial"]: "FAILED"}


@pytest.mark.ray
def test_a_run_directory_that_was_moved_is_found_by_its_new_name(run: RunDirectory):
    result = results(run)[0]
    first = tracker(run)
    first.trial_result(result, result)
    first.finish("SCHEDULED")
    new = run.path.rename(run.path.with_name("elsewhere"))
    assert [trial["tags"]["run_dir"] for trial in find(first.uri, "trial", None, new)] == [
        str(run.path)
    ]
    moved = config_file.load(new)
    Tracker(moved, RunDirectory.of(moved), Console(quiet=True)).finish("SCHEDULED")
    assert [trial["tags"]["run_dir"] for trial in find(first.uri, "trial", None, new)] == [str(new)]
    assert find(first.uri, "trial", None, run.path) == []


@pytest.mark.ray
def test_a_copy_of_a_run_directory_is_a_run_of_its_own(run: RunDirectory):
    first = tracker(run)
    first.finish("SCHEDULED")
    copied = config_file.load(shutil.copytree(run.path, run.path.with_name("copy")))
    for _ in range(2):
        copy = Tracker(copied, RunDirectory.of(copied), Console(quiet=True))
        copy.finish("SCHEDULED")
    client = MlflowClient(first.uri)
    assert client.get_run(parent(first)).data.tags["run_dir"] == str(run.path)
    assert client.get_run(parent(copy)).data.tags["run_dir"] == str(copied.run_dir)
    assert parent(tracker(run)) == parent(first) != parent(copy)
    again = shutil.copytree(run.path, run.path.with_name("again"))
    before = (again / "mlflow.json").read_bytes()
    find(first.uri, "trial", None, again)
    assert (again / "mlflow.json").read_bytes() == before


def parent(told: Tracker) -> str:
    return told.identity()["parent_run_id"]


@pytest.mark.ray
def test_the_best_of_a_group_has_one_version_and_the_alias_follows(run: RunDirectory):
    told = tracker(run)
    a, b = (result for result in results(run) if result["group"] == 0)
    for result in (a, b):
        told.trial_result(result, result)

    def winner(result: Result) -> None:
        entry = {**result, "ce_recovered": {}}
        told.winners([{"id": 0, "layers": [0, 1], "best": entry, "winners": [entry]}])

    client = MlflowClient(told.uri)
    versions: list[str] = []
    for best in (a, a, b, b, a):
        winner(best)
        told.finish("FINISHED")
        version = client.get_model_version_by_alias("test-g0", "best")
        assert version.tags["trial"] == best["trial"]
        assert version.tags["run_dir"] == str(run.path)
        assert (Path(version.source.removeprefix("file://")) / "sae.safetensors").is_file()
        versions.append(version.version)
    assert versions[0] == versions[1] == versions[4]
    assert versions[2] == versions[3] != versions[0]


TELL = """
import json, sys
from pathlib import Path
from rich.console import Console
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory
from orchestrator.tracking.tracker import Tracker

cfg = config_file.load(Path(sys.argv[1]))
run = RunDirectory.of(cfg)
tracker = Tracker(cfg, run, Console(quiet=True))
for copy in range(10):
    for file in sorted(run.trials.glob("*/result.json")):
        result = json.loads(file.read_text())
        settings = {**result, "trial": f"{result['trial']}-{copy}"}
        tracker.trial_progress(settings, file.parent / "metrics.jsonl")
tracker.finish("FINISHED")
assert tracker.complete
print(tracker.identity()["parent_run_id"])
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.crash
def test_two_runs_tell_one_sqlite_file_at_once(run: RunDirectory):
    other = run.path.parent / "other"
    shutil.copytree(run.path, other)
    (other / "config.yaml").write_text(
        config_file.dump(config(run)).replace(str(run.path), str(other))
    )
    speakers = [
        subprocess.Popen(
            [sys.executable, "-c", TELL, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in (run.path, other)
    ]
    ended = [speaker.communicate(timeout=200) for speaker in speakers]
    assert [speaker.returncode for speaker in speakers] == [0, 0], ended
    client = MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    trials = [
        child.data.tags["mlflow.parentRunId"]
        for output, _ in ended
        for child in client.search_runs(
            [experiment.experiment_id],
            f"tags.`mlflow.parentRunId` = '{output.strip()}' and metrics.fvu > 0",
        )
    ]
    assert sorted(Counter(trials).values()) == [40, 40]


@pytest.mark.ray
def test_an_experiment_that_was_deleted_is_refused(run: RunDirectory):
    client = MlflowClient(f"sqlite:///{run.path.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="name: the experiment test was deleted") as refusal:
        tracker(run)
    assert f"mlflow experiments restore -x {experiment.experiment_id}" in str(refusal.value)


def test_a_figure_keeps_its_time_until_it_changes(tmp_path: Path):
    file = tmp_path / "mlflow.json"
    first = Journal(file)
    entry = first.note_stage("group", {"method": "complete"}, {"amad": 0.25})
    rows = first.note_metrics({"n_groups": 2.0})
    again = Journal(file)
    assert again.key == first.key
    assert again.note_stage("group", {"method": "complete"}, {"amad": 0.25}) == entry
    assert again.note_metrics({"n_groups": 2.0}) == rows == again.metrics
    changed = again.note_metrics({"n_groups": 3.0})
    assert changed[0]["n_groups"] == 3.0
    assert changed[0]["timestamp_ms"] >= rows[0]["timestamp_ms"]
    assert Journal(tmp_path / "other.json").key != first.key


def test_a_journal_whose_first_place_is_gone_or_unknown_keeps_its_key(tmp_path: Path):
    first = tmp_path / "first"
    first.mkdir()
    key = Journal(first / "mlflow.json").key
    unknown = Journal(first / "mlflow.json")  # as of older versions: no place is noted yet
    unknown.settle()
    assert unknown.key == key
    moved = Journal(first.rename(tmp_path / "moved") / "mlflow.json")
    moved.settle()
    assert (moved.key, Journal(tmp_path / "moved/mlflow.json").key) == (key, key)


def test_a_journal_by_another_name_of_its_folder_keeps_its_key_and_a_copy_does_not(tmp_path: Path):
    first = tmp_path / "first"
    first.mkdir()
    journal = Journal(first / "mlflow.json")
    journal.settle()
    (tmp_path / "link").symlink_to(first)
    linked = Journal(tmp_path / "link" / "mlflow.json")
    linked.settle()
    assert linked.key == journal.key
    copy = Journal(shutil.copytree(first, tmp_path / "copy") / "mlflow.json")
    copy.settle()
    assert copy.key != journal.key
    shutil.copytree(first, tmp_path / "another")
    (tmp_path / "link").unlink()
    (first / "mlflow.json").write_text("{")
    beside_damage = Journal(tmp_path / "another" / "mlflow.json")
    beside_damage.settle()
    assert beside_damage.key == journal.key


def test_system_metrics_go_on_after_those_that_are_there(tmp_path: Path):
    file = tmp_path / "system_metrics.jsonl"
    told: list[int] = []
    for _ in range(2):
        sampler = SystemMetrics(file, lambda: told.append(len(read_json_lines(file))))
        sampler.stop()
        sampler.stop()
    assert told == [1, 2]
    rows = read_json_lines(file)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 <= row["system/cpu_utilization_percentage"] <= 100
        assert row["system/system_memory_usage_megabytes"] > 0
