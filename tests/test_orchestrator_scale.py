"""The model of large runs: it agrees with stores that are written, and the document agrees with it."""

from pathlib import Path

import pytest

from actors.language_model import describe
from benchmarks.scale_model import DOC, GPUS, MODELS, TOKENS, figures, modelled, written
from orchestrator import config_file
from orchestrator.__main__ import main
from orchestrator.pages.scale_page import cells
from orchestrator.planning.plan import plan
from orchestrator.planning.scale import Hardware, Scale, StageLoad, scale
from tests.runs import write_config


def of(found: Scale, name: str) -> StageLoad:
    [stage] = [stage for stage in found.stages if stage.name == name]
    return stage


def small(folder: Path, **hardware: float) -> Scale:
    cfg = config_file.load(write_config(folder))
    shape = describe(cfg.model)
    return scale(cfg, shape, plan(cfg, shape), Hardware(**hardware))


def test_the_document_has_the_figures_that_the_code_gives():
    text = DOC.read_text()
    assert written(text) == figures()
    assert all(f"### {model}, {tokens} tokens" in text for model in MODELS for tokens in TOKENS)
    for number in ("990", "80 GB at 2 TB/s", "3,500 PUT and 5,500 GET", "1.5 GB/s", f"{GPUS} GPUs"):
        assert number in text


def test_objects_that_are_written_are_those_of_a_store(finished: tuple[Path, str], tmp_path: Path):
    found = small(tmp_path)
    run = finished[0].parent / "runs" / "small"
    for stage, stores in {
        "harvest pilot": ("pilot", "validation"),
        "harvest train": ("train",),
    }.items():
        files = [f for name in stores for f in (run / f"{name}.zarr").rglob("*") if f.is_file()]
        objects = [file for file in files if file.name != "zarr.json"]
        load = of(found, stage)
        assert load.puts == len(objects)
        assert load.written == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
        assert load.results == len([file for file in objects if file.parent.name == "commits"])


def test_more_gpus_shorten_what_they_do_until_something_else_limits(tmp_path: Path):
    few, more, most = (small(tmp_path, gpus=n, gpu_flops=1e9) for n in (1, 2, 10**9))
    for stage in ("harvest train", "evaluate"):
        one, two = of(few, stage), of(more, stage)
        assert one.limit == "GPUs"
        assert two.hours == pytest.approx(one.hours / 2)
        assert of(most, stage).limit != "GPUs"
    assert of(most, "sweep").limit == "too few trials for the GPUs"
    assert of(few, "pack").hours == of(most, "pack").hours
    assert few.dollars()["GPUs"] > 0


def test_a_model_larger_than_a_gpu_takes_turns_on_several(tmp_path: Path):
    large = modelled(tmp_path, "Llama-3-70B", 10**9)
    assert large.gpus_per_harvester == 2
    little = modelled(tmp_path, "Llama-3-8B", 10**9)
    assert little.gpus_per_harvester == 1
    hours = of(large, "harvest train").hours / of(little, "harvest train").hours
    assert 12 < hours < 24  # 8 to 9 times the FLOPs, at half the speed


def test_the_plan_prints_the_same_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan", str(write_config(tmp_path)), "--gpus", "64"]) == 0
    printed = capsys.readouterr().out
    for row in cells(small(tmp_path, gpus=64)):
        assert all(cell in printed for cell in row)
    assert not (tmp_path / "runs").exists()
    assert main(["plan", str(write_config(tmp_path)), "--gpus", "0"]) == 2
    assert "--gpus 0: a cluster has 1 GPU or more" in capsys.readouterr().err
