"""One trial: trained, cut short, continued, judged."""

import dataclasses
import json
import math
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import save_clock, trainer
from actors.bundle import Bundle
from actors.errors import InputError
from actors.save_clock import SaveClock
from actors.trainer import Spent
from actors.trial import Trial
from sae import checkpoint
from sae.config import KronShape
from sae.fit import DivergenceError, Fit, FitConfig
from sae.ranks import ALONE
from tests.trials import N_STEPS, result_of, small_trial


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return small_trial(tmp_path)


def finish(trial: Trial, stride: int = 3) -> dict[str, Any]:
    bundle, told = Bundle([trial]), {}
    while not bundle.is_over:
        told = bundle.advance(stride)
    return told[trial.id]["result"]


def test_a_trial_leaves_an_autoencoder_its_curve_and_its_result(trial: Trial):
    result = finish(trial)
    assert result == result_of(trial)
    assert set(result["fvu_per_layer"]) == {"0", "2"}
    assert result["fvu"] == pytest.approx(sum(result["fvu_per_layer"].values()) / 2)
    assert 0 < result["fvu"] < 1
    assert result["tokens"] == N_STEPS * 32
    sae, extra = checkpoint.load(trial.folder / "sae")
    assert sae.layer_scale == trial.layer_scale
    assert extra["trial"] == trial.id
    rows = [json.loads(line) for line in trial.metrics_file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 14]
    assert rows[-1]["fvu"] < rows[0]["fvu"]


@pytest.mark.parametrize("encoder", ["dense", KronShape(h=3, m=2, n=2)], ids=["dense", "kron"])
@pytest.mark.parametrize("saved_at", [3, 6, 9])
def test_a_trial_continued_from_a_checkpoint_ends_with_the_same_bits(
    trial: Trial, encoder: Any, saved_at: int
):
    sae = dataclasses.replace(trial.sae, encoder=encoder)
    whole = dataclasses.replace(trial, sae=sae, folder=trial.folder / "whole")
    cut = dataclasses.replace(trial, sae=sae, folder=trial.folder / "cut")
    finish(whole)

    first = Bundle([cut])
    while first.step < saved_at:
        first.advance(3)
    first.pause()
    Bundle([cut]).advance(2)  # lost: it is after the checkpoint
    assert Bundle([cut]).step == saved_at
    finish(cut)

    for name in ("sae/sae.safetensors",):
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    steps = [json.loads(line)["step"] for line in cut.metrics_file.read_text().splitlines()]
    assert steps == sorted(set(steps)), "a step is told twice"
    assert steps[-1] == N_STEPS


def test_a_trial_that_is_given_up_ends_at_that_step_with_a_result(trial: Trial):
    whole = dataclasses.replace(trial, folder=trial.folder / "whole")
    bundle = Bundle([whole])
    bundle.advance(3)
    bundle.advance(3)
    whole.stop_at(6)
    told = bundle.advance(3)[whole.id]
    assert bundle.is_over
    assert told["step"] == 6
    result = told["result"]
    assert (result["stopped_at"], result["tokens"]) == (6, 6 * 32)
    assert finish(trial)["stopped_at"] is None

    # Given up while it was paused, or dead: trained as far as that, and no further.
    late = dataclasses.replace(trial, folder=trial.folder / "late")
    bundle = Bundle([late])
    bundle.advance(3)
    bundle.pause()
    late.stop_at(6)
    bundle = Bundle([late])
    assert bundle.advance(0)[late.id]["step"] == 3
    assert not bundle.is_over
    same = finish(late, stride=100)
    assert same["fvu"] == result["fvu"]
    weights = "sae/sae.safetensors"
    assert (late.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_what_a_trial_left_and_somebody_edited_is_told(trial: Trial):
    finish(trial)
    for file in (trial.result_file, trial.metrics_file):
        file.write_text(file.read_text().replace('"fvu": 0.', '"fvu": 9.', 1))
    with pytest.raises(ValueError, match="damaged, or edited"):
        result_of(trial)
    trial.metrics_file.write_text(trial.metrics_file.read_text()[:-9])
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \(line 5 .*delete it"):
        _ = trial.rows
    trial.stop_at(6)
    assert trial.stopped_at == 6
    file = trial.folder / "stopped.json"
    for text in (file.read_text().replace("6", "7", 1), "[6]", "{"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"stopped\.json is damaged .*delete the whole folder"):
            _ = trial.stopped_at


def test_a_checkpoint_of_other_settings_or_of_another_order_of_rows_is_refused(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    bundle = Bundle([trial])
    bundle.advance(3)
    bundle.pause()
    other = dataclasses.replace(trial, fit=dataclasses.replace(trial.fit, lr=0.5))
    with pytest.raises(InputError, match=r"fit\.safetensors is of a training with other settings"):
        Bundle([other])
    monkeypatch.setattr(trainer, "READING_ORDER", 3)
    with pytest.raises(
        InputError, match=r"fit\.safetensors .*reads rows in another order.* delete"
    ):
        Bundle([trial])


def test_a_checkpoint_of_another_trial_is_refused(trial: Trial):
    sibling = dataclasses.replace(trial, id="sibling", folder=trial.folder / "sibling")
    bundle = Bundle([sibling])
    bundle.advance(3)
    bundle.pause()
    sibling.checkpoint_file.rename(trial.checkpoint_file)
    with pytest.raises(
        InputError, match=r"fit\.safetensors is of the trial sibling, .* delete that file"
    ):
        Bundle([trial])


def test_a_trial_whose_curve_was_deleted_goes_on_to_the_same_bits(trial: Trial):
    whole = dataclasses.replace(trial, folder=trial.folder / "whole")
    finish(whole)
    bundle = Bundle([trial])
    bundle.advance(3)
    bundle.pause()
    trial.metrics_file.unlink()
    bundle = Bundle([trial])
    assert bundle.advance(0)[trial.id]["step"] == 3
    finish(trial)
    weights = "sae/sae.safetensors"
    assert (trial.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_checkpoints_come_by_the_clock(trial: Trial):
    eager = dataclasses.replace(trial, checkpoint_seconds=1e-9)
    Bundle([eager]).advance(3)
    assert Bundle([eager]).step > 0
    patient = dataclasses.replace(trial, folder=trial.folder / "patient")
    Bundle([patient]).advance(3)
    assert Bundle([patient]).step == 0


@pytest.mark.parametrize("asked", [False, True])
def test_a_checkpoint_between_two_reports_is_gone_on_from_to_the_same_bits(
    trial: Trial, asked: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(save_clock, "_LOOK_SECONDS", 0.0)
    long = dataclasses.replace(trial, n_steps=150, checkpoint_seconds=1e9 if asked else 1e-3)
    bundle = Bundle([long])
    if asked:
        long.save_request.touch()
    training = threading.Thread(target=bundle.advance, args=(150,))
    training.start()
    file = long.checkpoint_file
    while training.is_alive() and (long.save_request.exists() or not file.exists()):
        time.sleep(0.001)
    assert training.is_alive(), "ended before it wrote one"
    crashed = dataclasses.replace(long, folder=trial.folder / "crashed")
    crashed.folder.mkdir()
    shutil.copy(file, crashed.folder)
    training.join()
    assert not file.exists(), "kept after the end"
    again = Bundle([crashed])
    step = again.step
    assert 0 < step < 150
    assert again.advance(0) == {}, "nothing was reported yet"
    assert again.advance(150 - step)[long.id]["step"] == 150
    weights = "sae/sae.safetensors"
    assert (crashed.folder / weights).read_bytes() == (long.folder / weights).read_bytes()
    steps = [row["step"] for row in crashed.rows]
    assert steps == [row["step"] for row in long.rows] == [150]


def save_after_three_steps(trial: Trial) -> None:
    """None of which it has reported, in half a second."""
    [member] = Bundle([trial])._members
    for _ in range(3):
        member.train()
    member.spend(Spent(seconds=0.5, waited=0.1))
    member.save()


def test_a_trial_that_diverges_at_once_after_a_restart_is_judged(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    save_after_three_steps(trial)
    again = Bundle([trial])
    assert again.advance(0) == {}
    monkeypatch.setattr(Fit, "step", _diverged)
    told = again.advance(5)[trial.id]
    assert told["step"] == told["result"]["stopped_at"] == 3


def _diverged(*_: Any) -> None:
    raise DivergenceError("not finite")


def test_a_trial_given_up_between_two_reports_is_judged_after_a_crash_there(trial: Trial):
    once = dataclasses.replace(trial, checkpoint_seconds=1e-9)
    save_after_three_steps(once)
    once.stop_at(3, diverged=True)
    told = Bundle([once]).advance(5)[once.id]
    assert told["step"] == told["result"]["stopped_at"] == 3
    assert [row["step"] for row in once.rows] == [3]
    assert told["tokens_per_second"] == 3 * once.fit.batch_tokens / 0.5


def test_checkpoints_that_take_long_to_write_are_far_apart(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr(save_clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = SaveClock([dataclasses.replace(trial, checkpoint_seconds=30.0)], ALONE)
    now[0] = 30.0
    assert clock.is_due()
    with clock.saving():
        now[0] = 34.0
    now[0] = 34.0 + 79.0
    assert not clock.is_due(), "four seconds of writing are a twentieth of eighty"
    now[0] = 34.0 + 81.0
    assert clock.is_due()


def test_settings_tell_the_shape_and_its_cost(trial: Trial):
    kron = dataclasses.replace(trial.sae, encoder=KronShape(h=3, m=2, n=2))
    settings = dataclasses.replace(trial, sae=kron).settings()
    assert (settings["h"], settings["m"], settings["n"]) == (3, 2, 2)
    assert settings["encoder_parameters"] == 3 * (2 + 2) * (6 + 1)
    assert math.isclose(settings["n_parameters"], 3 * 4 * 7 + 12 * 6 + 6)
    assert trial.settings()["encoder"] == "dense"
    assert trial.settings()["h"] is None
    assert trial.settings()["lr"] == 1e-2
    default = dataclasses.replace(trial, fit=FitConfig())
    assert default.settings()["lr"] == pytest.approx(2e-4 / math.sqrt(12 / 2**14))
