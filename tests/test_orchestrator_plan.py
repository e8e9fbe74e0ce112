"""What `strata plan` counts, against stores that are written, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest

from actors.language_model import describe
from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.plan import plan, refuse_what_cannot_fit
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
