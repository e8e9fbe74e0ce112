"""A trial that two and four real processes train together, against the same trial in one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.fidelity import reconstruction_quality
from actors.trial import Trial
from sae import checkpoint
from sae.config import KronShape, SaeConfig
from sae.fit import FitConfig
from tests.rank_jobs import trial_trained
from tests.rank_processes import RankProcesses
from tests.trials import result_of, small_trial

TIMES = {"seconds", "data_wait_fraction", "timestamp_ms", "tokens_per_second"}

NEAR = 1e-5
"""Of weights of norm 1, and of losses, in float32, whose last digit is 1e-7: sums are taken in another order,
and Adam divides small gradients by their own size. After fourteen steps 6e-8 was seen."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankProcesses]]:
    folder = tmp_path_factory.mktemp("meeting")
    groups = {n: RankProcesses(n, folder) for n in (2, 4)}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture(params=["dense", "kron"])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    encoder = KronShape(h=6, m=2, n=2) if request.param == "kron" else "dense"
    return small_trial(
        tmp_path,
        id="t",
        sae=SaeConfig(d_model=6, d_sae=24, k=3, encoder=encoder, selection="batch_topk"),
        fit=FitConfig(batch_tokens=34, lr=3e-3, dead_after_tokens=10_000),
        folder=tmp_path / "one",
    )


def at(trial: Trial, name: str) -> Trial:
    return dataclasses.replace(trial, folder=trial.folder.parent / name)


def assert_same_end(ours: Trial, theirs: Trial) -> None:
    found, expected = (result_of(t) for t in (ours, theirs))
    assert found.keys() == expected.keys()
    for key in expected.keys() - TIMES:
        value = expected[key]
        near = isinstance(value, float | dict)
        assert found[key] == (pytest.approx(value, rel=NEAR, abs=NEAR) if near else value), key
    assert [row["step"] for row in ours.rows] == [row["step"] for row in theirs.rows]
    for mine, row in zip(ours.rows, theirs.rows, strict=True):
        for key in row.keys() - TIMES:
            assert mine[key] == pytest.approx(row[key], rel=NEAR, abs=NEAR), key
    mine, whole = (load_file(t.folder / "sae" / "sae.safetensors") for t in (ours, theirs))
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(mine[name], tensor, rtol=NEAR, atol=NEAR, msg=name)


@pytest.mark.parametrize(("n", "n_dictionary"), [(2, 2), (4, 2)])
def test_ranks_leave_what_one_process_leaves(groups, trial: Trial, n: int, n_dictionary: int):
    trial_trained(trial, None)
    ours = at(trial, "ours")
    first, *others = groups[n](trial_trained, ours, n_dictionary)
    assert_same_end(ours, trial)
    assert first["result"] == result_of(ours)
    for told in others:
        assert told["result"]["fvu"] == first["result"]["fvu"]
    sae, extra = checkpoint.load(ours.folder / "sae")
    assert extra["trial"] == "t"
    alone = reconstruction_quality(sae, ours.validation_store, ours.layers, ours.row_filter)
    assert first["result"]["fvu"] == pytest.approx(alone.mean_fvu, rel=1e-6)
    assert first["result"]["l0"] == pytest.approx(alone.l0, rel=1e-6)
    assert first["result"]["dead_fraction"] == alone.dead_fraction


def test_a_trial_goes_on_with_any_number_of_ranks(groups, trial: Trial):
    trial_trained(trial, None)
    ours = at(trial, "ours")
    groups[2](trial_trained, ours, 2, 3)
    trial_trained(ours, None, 6)
    groups[4](trial_trained, ours, 2, 9)
    groups[4](trial_trained, ours, 4)
    assert_same_end(ours, trial)


def test_ranks_that_were_cut_short_end_with_the_bits_of_those_that_were_not(groups, trial: Trial):
    whole, cut = at(trial, "whole"), at(trial, "cut")
    groups[4](trial_trained, whole, 2)
    groups[4](trial_trained, cut, 2, 6)
    groups[4](trial_trained, cut, 2)
    mine, theirs = (load_file(t.folder / "sae" / "sae.safetensors") for t in (cut, whole))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_all_ranks_end_where_the_trial_was_given_up(groups, trial: Trial):
    ours = at(trial, "ours")
    groups[2](trial_trained, ours, 2, 6)
    ours.stop_at(8)
    told = groups[2](trial_trained, ours, 2)
    assert [report["result"]["stopped_at"] for report in told] == [8, 8]


def test_a_trial_that_diverges_is_given_up_by_all_ranks_at_the_step_of_one_process(
    groups, trial: Trial
):
    wild = dataclasses.replace(trial.fit, lr=1e20, grad_clip=float("inf"), auxk_coefficient=0.0)
    one, ours = (dataclasses.replace(at(trial, name), fit=wild) for name in ("one", "ours"))
    trial_trained(one, None)
    groups[4](trial_trained, ours, 2)
    assert one.diverged
    assert ours.diverged
    assert ours.stopped_at == one.stopped_at
