"""The main job from start to finish, by the command that a user gives."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.run_directory import read_json
from storage.activations import ActivationStore
from tests.runs import ROOT, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="session")
def run_dir(finished: tuple[Path, str]) -> Path:
    return finished[0].parent / "runs" / "small"


@pytest.fixture(scope="session")
def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def own(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and directory of a copy that this file may work on: `finished` is everyone's."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(finished[0].parent / "runs", folder / "runs")
    uri = f"sqlite:///{folder / 'other.db'}"
    config = write_config(folder, tracking={"uri": uri})
    status, output = strata("run", config)
    assert status == 0, output
    return config, folder / "runs" / "small"


def test_the_summary_has_every_field_and_sound_figures(summary: dict[str, Any]):
    assert summary["n_layers"] == 8
    assert 0 < summary["amad"] < 0.5
    assert summary["n_trials"] == 4
    assert set(summary["stage_seconds"]) == {
        *("pack", "harvest_pilot", "group", "harvest_train", "count_rows", "sweep", "evaluate")
    }
    assert [layer for g in summary["groups"] for layer in g["layers"]] == list(range(7))
    dense_fvu_of_nothing = 1.0
    for group in summary["groups"]:
        best = group["best"]
        assert {"trial", "encoder", "h", "m", "n", "k", "selection", "n_parameters"} <= set(best)
        assert 0 < best["fvu"] < dense_fvu_of_nothing
        assert 4 < best["l0"] < 16
        assert 0 <= best["dead_fraction"] < 1
        assert set(best["ce_recovered"]) == {str(layer) for layer in group["layers"]}
        assert all(0.3 < value < 1 for value in best["ce_recovered"].values())
        assert best["trial"] in group["front"]


def test_the_fronts_are_in_a_file_of_their_own_and_in_mlflow(
    run_dir: Path, summary: dict[str, Any], tmp_path: Path
):
    pareto = json.loads((run_dir / "pareto.json").read_text())
    assert len(pareto["groups"]) == len(summary["groups"])
    for group, of in zip(pareto["groups"], summary["groups"], strict=True):
        assert [point["trial"] for point in group["front"]] == of["front"]
        for point in group["front"]:
            result = read_json(run_dir / "trials" / point["trial"] / "result.json")
            assert {aim: point[aim] for aim in pareto["minimised"]} == {
                aim: result[aim] for aim in pareto["minimised"]
            }
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    kept = client.download_artifacts(
        summary["mlflow"]["parent_run_id"], "pareto.json", str(tmp_path)
    )
    assert json.loads(Path(kept).read_text()) == pareto


def test_what_was_dropped_is_counted_told_and_in_mlflow(
    finished: tuple[Path, str], run_dir: Path, summary: dict[str, Any]
):
    counts = read_json(run_dir / "rows.json")
    assert list(counts) == ["groups/0", "groups/1"]
    for count in counts.values():
        reasons = ("special_tokens", "first_positions", "massive_norms")
        assert count["stored"] == count["used"] + sum(count[reason] for reason in reasons)
        assert count["special_tokens"] > 0
    used, stored = (sum(c[key] for c in counts.values()) for key in ("used", "stored"))
    assert f"hygiene   {used:,} of {stored:,} rows are used" in finished[1]
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    metrics = client.get_run(summary["mlflow"]["parent_run_id"]).data.metrics
    assert (metrics["rows_used"], metrics["rows_stored"]) == (used, stored)


def test_all_its_stores_say_what_they_are_made_of(run_dir: Path):
    stores = ("pilot", "validation", "train")
    [source] = {ActivationStore.open(run_dir / f"{name}.zarr").spec.source for name in stores}
    assert len(source) == 16


def test_a_person_sees_the_stages_the_table_and_where_to_look(
    finished: tuple[Path, str], run_dir: Path
):
    _, output = finished
    for text in (
        "harvest   pilot",
        "limited by the",
        "group     2 groups",
        "sweep     4 trials",
        "Winners",
        "Pareto front",
        "encoder FLOPs per token",
        "CE recovered",
        f"Run:    {run_dir}",
        f"MLflow: strata ui {run_dir}",
    ):
        assert text in output, output
    assert "Traceback" not in output


def test_the_same_command_again_only_prints_the_result(own: tuple[Path, Path]):
    config, run_dir = own

    def stamps() -> dict[Path, int]:
        files = (file for file in run_dir.rglob("*") if file.is_file() and file.name != "lock")
        return {file: file.stat().st_mtime_ns for file in files}

    before = stamps()
    status, output = strata("run", config)
    assert status == 0
    assert "Winners" in output
    assert "harvest " not in output
    assert stamps() == before


def test_a_finished_run_is_told_to_another_server_that_is_named_later(own: tuple[Path, Path]):
    client = MlflowClient(f"sqlite:///{own[0].parent / 'other.db'}")
    told = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted(run.data.tags["kind"] for run in told) == ["run", *["stage"] * 7, *["trial"] * 4]
    assert all(run.data.metrics["peak_lr"] == 1e-3 for run in told if "k" in run.data.params)


def test_mlflow_has_the_run_its_stages_its_trials_and_their_curves(
    run_dir: Path, summary: dict[str, Any]
):
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    parent = client.get_run(summary["mlflow"]["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["n_groups"] == 2
    assert parent.data.tags["corpus"] == "stdlib"
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", parent.data.tags["git_revision"])
    for group in summary["groups"]:
        version = client.get_model_version_by_alias(f"test-g{group['id']}", "best")
        assert version.tags["trial"] == group["best"]["trial"]
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {run.info.status for run in children} == {"FINISHED"}
    kinds = sorted(run.data.tags["kind"] for run in children)
    assert kinds == ["stage"] * 7 + ["trial"] * 4
    stages = {run.info.run_name: run for run in children if run.data.tags["kind"] == "stage"}
    assert {name: run.data.metrics["seconds"] for name, run in stages.items()} == (
        summary["stage_seconds"]
    )
    trials = [run for run in children if run.data.tags["kind"] == "trial"]
    for trial in trials:
        result = read_json(run_dir / "trials" / trial.info.run_name / "result.json")
        assert trial.data.params["k"] == "8"
        assert trial.data.params["d_sae"] == "256"
        assert trial.data.params["lr"] == "0.001"
        assert trial.data.params["prefixes"] == "[]"
        assert trial.data.params["auxk_coefficient"] == "0.03125"
        assert trial.data.metrics["final_fvu"] == pytest.approx(result["fvu"])
        steps = [m.step for m in client.get_metric_history(trial.info.run_id, "fvu")]
        assert len(steps) >= 10
        assert sorted(set(steps)) == sorted(steps)
        assert {a.path for a in client.list_artifacts(trial.info.run_id)} == {"sae"}
    told = {a.path for a in client.list_artifacts(parent.info.run_id, "figures")}
    assert told - {"figures/load.png"} == {  # the load is only drawn of a run that took a minute
        *("figures/distances.png", "figures/dendrogram.png", "figures/amad.png"),
        *("figures/fvu_against_l0.png", "figures/pareto.html", "figures/training_curves.png"),
        *("figures/fidelity.png", "figures/latent_frequencies.png", "figures/cost.png"),
        *("figures/dead_latents.png", "figures/stage_seconds.png"),
    }


def test_the_report_holds_every_figure_and_can_be_written_again(own: tuple[Path, Path]):
    config, run_dir = own
    page = run_dir / "report" / "index.html"
    text = page.read_text()
    assert len(re.findall('<img src="data:image/(png|svg[+]xml);base64,', text)) in (9, 10)
    assert text.count('id="pareto"') == text.count('id="parallel"') == 1
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=.?http", text)
    assert len(text) < 10e6
    page.unlink()
    status, output = strata("report", config)
    assert status == 0, output
    assert page.read_text() == text


def test_runs_lists_the_run(run_dir: Path):
    status, output = strata("runs", run_dir)
    assert status == 0, output
    assert "finished" in output
    assert "test" in output


def test_another_configuration_for_the_same_directory_is_refused(own: tuple[Path, Path]):
    config, run_dir = own
    before = (run_dir / "summary.json").read_bytes()
    status, output = strata("run", config, "--set", "sweep.k=[8,16]")
    assert status == 2
    assert "sweep.k: [8] there, [8, 16] now" in output
    assert "Traceback" not in output
    assert (run_dir / "summary.json").read_bytes() == before


def test_a_winner_whose_autoencoder_was_deleted_is_trained_again_and_told(
    own: tuple[Path, Path], run_dir: Path, summary: dict[str, Any]
):
    config, mine = own
    name = summary["groups"][0]["best"]["trial"]
    shutil.rmtree(mine / "trials" / name / "sae")
    status, output = strata("run", config)
    assert status == 0, output
    weights = Path("trials", name, "sae", "sae.safetensors")
    assert (mine / weights).read_bytes() == (run_dir / weights).read_bytes()
    client = MlflowClient(f"sqlite:///{config.parent / 'other.db'}")
    told = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(told) == 12
    assert {run.info.status for run in told} == {"FINISHED"}
