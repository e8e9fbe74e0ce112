"""`strata progressive` on a copy of a finished run: killed between files, continued, refused."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.__main__ import main
from orchestrator.pages.figures.progressive import mean_curves, progressive_figure
from orchestrator.run_directory import write_json
from tests.runs import kill_when, start, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ORDERS = {"energy", "frequency", "decoder", "random"}


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The directory of a copy of the finished run, but for its stores, which are linked."""
    there, run = finished[0].parent / "runs" / "small", tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    for part in there.iterdir():
        if part.name == "train.zarr" or part.name == "lock":
            continue
        if part.is_dir():
            shutil.copytree(part, run / part.name)
        else:
            shutil.copy(part, run)
    write_config(tmp_path)
    return run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = main(["progressive", *arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err
    return captured.err


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_what_a_kill_left_is_kept_and_the_rest_is_made(copied: Path):
    config = copied.parents[1] / "run.yaml"
    files = copied / "progressive"
    process = start("progressive", config, "--sequences", "2")
    kill_when(process, lambda: any(files.glob("*/layer-*.json")))
    left = {file: file.stat().st_mtime_ns for file in files.glob("*/*.json")}
    summary = json.loads((copied / "summary.json").read_text())
    expected = {
        files / winner["trial"] / f"layer-{layer}.json"
        for group in summary["groups"]
        for winner in group["winners"]
        for layer in group["layers"]
    }
    assert left.keys() < expected

    status, output = strata("progressive", config, "--sequences", "2")
    assert status == 0, output
    assert f"{len(left)} curves are there already, {len(expected) - len(left)} to go" in output
    assert set(files.glob("*/*")) == expected
    assert {file: file.stat().st_mtime_ns for file in left} == left
    for file in expected:
        report = json.loads(file.read_text())
        assert report["version"] == 1
        assert (report["trial"], f"layer-{report['layer']}.json") == (file.parent.name, file.name)
        assert set(report["curves"]) == ORDERS
        assert report["n_sequences"] == 2
        evaluated = json.loads((copied / "evaluations" / file.relative_to(files)).read_text())
        assert report["curves"]["random"][-1]["fvu"] == pytest.approx(evaluated["fvu"], rel=1e-9)
    assert "by E[act²]" in output
    assert "E[act²] ~ rank^-" in output
    for group in summary["groups"]:
        trial = group["best"]["trial"]
        assert f"{trial}: mean over layers {', '.join(map(str, group['layers']))}" in output
        reports = [json.loads(f.read_text()) for f in sorted((files / trial).iterdir())]
        half = sum(report["curves"]["energy"][-2]["fvu"] for report in reports) / len(reports)
        assert f" 128 │ {half:.3f} " in output

    client = MlflowClient(f"sqlite:///{copied.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    [parent] = client.search_runs([experiment.experiment_id], "tags.kind = 'run'")
    assert parent.info.status == "FINISHED"
    figures = {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    assert figures == {f"figures/progressive-{file.parent.name}.png" for file in expected}

    # Nothing is left to do, so nothing is started; but another number of sequences is another figure.
    stamps = {file: file.stat().st_mtime_ns for file in expected}
    status, output = strata("progressive", config, "--sequences", "2")
    assert (status, "0 to go" in output) == (0, True), output
    assert {file: file.stat().st_mtime_ns for file in expected} == stamps


def test_what_cannot_be_read_is_refused_before_anything_starts(
    copied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    config = str(copied.parents[1] / "run.yaml")
    assert "does not exist" in refused(capsys, str(tmp_path / "nowhere"))
    assert "--sequences 0: cross-entropy is over 1" in refused(capsys, config, "--sequences", "0")
    assert "belongs to another configuration" in refused(capsys, config, "--set", "seed=3")

    summary = json.loads((copied / "summary.json").read_text())
    trial = summary["groups"][0]["winners"][0]["trial"]
    weights = copied / "trials" / trial / "sae" / "sae.safetensors"
    weights.rename(weights.with_suffix(".away"))
    assert f"{weights.parent}: no autoencoder is there" in refused(capsys, config)
    weights.with_suffix(".away").rename(weights)

    (copied / "damage.json").write_text("{}")
    assert "found its stores damaged" in refused(capsys, config)
    (copied / "damage.json").unlink()

    write_json(copied / "summary.json", {**summary, "version": 2})
    assert "summary.json is of version 2; this Strata reads version 1" in refused(capsys, config)
    (copied / "summary.json").unlink()
    assert "holds no finished run" in refused(capsys, config)
    assert not (copied / "progressive").exists()


def test_a_run_that_never_began_is_refused_and_nothing_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert "holds no finished run" in refused(capsys, str(write_config(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


def point(size: int, fvu: float, ce: float | None) -> dict[str, float | None]:
    return {"size": size, "fvu": fvu, "l0": 1.0, "rsa": None, "ce": ce, "ce_recovered": ce}


def test_the_mean_counts_every_layer_the_same_and_what_a_layer_lacks_is_none():
    reports = [
        {"curves": {"random": [point(1, 0.2, 1.0), point(2, 0.1, 2.0)]}},
        {"curves": {"random": [point(1, 0.6, 3.0), point(2, 0.1, None)]}},
    ]
    assert mean_curves(reports) == {
        "random": [
            point(1, 0.4, 2.0),
            point(2, 0.1, None),
        ]
    }


def test_a_figure_of_an_encoder_has_no_cross_entropy_and_names_what_it_shows():
    law = {
        "factor": 1.0,
        "exponent": 1.0,
        "r_squared": 0.9,
        "exponential_r_squared": 0.8,
        "ranks": [1, 2, 3],
        "values": [1.0, 0.5, 0.3],
    }
    report = {
        "layer": 4,
        "n_tokens": None,
        "curves": {"energy": [point(1, 0.5, None)], "nested": [point(1, 0.4, None)]},
        "power_laws": {"energy": law, "frequency": None, "spectrum": law},
    }
    figure = progressive_figure("g0-k8", [report])
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "nested prefixes",
        "by E[act²]",
    ]
