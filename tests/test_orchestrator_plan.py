"""What `strata plan` counts, against stores that are written, and what it refuses."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from actors.language_model import describe
from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.planning.estimate import estimate
from orchestrator.planning.plan import Plan, plan, refuse_what_cannot_fit
from orchestrator.planning.rounding import int8_cost, told
from storage.activations import ActivationStore
from storage.places import place
from storage.sizes import store_bytes
from tests.runs import write_config
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
    both = of(encoders=["dense"], vary={"d_sae": [256, 512]})
    assert both.n_trials == narrow.n_trials + wide.n_trials == 4
    assert both.disk_bytes["trials"] == narrow.disk_bytes["trials"] + wide.disk_bytes["trials"]
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
        most = 5 * wide.disk_bytes["trials"]
        assert found.disk_bytes["trials"] == (
            pytest.approx(most, rel=0.5) if method == "random" else most
        )


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
