"""The model of large runs: it agrees with stores that are written, and the document agrees with it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.grouper import Grouper, distances
from actors.language_model import describe
from benchmarks.scale_model import DOC, GPUS, MODELS, TOKENS, modelled, tables, written
from orchestrator import config_file
from orchestrator.__main__ import main
from orchestrator.pages.scale_page import cells, lines, number
from orchestrator.planning import requests
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import plan
from orchestrator.planning.scale import Scale, model_flops, scale
from orchestrator.planning.stage_load import StageLoad
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.tokens import TokenSpec, TokenStore, TokenWriter
from tests.object_server import BUCKET, counted, object_server, use
from tests.runs import write_config
from tests.stores import filled_store, small_spec


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Scale]:
    return modelled()


def of(found: Scale, name: str) -> StageLoad:
    [stage] = [stage for stage in found.stages if stage.name == name]
    return stage


def small(folder: Path, **hardware: Any) -> Scale:
    cfg = config_file.load(write_config(folder))
    shape = describe(cfg.model)
    figures = plan(cfg, shape)
    return scale(cfg, shape, figures, model_flops(cfg, shape, figures), Hardware(**hardware))


def test_the_document_has_the_figures_that_the_code_gives(runs: dict[tuple[str, str], Scale]):
    text = DOC.read_text()
    assert written(text) == tables(runs)
    assert all(f"### {model}, {tokens} tokens" in text for model in MODELS for tokens in TOKENS)
    for figure in ("990", "80 GB at 2 TB/s", "3,500 PUT and 5,500 GET", "1.4 GB/s", f"{GPUS} GPUs"):
        assert figure in text


def test_what_the_document_says_limits_is_what_limits(runs: dict[tuple[str, str], Scale]):
    found = {model: runs[model, "10 B"] for model in MODELS}
    limits = {m: {stage.name: stage.limit for stage in s.stages} for m, s in found.items()}
    assert limits["Llama-3-8B"]["harvest train"] == limits["Llama-3-8B"]["count rows"] == "requests"
    assert limits["Llama-3-70B"]["harvest train"] == "GPUs"
    assert {limits[model]["group"] for model in MODELS} == {"reading"}
    assert {limits[model]["sweep"] for model in MODELS} == {"reading"}
    sweep = of(found["Llama-3-8B"], "sweep").seconds
    assert sweep["reading"] > sweep["requests"] > sweep["too few trials for the GPUs"]
    assert found["Llama-3-70B"].gpus_per_harvester == 2
    assert found["Llama-3-8B"].gpus_per_harvester == 1
    for stage in (stage for s in found.values() for stage in s.stages):
        assert stage.seconds.get("head node", 0.0) < stage.hours * 3600 / 5
        assert stage.seconds.get("MLflow", 0.0) < stage.hours * 3600 / 20


def test_the_advice_of_the_document_is_what_the_code_gives():
    """The sweep of the 8B over 1 B tokens, with trials in the same process."""
    text = DOC.read_text()
    for together in (1, 2, 4):
        settings = {"trials_per_actor": together, "gpus_per_trial": 1 / together}
        [found] = modelled({"Llama-3-8B"}, {"1 B"}, **settings).values()
        hours, dollars = number(of(found, "sweep").hours), number(sum(found.dollars().values()))
        assert f"| {together} | {hours} | {of(found, 'sweep').limit} | {dollars} |" in text
        assert not found.doubts


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


@contextmanager
def stored(
    monkeypatch: pytest.MonkeyPatch, spec: StoreSpec
) -> Iterator[tuple[str, Callable[[], int]]]:
    """A full store in a bucket, and how many requests were sent since that was asked last."""
    where = f"s3://{BUCKET}/{spec.digest}.zarr"
    with object_server() as endpoint, counted(endpoint) as (proxy, asked):
        use(monkeypatch, proxy)
        filled_store(where, spec)  # pyright: ignore[reportArgumentType]

        def sent() -> int:
            n = len(asked)
            asked.clear()
            return n

        sent()
        yield where, sent


def read_an_epoch(store: ActivationStore, ahead: int) -> None:
    everything = RowFilter(Hygiene(), (), dict.fromkeys(range(3), 1e9))
    batches = ShuffledBatches(store, "groups/0", everything, 32, window_chunks=ahead, seed=0)
    for _ in islice(batches.batches(Cursor()), batches.batches_per_epoch):
        pass


GROUPED = small_spec(
    groups=((0, 2), (1,)),
    n_population=300,
    n_sequences=192,
    sequences_per_chunk=2,
    chunks_per_shard=6,
)


def test_a_reader_sends_as_many_requests_as_are_counted(monkeypatch: pytest.MonkeyPatch):
    ahead = 8
    with stored(monkeypatch, GROUPED) as (where, sent):
        read_an_epoch(ActivationStore.open(where), ahead)
        found, counts = sent(), requests.array_gets(GROUPED, GROUPED.n_rows)
    assert counts == 96 + 16 * (3 + 2 + 2)
    # At the end of an epoch two windows of the next are under way; and metadata is read once.
    assert counts <= found <= counts + 2 * ahead + 8


def test_readers_of_a_node_send_hardly_more_than_one(monkeypatch: pytest.MonkeyPatch):
    """Through a source that reads for all, as a node's keeper does."""
    ahead = 8
    with stored(monkeypatch, GROUPED) as (where, sent):
        keeper = ActivationStore.open(where)
        shared: Any = SimpleNamespace(
            chunk=cache(lambda array, n: keeper.read_stored(array, *GROUPED.chunk_range(n))),
            column=cache(lambda name, n: keeper.column(name, *GROUPED.shard_range(n))),
        )
        for _ in range(3):
            read_an_epoch(ActivationStore.open(where, shared=shared), ahead)
        found = sent()
    counts = requests.array_gets(GROUPED, GROUPED.n_rows)
    assert counts <= found <= counts + 2 * ahead + 3 * 8


@pytest.mark.parametrize("center", [False, True])
def test_comparing_layers_sends_as_many_requests_as_are_counted(
    monkeypatch: pytest.MonkeyPatch, center: bool
):
    spec = small_spec(n_population=300, n_sequences=192, sequences_per_chunk=2, chunks_per_shard=6)

    def work(arguments: tuple, method: str, jobs: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        grouper = Grouper(*arguments)
        return ((job, getattr(grouper, method)(*job)) for job in jobs)

    with stored(monkeypatch, spec) as (where, sent):
        medians = Grouper(where).median_norms()
        distances(where, None, medians, center, work)
        found = sent()
    read = (1 + center) * requests.array_gets(spec, spec.n_rows, 3)
    counts = read + requests.norm_gets(spec)
    # A row filter's columns are read with the norms, and metadata by each who opens the store.
    assert counts - 2 * spec.n_shards <= found <= counts + 40


def test_a_harvester_sends_as_many_requests_for_tokens_as_are_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    context, n = 1024, 8192  # two files of 256 chunks of 16 sequences
    spec = small_spec(n_population=n, n_sequences=320, sequences_per_chunk=4, chunks_per_shard=4)
    where = f"s3://{BUCKET}/tokens.zarr"
    with object_server() as endpoint, counted(endpoint) as (proxy, asked):
        use(monkeypatch, proxy)
        settings = TokenSpec(
            context=context, first_position=1, separator_id=0, special_ids=(0,), tokenizer="any"
        )
        writer = TokenWriter(where, settings, {"train": n})
        ids = np.ones((n, context), np.uint32)
        writer.append("train", ids, ids)
        writer.seal()
        asked.clear()
        tokens = TokenStore.open(where)
        opening = len(asked)
        for shard in range(spec.n_shards):
            tokens.ids("train", spec.sequences_of(shard))
        found = len(asked) - opening
    n_files = 2 * requests.token_files(n, context)
    assert n_files == 4
    assert n_files < opening <= n_files + 6
    assert found == pytest.approx(requests.token_gets(spec, context), rel=0.1)


def planned(folder: Path, link: float = 1e30, gpus: int = 1000, **compute: Any) -> Scale:
    """Of the small run, with `compute`."""
    cfg = config_file.load(write_config(folder, compute={"cpus": 2, **compute}))
    shape = describe(cfg.model)
    figures = plan(cfg, shape)
    hardware = Hardware(gpus=gpus, link_bytes_per_second=link, gpu_flops=1e9)
    return scale(cfg, shape, figures, 1e6, hardware)


def test_ranks_and_shares_of_gpus_change_what_a_sweep_asks(tmp_path: Path):
    """Against the same sweep with a GPU for each trial, on more GPUs than trials."""

    def sweep(link: float = 1e30, **compute: Any) -> StageLoad:
        return of(planned(tmp_path, link, **compute), "sweep")

    one, two, quarter = sweep(), sweep(ranks_per_trial=2), sweep(gpus_per_trial=0.25)
    assert two.read == one.read, "the ranks of a trial are on one node, which reads once"
    assert sweep(ranks_per_trial=16).read == 2 * one.read, "and these on two"
    term = "too few trials for the GPUs"
    assert two.seconds[term] == pytest.approx(one.seconds[term] / 2)
    assert sweep(1e9, ranks_per_trial=2).seconds[term] > two.seconds[term], "they also exchange"
    assert quarter.seconds[term] > 3 * one.seconds[term]


def test_trials_of_a_group_on_one_node_are_read_for_once(tmp_path: Path):
    """Four trials, two of each group, which Ray spreads over the nodes."""
    on_125, on_2, on_1 = (of(planned(tmp_path, gpus=n), "sweep") for n in (1000, 16, 8))
    one_by_one = of(planned(tmp_path, gpus=1), "sweep")
    assert on_125.read == on_2.read == one_by_one.read == 2 * on_1.read
    assert on_125.gets == 2 * on_1.gets
    # A node's keeper has so many requests at a time, whatever its GPUs are.
    assert on_2.seconds["reading"] == pytest.approx(on_1.seconds["reading"])
    assert on_125.seconds["reading"] == pytest.approx(on_1.seconds["reading"] / 2)


def test_gpus_that_take_turns_and_few_harvesters_take_longer(tmp_path: Path):
    def harvest(**compute: Any) -> StageLoad:
        return of(planned(tmp_path, gpus=2, **compute), "harvest train")

    one, turns = harvest(gpus_per_actor=1), harvest(gpus_per_actor=2)
    assert turns.seconds["GPUs"] == pytest.approx(2 * one.seconds["GPUs"])
    assert harvest(gpus_per_actor=0.5).seconds["GPUs"] == pytest.approx(one.seconds["GPUs"])
    thirds = (
        planned(tmp_path, gpus=16, gpus_per_actor=3),
        planned(tmp_path, gpus=4, gpus_per_actor=1),
    )
    in_fours = [of(found, "harvest train").seconds["GPUs"] for found in thirds]
    assert in_fours[0] == pytest.approx(in_fours[1]), "two on a node of eight"
    few = harvest(gpus_per_actor=1, harvesters=1)
    assert few.limit == "too few processes for the GPUs"
    assert few.seconds[few.limit] == pytest.approx(2 * one.seconds["GPUs"])
    all_of_it = planned(tmp_path, gpus=2, gpus_per_actor=2)
    assert of(all_of_it, "evaluate").seconds["GPUs"] == pytest.approx(
        2 * of(planned(tmp_path, gpus=2, gpus_per_actor=1), "evaluate").seconds["GPUs"]
    )


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        ({"gpus_per_actor": 1}, None),
        ({}, "compute.gpus_per_actor: 0 computes on the CPU, .* set it to 1"),
        ({"gpus_per_actor": 1, "gpus_per_trial": 0}, "compute.gpus_per_trial: 0 trains on the CPU"),
        ({"gpus_per_actor": 16}, "compute.gpus_per_actor: 16 is more than the 8 GPUs of a node"),
        (
            {"gpus_per_actor": 1, "ranks_per_trial": {"latents": 16, "batch": 8}},
            "compute.ranks_per_trial: the 128 ranks .* there are 64, .* --gpus 128",
        ),
        (
            {"gpus_per_actor": 1, "gpus_per_trial": 9},
            "compute.gpus_per_trial: 9 .* more than the 8 GPUs",
        ),
    ],
)
def test_what_no_run_would_do_is_told(tmp_path: Path, compute: dict, told: str | None):
    found = [line for line in lines(planned(tmp_path, gpus=64, **compute)) if "warning" in line]
    if told is None:
        assert not found
    else:
        assert re.match(f"warning: {told}", found[0])


def test_more_gpus_shorten_what_they_do_until_something_else_limits(tmp_path: Path):
    few, more, most = (small(tmp_path, gpus=n, gpu_flops=1e9) for n in (1, 2, 10**9))
    for stage in ("harvest train", "evaluate"):
        one, two = of(few, stage), of(more, stage)
        assert one.limit == "GPUs"
        assert two.seconds["GPUs"] == pytest.approx(one.seconds["GPUs"] / 2)
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
