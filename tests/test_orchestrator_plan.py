"""What `strata plan` counts, against stores that are written, and what it refuses."""

import dataclasses
import json
import re
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import yaml

from actors.grouping import GroupConfig
from actors.language_model import ModelShape, describe
from orchestrator import config_file
from orchestrator.config import FREE_SETTINGS, RunConfig
from orchestrator.errors import UserError
from orchestrator.planning import disk
from orchestrator.planning.estimate import estimate
from orchestrator.planning.plan import Plan, plan, refuse_what_cannot_fit
from orchestrator.planning.rounding import int8_cost, told
from orchestrator.run_directory import RunDirectory
from orchestrator.sweeps.candidates import foreseen
from storage.activations import ActivationStore
from storage.places import place
from storage.sizes import store_bytes
from storage.tokens import TokenSpec, TokenWriter
from tests.runs import harvested, write_config
from tests.stores import filled_store, small_spec


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return config_file.load(write_config(tmp_path), [])


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("groups", [(), ((0, 2), (1,))], ids=["layers", "groups"])
def test_every_array_weighs_what_was_foretold(tmp_path: Path, dtype: str, groups):
    spec = small_spec(dtype=dtype, groups=groups)
    folder = filled_store(tmp_path, spec).place.folder
    assert folder is not None
    planned, found = store_bytes(spec), dict.fromkeys(store_bytes(spec), 0)
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file():
            kind = "metadata" if file.name == "zarr.json" else name.split("/c/")[0]
            found["commits" if kind.startswith("commits/") else kind] += file.stat().st_size
    assert planned["commits"] == pytest.approx(found["commits"], rel=0.05)
    assert planned["metadata"] == pytest.approx(found["metadata"], rel=0.01)
    exact = set(found) - {"commits", "metadata"}
    assert {name: planned[name] for name in exact} == {name: found[name] for name in exact}


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"tokens": 10**11, "pilot_tokens": 10**9}, "lower harvest.tokens"),
        ({"batch_tokens": 10**9}, "lower harvest.shard_mib, harvest.batch_tokens or"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting(cfg: RunConfig, change, setting):
    large = dataclasses.replace(cfg, harvest=dataclasses.replace(cfg.harvest, **change))
    with pytest.raises(UserError, match=setting):
        refuse_what_cannot_fit(plan(large, describe(large.model)), large)
    refuse_what_cannot_fit(plan(cfg, describe(cfg.model)), cfg)


def test_a_run_that_goes_on_needs_room_for_what_it_lacks_alone(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With groups by threshold: two are found, where there might be seven."""
    config = harvested(finished[0], tmp_path, group={"threshold": 0.9})
    cfg = config_file.load(config)
    run, shape = RunDirectory.of(cfg), describe(cfg.model)
    bounds = plan(dataclasses.replace(cfg, run_dir=tmp_path / "new"), shape)
    assert (bounds.n_groups, bounds.n_groups_is_known) == (7, False)
    assert bounds.left_bytes == bounds.disk_bytes

    figures = plan(cfg, shape)
    assert (figures.n_groups, figures.n_groups_is_known) == (2, True)
    assert figures.left_bytes == {
        **dict.fromkeys(("tokens", "pilot", "validation", "train"), 0),
        "trials": figures.disk_bytes["trials"],
    }
    there = ActivationStore.open(run.train).spec
    assert figures.specs["train"].groups == there.groups
    commits = sorted((tmp_path / "runs" / "small" / "train.zarr" / "commits").iterdir())
    weight = sum(file.stat().st_size for file in commits)
    assert figures.arrays["train"]["commits"] == pytest.approx(weight, rel=0.02)
    free = figures.disk_bytes["trials"]
    monkeypatch.setattr(disk, "free_disk_bytes", lambda _: free)
    refuse_what_cannot_fit(figures, cfg)

    commits[0].unlink()
    left = plan(cfg, shape).left_bytes["train"]
    assert left == pytest.approx(figures.disk_bytes["train"] / len(commits), abs=1)
    with pytest.raises(UserError, match=r"more of disk \(trials") as refused:
        refuse_what_cannot_fit(plan(cfg, shape), cfg)
    named = set(
        re.findall(r"[a-z]+\.[a-z_]+|run_dir", str(refused.value).replace(str(tmp_path), ""))
    )
    assert named <= {*FREE_SETTINGS}, "it names settings that may still change"
    ended = run.trials / "g0-dense" / "result.json"
    ended.parent.mkdir(parents=True)
    ended.touch()
    saes = [sae for group in (0, 1) for sae in foreseen(cfg, group, shape.d_model)]
    others = sorted(saes, key=attrgetter("n_parameters"))[1:]  # at most
    left = disk.trials_bytes(cfg, others, at_once=figures.n_actors["trainer"])
    assert plan(cfg, shape).left_bytes["trials"] == left < free


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir(), reason="needs a second file system: /dev/shm, as Linux has it"
)
def test_a_store_on_another_disk_needs_its_room_there(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, store = tmp_path / "run", Path("/dev/shm/strata-no-such-store")
    harvest = dataclasses.replace(cfg.harvest, store=str(store))
    elsewhere = dataclasses.replace(cfg, run_dir=run, harvest=harvest)
    figures = plan(elsewhere, describe(cfg.model))
    trials = figures.left_bytes["trials"]
    rooms = {run: trials, store: sum(figures.left_bytes.values()) - trials}
    monkeypatch.setattr(disk, "free_disk_bytes", lambda path: rooms[path])
    refuse_what_cannot_fit(figures, elsewhere)
    for folder, setting in ((run, "run_dir"), (store, "harvest.store")):
        rooms[folder] -= 1
        with pytest.raises(UserError, match=f"and {folder} has .* move {setting} to a larger disk"):
            refuse_what_cannot_fit(figures, elsewhere)
        rooms[folder] += 1


def test_the_last_layer_alone_is_a_group_more(cfg: RunConfig):
    shape = describe(cfg.model)
    for last_layer, n_groups in (("exclude", 2), ("grouped", 2), ("alone", 3)):
        one = dataclasses.replace(cfg, group=dataclasses.replace(cfg.group, last_layer=last_layer))
        figures = plan(one, shape)
        assert figures.n_groups == n_groups
        assert len(figures.specs["train"].layers) == shape.n_layers - (last_layer == "exclude")
    with pytest.raises(UserError, match=r"has 0 to group .* set group\.last_layer: grouped"):
        plan(dataclasses.replace(cfg, group=GroupConfig()), dataclasses.replace(shape, n_layers=1))


@pytest.mark.parametrize("vocabulary", [100, 50_257])
def test_tokens_weigh_what_is_foretold_at_most(tmp_path: Path, vocabulary: int):
    """Of any length; words as frequent as they are in texts, and documents of a hundred of them."""
    draw = np.random.default_rng(0)
    for n, context in ((20, 8), (200, 64), (2000, 256)):
        specs = {
            name: small_spec(n_population=size, n_sequences=size, rows_per_sequence=context - 1)
            for name, size in (("train", n), ("validation", n // 10))
        }
        folder = tmp_path / f"{n}"
        settings = TokenSpec(
            context=context, first_position=1, separator_id=0, special_ids=(0,), tokenizer="any"
        )
        writer = TokenWriter(folder, settings, {s: spec.n_population for s, spec in specs.items()})
        for split, spec in specs.items():
            of = (spec.n_population, context)
            ids = np.minimum(draw.zipf(1.2, of), vocabulary - 1).astype(np.uint32)
            documents = np.cumsum(draw.random(of) < 0.01).reshape(of).astype(np.uint32)
            writer.append(split, ids, documents)
        writer.seal()
        shape = ModelShape(n_layers=3, d_model=6, longest=context, vocabulary=vocabulary)
        assert disk.bytes_under(folder) <= disk.token_bytes(shape, context, specs)


def test_a_store_elsewhere_needs_no_room_in_the_run_directory(cfg: RunConfig):
    figures = plan(cfg, describe(cfg.model))
    away = dataclasses.replace(cfg, harvest=dataclasses.replace(cfg.harvest, store="s3://b/p"))
    elsewhere = plan(away, describe(away.model))
    assert elsewhere.total_disk_bytes == figures.total_disk_bytes == figures.local_disk_bytes
    assert elsewhere.local_disk_bytes == figures.disk_bytes["trials"]


def test_what_computes_on_a_gpu_is_counted_there(cfg: RunConfig):
    on_gpu = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, gpus_per_actor=1.0))
    here, there = (plan(c, describe(c.model)).actors for c in (cfg, on_gpu))
    for kind in ("harvester", "trainer", "evaluator"):
        assert here[kind].device == 0 < there[kind].device
        assert there[kind].host < here[kind].host


def with_harvest(cfg: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(cfg, harvest=dataclasses.replace(cfg.harvest, **changes))


def test_a_disk_budget_bounds_the_training_store_and_too_small_a_one_is_refused(cfg: RunConfig):
    shape = describe(cfg.model)
    small = dataclasses.replace(cfg, sweep=dataclasses.replace(cfg.sweep, window_chunks=2))
    whole = plan(small, shape).disk_bytes["train"]
    bounded = with_harvest(small, disk_budget=str(whole // 2))
    assert plan(bounded, shape).disk_bytes["train"] == whole // 2
    assert plan(with_harvest(small, disk_budget=str(2 * whole)), shape).disk_bytes["train"] == whole
    with pytest.raises(UserError, match=r"harvest\.disk_budget: .* readers need 4 at a time") as e:
        plan(with_harvest(small, disk_budget=str(whole // 10)), shape)
    enough = int(re.search(r"raise it to ([\d,]+)", str(e.value))[1].replace(",", ""))
    plan(with_harvest(small, disk_budget=str(enough)), shape)
    with pytest.raises(UserError):
        plan(with_harvest(small, disk_budget=str(enough - 1)), shape)


def test_the_time_is_what_there_is_to_do_over_the_rates_that_were_measured(cfg: RunConfig):
    shape = describe(cfg.model)
    figures = plan(cfg, shape)
    found = estimate(cfg, shape, figures)
    assert set(found.step_rates) == {"dense", "kron 16x4x4"}
    assert found.harvest == pytest.approx(
        figures.harvest_tokens / found.model_rate / figures.n_actors["harvester"]
    )
    trained = 2 * 235 * 512  # groups, steps, tokens of one
    busy = sum(trained / rate for rate in found.step_rates.values())
    assert found.sweep == pytest.approx(busy / figures.n_actors["trainer"])
    assert found.total > max(found.harvest, found.sweep, found.evaluate) > 0


def test_a_space_is_counted_trial_by_trial_and_at_its_largest(cfg: RunConfig):
    shape = describe(cfg.model)

    def of(**settings: object) -> Plan:
        raw = yaml.safe_load(config_file.dump(cfg))
        raw["sweep"] |= settings
        return plan(config_file.parse(raw, "test"), shape)

    narrow, wide = of(encoders=["dense"]), of(encoders=["dense"], d_sae=512)
    both_sizes = {"encoders": ["dense"], "vary": {"d_sae": [256, 512]}}
    both = of(**both_sizes)
    assert both.n_trials == narrow.n_trials + wide.n_trials == 4
    asha = {"stop": {"method": "asha"}}  # at whose rungs all may wait
    assert both.disk_bytes["trials"] < of(**both_sizes, **asha).disk_bytes["trials"]
    less, more = (
        of(encoders=["dense"], d_sae=d, k=[8, 16]).disk_bytes["trials"] for d in (256, 512)
    )
    assert less < both.disk_bytes["trials"] < more
    assert both.actors == wide.actors
    larger = of(vary={"train": {"batch_tokens": [512, 4096]}})
    assert larger.actors["trainer"].host > narrow.actors["trainer"].host

    one = of(encoders=["dense"], groups={1: {"k": [8, 16]}})
    assert one.n_trials == 3

    sizes = {"d_sae": {"min": 256, "max": 512}}
    for method in ("random", "optuna"):
        search = {"method": method, "trials": 5}
        found = of(encoders=["dense"], vary=sizes, search=search)
        assert found.n_trials == 10
        assert found.actors == wide.actors
        most = of(encoders=["dense"], d_sae=512, k=[1, 2, 3, 4, 5]).disk_bytes["trials"]
        assert found.disk_bytes["trials"] == (
            pytest.approx(most, rel=0.5) if method == "random" else most
        )


def test_a_finished_run_has_autoencoders_as_planned_twice_and_no_checkpoints(
    finished: tuple[Path, str],
):
    """Its own, and MLflow's copies."""
    runs, cfg = finished[0].parent / "runs", config_file.load(finished[0])
    trials = [*runs.joinpath("small", "trials").iterdir()]
    own = [json.loads((trial / "mlflow.json").read_text())["run_id"] for trial in trials]
    # Other tests copy the run, and what they train is told to the same MLflow.
    places = [*trials, *(runs / "mlartifacts" / run_id for run_id in own)]
    kept = [file for place in places for file in place.rglob("sae.safetensors")]
    assert len(kept) == 8
    d_model = describe(cfg.model).d_model
    saes = [sae for group in (0, 1) for sae in foreseen(cfg, group, d_model)]
    checkpoint = 3 * 4 * max(sae.n_parameters for sae in saes)
    planned = disk.trials_bytes(cfg, saes, at_once=1) - 2 * checkpoint  # and the next one
    assert sum(file.stat().st_size for file in kept) == pytest.approx(planned, rel=0.05)
    assert not [*runs.rglob("fit.safetensors")]


def test_what_int8_would_cost_is_what_it_costs(tmp_path: Path):
    spec = small_spec()
    float32 = filled_store(tmp_path / "float32", spec).place
    int8 = filled_store(tmp_path / "int8", small_spec(dtype="int8")).place
    assert int8_cost(place(tmp_path / "none")) is None
    assert int8_cost(ActivationStore.create(tmp_path / "empty", spec).place) is None
    would, does = int8_cost(float32), int8_cost(int8)
    assert would is not None
    assert does is not None
    for layer in spec.layers:  # of the first shard; of all, each about its mean
        assert would[layer] == pytest.approx(does[layer], rel=0.2)
    assert "at most" in told(would)
