"""The model of large runs: it agrees with stores that are written, and the document agrees with it."""

from itertools import islice
from pathlib import Path

import pytest

from actors.language_model import describe
from benchmarks.scale_model import DOC, GPUS, MODELS, TOKENS, modelled, tables, written
from orchestrator import config_file
from orchestrator.__main__ import main
from orchestrator.pages.scale_page import cells
from orchestrator.planning import requests
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import plan
from orchestrator.planning.scale import Scale, model_flops, scale
from orchestrator.planning.stage_load import StageLoad
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.hygiene import Hygiene, RowFilter
from tests.object_server import BUCKET, counted, object_server, use
from tests.runs import write_config
from tests.stores import filled_store, small_spec


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Scale]:
    return modelled()


def of(found: Scale, name: str) -> StageLoad:
    [stage] = [stage for stage in found.stages if stage.name == name]
    return stage


def small(folder: Path, **hardware: float) -> Scale:
    cfg = config_file.load(write_config(folder))
    shape = describe(cfg.model)
    figures = plan(cfg, shape)
    return scale(cfg, shape, figures, model_flops(cfg, shape, figures), Hardware(**hardware))


def test_the_document_has_the_figures_that_the_code_gives(runs: dict[tuple[str, str], Scale]):
    text = DOC.read_text()
    assert written(text) == tables(runs)
    assert all(f"### {model}, {tokens} tokens" in text for model in MODELS for tokens in TOKENS)
    for number in ("990", "80 GB at 2 TB/s", "3,500 PUT and 5,500 GET", "1.4 GB/s", f"{GPUS} GPUs"):
        assert number in text


def test_what_the_document_says_limits_is_what_limits(runs: dict[tuple[str, str], Scale]):
    found = {model: runs[model, "10 B"] for model in MODELS}
    limits = {m: {stage.name: stage.limit for stage in s.stages} for m, s in found.items()}
    assert limits["Llama-3-8B"]["harvest train"] == limits["Llama-3-8B"]["sweep"] == "requests"
    assert limits["Llama-3-70B"]["harvest train"] == "GPUs"
    assert limits["Llama-3-70B"]["sweep"] == "too few trials for the GPUs"
    sweep = of(found["Llama-3-8B"], "sweep").seconds
    assert sweep["requests"] > sweep["reading"] > sweep["GPUs"]
    assert found["Llama-3-70B"].gpus_per_harvester == 2
    assert found["Llama-3-8B"].gpus_per_harvester == 1
    for stage in (stage for s in found.values() for stage in s.stages):
        assert stage.seconds.get("head node", 0.0) < stage.hours * 3600 / 5
        assert stage.seconds.get("MLflow", 0.0) < stage.hours * 3600 / 20


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


def test_a_reader_sends_as_many_requests_as_are_counted(monkeypatch: pytest.MonkeyPatch):
    spec = small_spec(
        groups=((0, 2), (1,)),
        n_population=300,
        n_sequences=192,
        sequences_per_chunk=2,
        chunks_per_shard=6,
    )
    where, ahead = f"s3://{BUCKET}/counted.zarr", 8
    everything = RowFilter(Hygiene(), (), dict.fromkeys(range(3), 1e9))
    with object_server() as endpoint, counted(endpoint) as (proxy, asked):
        use(monkeypatch, proxy)
        filled_store(where, spec)  # pyright: ignore[reportArgumentType]
        store, before = ActivationStore.open(where), len(asked)
        batches = ShuffledBatches(store, "groups/0", everything, 32, window_chunks=ahead, seed=0)
        for _ in islice(batches.batches(Cursor()), batches.batches_per_epoch):
            pass
    found, counts = len(asked) - before, requests.array_gets(spec, spec.n_rows)
    assert counts == 96 + 16 * (3 + 2 + 2)
    # At the end of an epoch two windows of the next are under way; and metadata is read once.
    assert counts <= found <= counts + 2 * ahead + 8


def test_ranks_and_shares_of_gpus_change_what_a_sweep_asks(tmp_path: Path):
    """Against the same sweep with a GPU for each trial, on more GPUs than trials."""

    def sweep(link: float = 1e30, **compute: float) -> StageLoad:
        cfg = config_file.load(write_config(tmp_path, compute={"cpus": 2, **compute}))
        shape = describe(cfg.model)
        figures = plan(cfg, shape)
        hardware = Hardware(gpus=1000, link_bytes_per_second=link)
        return of(scale(cfg, shape, figures, 1.0, hardware), "sweep")

    one, two, quarter = sweep(), sweep(ranks_per_trial=2), sweep(gpus_per_trial=0.25)
    assert (two.read, two.gets) == (2 * one.read, 2 * one.gets)
    term = "too few trials for the GPUs"
    assert two.seconds[term] == pytest.approx(one.seconds[term] / 2)
    assert sweep(1e9, ranks_per_trial=2).seconds[term] > two.seconds[term], "they also exchange"
    assert quarter.seconds[term] > 3 * one.seconds[term]


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


def test_the_plan_prints_the_same_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan", str(write_config(tmp_path)), "--gpus", "64"]) == 0
    printed = capsys.readouterr().out
    for row in cells(small(tmp_path, gpus=64)):
        assert all(cell in printed for cell in row)
    assert not (tmp_path / "runs").exists()
    assert main(["plan", str(write_config(tmp_path)), "--gpus", "0"]) == 2
    assert "--gpus 0: a cluster has 1 GPU or more" in capsys.readouterr().err
