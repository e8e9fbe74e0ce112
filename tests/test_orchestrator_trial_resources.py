"""What trials are given: shares of GPUs, company, memory for what they share; and whether they had to wait."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import config_file
from orchestrator.config import ComputeConfig, RunConfig
from orchestrator.errors import UserError
from orchestrator.planning import memory
from orchestrator.planning.plan import _refuse_gpus
from orchestrator.sweeps.data_wait import waiting
from orchestrator.sweeps.rank_grid import RankGrid
from storage.layout import StoreSpec
from tests.runs import SMALL_RUN, write_config
from tests.stores import small_spec


def loaded(folder: Path, **changes: Any) -> RunConfig:
    return config_file.load(write_config(folder, **changes), [])


def test_trials_of_one_actor_have_their_shares_of_a_gpu_together():
    assert ComputeConfig(gpus_per_actor=1.0).gpus_per_trainer == 1
    assert ComputeConfig(gpus_per_actor=1.0, gpus_per_trial=0.25).gpus_per_trainer == 0.25
    assert ComputeConfig(gpus_per_trial=0.1, trials_per_actor=3).gpus_per_trainer == 0.3


def test_ranks_of_a_trial_have_a_gpu_each_and_ask_for_their_places_at_once():
    grid = RankGrid(latents=2, batch=2)
    compute = ComputeConfig(gpus_per_trial=4.0, cpus_per_actor=3, ranks_per_trial=grid)
    assert compute.gpus_per_trainer == 1
    assert compute.asked[-2:] == [("ranks_per_trial", "CPU", 12.0), ("ranks_per_trial", "GPU", 4.0)]
    assert ComputeConfig(ranks_per_trial=3).ranks == RankGrid(latents=3)
    assert ComputeConfig().ranks.n_ranks == 1


def test_a_grid_of_ranks_is_written_and_read_again(tmp_path: Path):
    cfg = loaded(tmp_path, compute={"ranks_per_trial": {"latents": 2, "batch": 2}})
    assert cfg.compute.ranks == RankGrid(latents=2, batch=2)
    (tmp_path / "again.yaml").write_text(config_file.dump(cfg))
    assert config_file.load(tmp_path / "again.yaml", []) == cfg


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"compute": {"gpus_per_trial": 0.4, "trials_per_actor": 4}},
            r"compute\.gpus_per_trial: 0\.4 x trials_per_actor: 4 = 1\.6 is neither a share",
        ),
        (
            {
                "compute": {"trials_per_actor": 4},
                "sweep": {**SMALL_RUN["sweep"], "search": {"method": "optuna", "trials": 1}},
            },
            r"compute\.trials_per_actor: 4 with sweep\.search\.method: optuna.*; leave it out",
        ),
        (
            {"compute": {"trials_per_actor": 4, "ranks_per_trial": 2}},
            r"compute\.ranks_per_trial: 2 processes .* trials_per_actor: 4 .*; leave out either",
        ),
        (
            {"compute": {"gpus_per_trial": 1, "ranks_per_trial": 2}},
            r"compute\.gpus_per_trial: 1.* each of the 2 ranks .* 0\.5 GPUs; .*; set .* to 2, or to 0",
        ),
        (
            {"compute": {"ranks_per_trial": 17}},
            r"sweep\.encoders\[1\]: its 16 heads can't be divided among 17 ranks.*; lower",
        ),
        (
            {"compute": {"ranks_per_trial": {"latents": 257}}},
            r"sweep\.d_sae: its 256 latents can't be divided among 257 ranks.*; lower",
        ),
        (
            {"compute": {"ranks_per_trial": {"batch": 3}}},
            r"train\.batch_tokens: 512 tokens can't be divided evenly among the 3 ranks.*; give",
        ),
        ({"compute": {"ranks_per_trial": 0}}, r"compute\.ranks_per_trial: 0 should be greater"),
        ({"compute": {"ranks_per_trial": {"latent": 2}}}, r"did you mean latents\?"),
    ],
    ids=[
        *("1.6 GPUs", "optuna", "one process, several trials", "half a GPU", "heads", "latents"),
        *("batch", "none", "misspelt"),
    ],
)
def test_company_that_cannot_be(tmp_path: Path, changes: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told):
        loaded(tmp_path, **changes)


@pytest.mark.parametrize("setting", ["gpus_per_actor", "gpus_per_trial"])
def test_more_gpus_than_there_are_are_refused_before_anything_starts(tmp_path: Path, setting: str):
    there = torch.cuda.device_count()
    cfg = loaded(tmp_path, compute={setting: float(there + 1)})
    with pytest.raises(
        UserError, match=rf"compute\.{setting}: .* {there + 1} GPUs, .* has {there};"
    ):
        _refuse_gpus(cfg, there)
    _refuse_gpus(cfg, there + 1)


SPEC = small_spec(groups=((0, 2), (1,)), dtype="float16")
WINDOW = 2 * SPEC.chunk_rows * SPEC.d_model * 2
"""Bytes of two chunks."""


@pytest.mark.parametrize(
    ("harvest", "n_trainers", "n_windows"),
    [
        ({}, 4, 0),
        ({"codec": "zstd"}, 1, 0),
        ({"codec": "zstd"}, 4, 6),
        ({"store": "s3://b/p"}, 2, 6),
    ],
    ids=["mapped", "one trainer", "compressed", "bucket"],
)
def test_shared_memory_is_asked_for_where_trials_share_what_they_read(
    tmp_path: Path, harvest: dict[str, Any], n_trainers: int, n_windows: int
):
    cfg = loaded(
        tmp_path,
        harvest={**SMALL_RUN["harvest"], **harvest},
        sweep={**SMALL_RUN["sweep"], "window_chunks": 2},
    )
    columns = sum(dtype.itemsize for dtype in SPEC.columns.values()) * SPEC.n_rows
    wanted = memory.shared_bytes(cfg, SPEC, 2, n_trainers)
    assert wanted == (n_windows * WINDOW + columns if n_windows else 0)


def results(*shares: float) -> list[dict[str, Any]]:
    return [{"trial": f"t{i}", "data_wait_fraction": share} for i, share in enumerate(shares)]


def test_the_end_of_a_sweep_tells_who_waited_for_data(tmp_path: Path):
    cfg = loaded(tmp_path)
    told = waiting(cfg, results(0.01, 0.03, 0.002))
    assert told == "trials waited for data for 1.0% of their time (the worst 3.0%: t1)"


@pytest.mark.parametrize(
    ("harvest", "remedy"),
    [
        ({}, r"compute\.trials_per_actor\), or give reading a core \(compute\.cpus_per_actor\)"),
        ({"codec": "zstd"}, r"compute\.trials_per_actor\), or keep the store uncompressed"),
        ({"disk_budget": "1GB"}, r"raise harvest\.disk_budget"),
    ],
    ids=["disk", "compressed", "budget"],
)
def test_who_waited_long_is_told_what_to_change(
    tmp_path: Path, harvest: dict[str, Any], remedy: str
):
    cfg = loaded(tmp_path, harvest={**SMALL_RUN["harvest"], **harvest})
    told = waiting(cfg, results(0.0, 0.5, 0.0))
    assert told.startswith("trials waited for data for 0.0% of their time (the worst 50.0%: t1); ")
    assert re.search(remedy, told)


def test_a_rank_has_its_share_of_the_state_and_the_whole_window(tmp_path: Path):
    from actors.language_model import describe

    one, two = (loaded(tmp_path / str(n), compute={"ranks_per_trial": n}) for n in (1, 2))
    shape = describe(one.model)
    spec: StoreSpec = small_spec(groups=((0, 2), (1,)))
    less = memory.trainer(one, shape, spec).host - memory.trainer(two, shape, spec).host
    widest = max(s.n_parameters for s in memory.corners(one, shape.d_model))
    halved = (widest - shape.d_model) // 2 * 4
    # Weights, two moments and gradients; where a checkpoint's copy is the larger it is halved too.
    assert 4 * halved <= less <= 7 * halved


def test_a_trainer_of_several_has_the_state_of_each(tmp_path: Path):
    from actors.language_model import describe

    one, four = (loaded(tmp_path / str(n), compute={"trials_per_actor": n}) for n in (1, 4))
    shape = describe(one.model)
    spec: StoreSpec = small_spec(groups=((0, 2), (1,)))
    more = memory.trainer(four, shape, spec).host - memory.trainer(one, shape, spec).host
    widest = max(s.n_parameters for s in memory.corners(one, shape.d_model))
    assert more == 3 * 3 * widest * 4
