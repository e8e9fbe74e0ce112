"""Trials that train on the same batches in one process: each ends as if it had been alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.bundle import Bundle, bundles
from actors.trainer import feed_of
from actors.trial import Trial
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape, SaeConfig
from sae.fit import Fit, FitConfig
from storage.batches import Cursor
from storage.windows import Batch
from tests.stores import filled_store, small_spec
from tests.trials import N_STEPS, result_of, small_trial

TIMES = ("seconds", "data_wait_fraction")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Four autoencoders of one group, with nothing else in common; their store has 3 batches an epoch."""
    folder = tmp_path_factory.mktemp("bundle")
    filled_store(folder / "train.zarr", small_spec(groups=((0, 2), (1,)), dtype="float16"))
    filled_store(folder / "validation.zarr", small_spec(n_sequences=6))
    common = {"d_model": 6, "d_sae": 12}
    saes = {
        "dense": SaeConfig(**common, k=2, selection="batch_topk"),
        "kron": SaeConfig(**common, k=3, encoder=KronShape(h=3, m=2, n=2)),
        "wide": SaeConfig(d_model=6, d_sae=24, k=4, prefixes=(8, 24)),
        "again": SaeConfig(**common, k=2, selection="batch_topk"),
    }
    return [
        small_trial(
            folder,
            id=name,
            sae=sae,
            fit=FitConfig(
                batch_tokens=32, lr=1e-2 if name != "again" else 1e-3, dead_after_tokens=64
            ),
            folder=folder / "alone" / name,
        )
        for name, sae in saes.items()
    ]


@pytest.fixture(scope="module")
def alone(trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """What each leaves behind that is trained by itself."""
    for trial in trials:
        finish(Bundle([trial]))
    return left(trials)


def elsewhere(trials: Sequence[Trial], folder: Path, **changes: Any) -> list[Trial]:
    return [dataclasses.replace(t, folder=folder / t.id, **changes) for t in trials]


def left(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Weights, result and curve of each, but for times."""
    return {
        trial.id: {
            "weights": (trial.folder / "sae" / "sae.safetensors").read_bytes(),
            "result": timeless(result_of(trial)),
            "curve": [timeless(row) for row in trial.rows],
        }
        for trial in trials
    }


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in (*TIMES, "timestamp_ms", "tokens_per_second")}


def finish(bundle: Bundle, stride: int = 3) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    while not bundle.is_over:
        for name, report in bundle.advance(stride - bundle.step % stride).items():
            told[name] = {**told.get(name, {}), **report}
    return told


def test_each_ends_with_the_bits_that_it_would_have_alone(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path
):
    mine = elsewhere(trials, tmp_path)
    told = finish(Bundle(mine))
    assert left(mine) == alone
    assert {name: timeless(report["result"]) for name, report in told.items()} == {
        name: parts["result"] for name, parts in alone.items()
    }


def test_a_batch_is_brought_and_decoded_once_for_all(
    trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    x = Batch.x.fget
    monkeypatch.setattr(Batch, "x", property(lambda batch: decoded.append(batch) or x(batch)))
    finish(Bundle(elsewhere(trials, tmp_path)))
    assert len(decoded) == N_STEPS


@pytest.mark.parametrize("saved", [("dense",), ("kron", "again"), ()], ids=str)
def test_killed_between_checkpoints_it_goes_on_to_the_same_bits(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path, saved: tuple[str, ...]
):
    mine = elsewhere(trials, tmp_path)
    bundle = Bundle(mine)
    bundle.advance(3)
    bundle.pause()
    bundle = Bundle(mine)
    bundle.advance(3)
    for member in bundle._members:
        if member.trial.id in saved:
            member.save()
    bundle.advance(2)  # lost
    bundle = Bundle(mine)
    assert bundle.step == 3
    finish(bundle)
    assert left(mine) == alone


def test_other_bundles_may_go_on_than_began(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path
):
    mine = elsewhere(trials, tmp_path)
    first = Bundle(mine[:2])
    for _ in range(2):
        first.advance(3)
    first.pause()
    second = Bundle(mine[2:3])
    finish(second)
    assert left(mine[2:3]) == {"wide": alone["wide"]}
    finish(Bundle(mine))
    assert left(mine) == alone


def test_a_member_that_is_given_up_leaves_the_others(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path
):
    mine = elsewhere(trials, tmp_path)
    bundle = Bundle(mine)
    bundle.advance(3)
    mine[1].stop_at(3)
    told = bundle.advance(3)
    assert told["kron"]["result"]["stopped_at"] == told["kron"]["step"] == 3
    assert told["dense"]["step"] == 6
    assert set(bundle.advance(3)) == {"dense", "wide", "again"}
    finish(bundle)
    others = [trial for trial in mine if trial.id != "kron"]
    assert left(others) == {trial.id: alone[trial.id] for trial in others}


def test_a_member_that_fails_does_not_take_the_others_with_it(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = elsewhere(trials, tmp_path)
    bundle = Bundle(mine)
    bundle.advance(3)
    sick = next(m for m in bundle._members if m.trial.id == "wide")
    sick._sae.b_dec.data = torch.zeros(5)  # of another width than its rows
    finish(bundle)
    assert list(bundle.failures) == ["wide"]
    others = [trial for trial in mine if trial.id != "wide"]
    assert left(others) == {trial.id: alone[trial.id] for trial in others}
    assert not mine[2].result_file.is_file()


def test_a_member_that_diverges_is_given_up_there_and_the_others_go_on(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path
):
    mine = elsewhere(trials, tmp_path)
    bundle = Bundle(mine)
    bundle.advance(3)
    sick = next(m for m in bundle._members if m.trial.id == "wide")
    with torch.no_grad():
        sick._sae.b_dec.fill_(1e30)  # its next loss is not finite
    told = finish(bundle)
    assert not bundle.failures
    assert sick.trial.diverged
    assert told["wide"]["result"]["stopped_at"] == 3
    others = [trial for trial in mine if trial.id != "wide"]
    assert left(others) == {trial.id: alone[trial.id] for trial in others}
    assert not any(trial.diverged for trial in others)


def test_steps_leave_a_shared_batch_as_it_is(trials: list[Trial]):
    trial = trials[0]
    x, layer = feed_of(trial, "cpu").at(Cursor(epoch=0, step=0)).rows
    before = x.clone(), layer.clone()
    for member in trials:
        sae = SparseAutoencoder(member.sae, member.layer_scale, seed=0)
        fit = Fit(sae, member.fit, n_steps=3)
        fit.initialise(x, layer)
        fit.step(x, layer)
    assert torch.equal(x, before[0])
    assert torch.equal(layer, before[1])


@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([32, 64])), max_size=12),
    size=st.integers(1, 5),
)
def test_only_those_with_the_same_batches_are_put_together(
    trials: list[Trial], kinds: list[tuple[int, int]], size: int
):
    made = [
        dataclasses.replace(
            trials[0],
            id=str(i),
            group=group,
            fit=dataclasses.replace(trials[0].fit, batch_tokens=tokens),
            n_steps=-(-448 // tokens),
        )
        for i, (group, tokens) in enumerate(kinds)
    ]
    put = bundles(made, size)
    assert sorted((t.id for some in put for t in some), key=int) == [t.id for t in made]
    assert all(len({(t.group, t.fit.batch_tokens) for t in some}) == 1 for some in put)
    assert max(map(len, put), default=0) <= size
    # As few as can be.
    counts = [kinds.count(kind) for kind in set(kinds)]
    assert len(put) == sum(-(-count // size) for count in counts)


def test_a_member_whose_checkpoint_is_damaged_is_left_behind(
    trials: list[Trial], alone: dict[str, Any], tmp_path: Path
):
    mine = elsewhere(trials, tmp_path)
    first = Bundle(mine)
    first.advance(3)
    first.pause()
    file = mine[0].checkpoint_file
    file.write_bytes(file.read_bytes()[:-1])
    bundle = Bundle(mine)
    assert set(bundle.failures) == {mine[0].id}
    finish(bundle)
    rest = {trial.id for trial in mine[1:]}
    assert left(mine[1:]) == {name: alone[name] for name in rest}
