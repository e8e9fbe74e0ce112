"""When trials are given up: the rules, and that only like is compared with like."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial as TuneTrialState
from ray.tune.schedulers import TrialScheduler

from actors.trial import Trial
from orchestrator.sweeps.scheduler import LikeWithLike
from orchestrator.sweeps.stopping import Field, Verdict, curve_of
from orchestrator.sweeps.sweep_config import StopConfig
from sae.config import SaeConfig
from sae.fit import FitConfig
from storage.hygiene import Hygiene, RowFilter

ASHA = StopConfig(method="asha", grace=0.1, reduction=3.0)
MEDIAN = StopConfig(method="median", grace=0.1)
STEPS = 20
REPORT = {"failed": []}


def field(cfg: StopConfig, waits: bool, curves: Mapping[str, Sequence[float]]) -> Field:
    """Trials that have reported these FVUs, one a step of 20."""
    made = Field(cfg, waits)
    for name, fvus in curves.items():
        rows = [{"step": step, "fvu": fvu} for step, fvu in enumerate(fvus, 1)]
        made.curves[name] = curve_of(rows, STEPS)
    return made


def raced(cfg: StopConfig, finals: Mapping[str, float], order: Sequence[str]) -> dict[str, int]:
    """Steps that each trial is given where they take turns in this order, an FVU falling to its final."""
    lengths, stopped = dict.fromkeys(finals, 0), set()
    course = {
        name: [final + 1 / step for step in range(1, STEPS + 1)] for name, final in finals.items()
    }
    race = field(cfg, True, {name: [] for name in finals})
    while open_ := [n for n in order if n not in stopped and lengths[n] < STEPS]:
        moved = False
        for name in open_:
            race.curves[name] = field(cfg, True, {name: course[name][: lengths[name]]}).curves[name]
            verdict = race.verdict(name)
            if verdict is Verdict.STOP:
                stopped.add(name)
            elif verdict is Verdict.GO:
                lengths[name] += 1
                if lengths[name] == STEPS:
                    race.curves[name] = field(cfg, True, {name: course[name]}).curves[name]
                    race.leave(name)
            moved |= verdict is not Verdict.WAIT
        assert moved, "everybody waits for somebody"
    return lengths


def test_of_nine_three_pass_the_first_rung_and_one_the_second():
    finals = {str(i): float(i) for i in range(9)}
    assert raced(ASHA, finals, list(finals)) == {
        "0": STEPS,
        "1": 6,
        "2": 6,
        **{str(i): 2 for i in range(3, 9)},
    }


@given(
    finals=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    reduction=st.floats(1.5, 6),
    grace=st.floats(0.05, 0.6),
    data=st.data(),
)
def test_who_is_given_up_does_not_depend_on_the_order_and_the_best_never_is(
    finals: list[int], reduction: float, grace: float, data: st.DataObject
):
    cfg = StopConfig(method="asha", grace=grace, reduction=reduction)
    named = {f"t{i}": final for i, final in enumerate(map(float, finals))}
    lengths = raced(cfg, named, list(named))
    assert raced(cfg, named, data.draw(st.permutations(list(named)))) == lengths
    best = min(named, key=lambda name: (named[name] + 1 / STEPS, name))
    assert lengths[best] == STEPS


def test_a_trial_waits_at_a_rung_only_for_those_on_their_way():
    race = field(ASHA, True, {"a": [0.5, 0.4], "b": [0.6], "c": []})
    assert race.verdict("a") is Verdict.WAIT
    race.leave("c")  # failed
    assert race.verdict("a") is Verdict.WAIT
    race.curves["b"] = field(ASHA, True, {"b": [0.6, 0.5]}).curves["b"]
    assert race.verdict("a") is Verdict.GO
    assert race.verdict("b") is Verdict.STOP


def test_where_others_are_not_known_nobody_waits():
    race = field(ASHA, False, {"a": [0.5, 0.4], "b": [0.6]})
    assert race.verdict("a") is Verdict.GO
    race.curves["b"] = field(ASHA, False, {"b": [0.6, 0.5]}).curves["b"]
    assert race.verdict("b") is Verdict.STOP


def test_who_has_passed_a_rung_is_not_judged_there_again():
    race = field(ASHA, False, {"a": [0.5, 0.5, 0.5], "b": [0.1, 0.1], "c": [0.2, 0.2]})
    assert race.verdict("a") is Verdict.GO


def test_the_median_needs_three_others_and_grace():
    good = [0.5, 0.4, 0.3]
    race = field(MEDIAN, False, {"a": good, "b": good, "bad": [0.9, 0.8, 0.7]})
    assert race.verdict("bad") is Verdict.GO
    race.curves["c"] = race.curves["a"]
    assert race.verdict("bad") is Verdict.STOP
    assert race.verdict("a") is Verdict.GO
    race.curves["bad"] = race.curves["bad"][:1]
    assert race.verdict("bad") is Verdict.GO


class Controller:
    """The one thing of Tune's controller that a scheduler is given to see."""

    def __init__(self, trials: list[TuneTrialState]) -> None:
        self._trials = trials

    def get_trials(self) -> list[TuneTrialState]:
        return self._trials


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(
        id="any",
        group=0,
        layers=(0,),
        sae=SaeConfig(d_model=4, d_sae=64, k=16),
        fit=FitConfig(),
        n_steps=STEPS,
        seed=0,
        layer_scale={},
        window_chunks=1,
        checkpoint_seconds=1.0,
        train_store=tmp_path,
        validation_store=tmp_path,
        row_filter=RowFilter(Hygiene(), (), {}),
        folder=tmp_path,
    )


def like(trial: Trial, name: str, group: int = 0, k: int = 16, d_sae: int = 64) -> Trial:
    sae = dataclasses.replace(trial.sae, k=k, d_sae=d_sae)
    folder = trial.folder / name
    folder.mkdir()
    return dataclasses.replace(trial, id=name, group=group, sae=sae, folder=folder)


def reported(trial: Trial, *fvus: float) -> None:
    rows = [json.dumps({"step": step, "fvu": fvu}) for step, fvu in enumerate(fvus, 1)]
    trial.metrics_file.write_text("\n".join(rows) + "\n")


def started(trials: list[Trial]) -> tuple[LikeWithLike, Controller]:
    scheduler = LikeWithLike(ASHA, trials, all_known=True)
    states = [TuneTrialState("", stub=True, config={"trials": (trial,)}) for trial in trials]
    controller = Controller(states)
    for state in states:
        scheduler.on_trial_add(controller, state)
    return scheduler, controller


def test_only_trials_of_one_group_k_and_width_are_compared(trial: Trial):
    others = [
        like(trial, "k64", k=64),
        like(trial, "wide", d_sae=128),
        like(trial, "elsewhere", group=1),
    ]
    alone = like(trial, "alone")
    scheduler, controller = started([*others, alone])
    for other in others:
        reported(other, 0.01, 0.01)
    reported(alone, 0.9, 0.9)
    for state in controller.get_trials():
        assert scheduler.on_trial_result(controller, state, REPORT) == TrialScheduler.CONTINUE
    assert [t.stopped_at for t in (*others, alone)] == [None] * 4


def test_who_waits_is_paused_and_chosen_again_when_the_last_has_come(trial: Trial):
    good, bad = like(trial, "good"), like(trial, "bad")
    scheduler, controller = started([bad, good])
    first, second = controller.get_trials()
    reported(bad, 0.9, 0.8)
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.PAUSE
    first.status, second.status = TuneTrialState.PAUSED, TuneTrialState.PENDING
    assert scheduler.choose_trial_to_run(controller) is second
    second.status = TuneTrialState.RUNNING
    assert scheduler.choose_trial_to_run(controller) is None
    reported(good, 0.5, 0.4)
    assert scheduler.on_trial_result(controller, second, REPORT) == TrialScheduler.CONTINUE
    assert scheduler.choose_trial_to_run(controller) is first
    assert (bad.stopped_at, good.stopped_at) == (2, None)
    # Going on, it says where it stands, and finds its end.
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.CONTINUE


def test_a_killed_sweep_judges_as_one_that_was_not(trial: Trial):
    good, bad, late = (like(trial, name) for name in ("good", "bad", "late"))
    reported(good, 0.5, 0.4)
    reported(bad, 0.9, 0.8)
    reported(late, 0.7)
    scheduler, controller = started([good, bad, late])
    states = controller.get_trials()
    for state in states[:2]:
        assert scheduler.on_trial_result(controller, state, REPORT) == TrialScheduler.PAUSE
    reported(late, 0.7, 0.6)
    assert scheduler.on_trial_result(controller, states[2], REPORT) == TrialScheduler.CONTINUE
    assert late.stopped_at == 2

    scheduler, controller = started([good, bad, late])  # killed, and called again
    states = controller.get_trials()
    for state in states:
        assert scheduler.on_trial_result(controller, state, REPORT) == TrialScheduler.CONTINUE
    assert [t.stopped_at for t in (good, bad, late)] == [None, 2, 2]


def test_who_was_given_up_counts_at_its_rung_also_when_a_crash_has_cost_its_newest_steps(
    trial: Trial,
):
    cfg = dataclasses.replace(ASHA, reduction=2.0)
    trials = [like(trial, name) for name in ("best", "second", "third", "last")]
    for one, fvu in zip(trials, (0.1, 0.2, 0.3, 0.4), strict=True):
        reported(one, 0.9, fvu)
    for one in trials[2:]:
        one.stop_at(2)
        reported(one, 0.9)  # it is trained again from an older checkpoint
    scheduler = LikeWithLike(cfg, trials, all_known=True)
    bundles = [trials[:1], trials[1:3], trials[3:]]
    states = [TuneTrialState("", stub=True, config={"trials": tuple(some)}) for some in bundles]
    controller = Controller(states)
    for state in states:
        scheduler.on_trial_add(controller, state)
    assert scheduler.on_trial_result(controller, states[0], REPORT) == TrialScheduler.PAUSE
    # The third of them is behind, and waits for nobody.
    assert scheduler.on_trial_result(controller, states[1], REPORT) == TrialScheduler.CONTINUE
    reported(trials[2], 0.9, 0.3)
    assert scheduler.on_trial_result(controller, states[1], REPORT) == TrialScheduler.PAUSE
    reported(trials[3], 0.9, 0.4)
    assert scheduler.on_trial_result(controller, states[2], REPORT) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(controller, states[1], REPORT) == TrialScheduler.CONTINUE
    assert [one.stopped_at for one in trials] == [None, None, 2, 2]


def test_nobody_waits_for_a_trial_that_failed(trial: Trial):
    one, other = like(trial, "one"), like(trial, "other")
    scheduler, controller = started([one, other])
    first, second = controller.get_trials()
    reported(one, 0.5, 0.4)
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.PAUSE
    first.status = TuneTrialState.PAUSED
    scheduler.on_trial_error(controller, second)
    assert scheduler.choose_trial_to_run(controller) is first


def test_nobody_waits_for_a_trial_that_diverged_while_its_bundle_goes_on(trial: Trial):
    one, other, diverged = (like(trial, name) for name in ("one", "other", "diverged"))
    scheduler = LikeWithLike(ASHA, [one, other, diverged], all_known=True)
    bundle = TuneTrialState("", stub=True, config={"trials": (one, diverged)})
    alone = TuneTrialState("", stub=True, config={"trials": (other,)})
    controller = Controller([bundle, alone])
    for state in (bundle, alone):
        scheduler.on_trial_add(controller, state)
    reported(other, 0.3, 0.2)
    assert scheduler.on_trial_result(controller, alone, REPORT) == TrialScheduler.PAUSE
    alone.status = TuneTrialState.PAUSED
    reported(one, 0.5, 0.4)
    reported(diverged, 0.5)
    diverged.stop_at(1, diverged=True)
    assert scheduler.on_trial_result(controller, bundle, REPORT) == TrialScheduler.CONTINUE
    assert scheduler.choose_trial_to_run(controller) is alone
    assert (one.stopped_at, other.stopped_at) == (2, None)


@pytest.mark.parametrize("failed", [[], ["other"]])
def test_a_trial_that_is_tried_again_is_waited_for_again(trial: Trial, failed: list[str]):
    one, other = like(trial, "one"), like(trial, "other")
    scheduler, controller = started([one, other])
    first, second = controller.get_trials()
    reported(one, 0.5, 0.4)
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.PAUSE
    first.status = TuneTrialState.PAUSED
    if failed:  # a fault of its own, as its trainer reports it before it ends
        scheduler.on_trial_result(controller, second, {"failed": failed})
    scheduler.on_trial_error(controller, second)  # so Tune tells of a trainer that is lost
    scheduler.on_trial_add(controller, second)
    second.status = TuneTrialState.RUNNING
    assert scheduler.choose_trial_to_run(controller) is None
    reported(other, 0.3, 0.2)
    assert scheduler.on_trial_result(controller, second, REPORT) == TrialScheduler.CONTINUE
    assert scheduler.choose_trial_to_run(controller) is first
    assert (one.stopped_at, other.stopped_at) == (2, None)
