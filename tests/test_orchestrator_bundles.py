"""Judging trials that are trained together: each by itself, the bundle going on as one."""

from ray.tune.experiment import Trial as TuneTrialState
from ray.tune.schedulers import TrialScheduler

from actors.trial import Trial
from orchestrator.sweeps.scheduler import LikeWithLike
from tests.test_orchestrator_stopping import ASHA, REPORT, Controller, like, reported, trial

__all__ = ["trial"]  # the fixture


def scheduled(*together: list[Trial]) -> tuple[LikeWithLike, Controller]:
    known = [one for some in together for one in some]
    scheduler = LikeWithLike(ASHA, known, all_known=True)
    states = [TuneTrialState("", stub=True, config={"trials": tuple(t)}) for t in together]
    controller = Controller(states)
    for state in states:
        scheduler.on_trial_add(controller, state)
    return scheduler, controller


def test_a_bundle_waits_while_one_member_has_to(trial: Trial):
    mine, other, rival = (like(trial, name) for name in ("mine", "other", "rival"))
    unlike = like(trial, "unlike", k=8)
    scheduler, controller = scheduled([mine, unlike], [other, rival])
    first, second = controller.get_trials()
    reported(mine, 0.5, 0.4)
    reported(unlike, 0.5, 0.4)  # alone in its field, so it need not wait
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.PAUSE
    first.status, second.status = TuneTrialState.PAUSED, TuneTrialState.PENDING
    assert scheduler.choose_trial_to_run(controller) is second
    second.status = TuneTrialState.RUNNING
    reported(other, 0.6, 0.5)
    reported(rival, 0.7, 0.6)
    assert scheduler.on_trial_result(controller, second, REPORT) == TrialScheduler.CONTINUE
    assert scheduler.choose_trial_to_run(controller) is first
    assert [t.stopped_at for t in (mine, unlike, other, rival)] == [None, None, 2, 2]


def test_whom_a_crash_left_behind_catches_up_first(trial: Trial):
    ahead, behind, elsewhere = (like(trial, name) for name in ("ahead", "behind", "elsewhere"))
    scheduler, controller = scheduled([ahead, behind], [elsewhere])
    first, second = controller.get_trials()
    reported(ahead, 0.5, 0.4)
    reported(behind, 0.5)
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.CONTINUE
    reported(behind, 0.5, 0.5)
    assert scheduler.on_trial_result(controller, first, REPORT) == TrialScheduler.PAUSE
    reported(elsewhere, 0.9, 0.9)
    assert scheduler.on_trial_result(controller, second, REPORT) == TrialScheduler.CONTINUE
    first.status = TuneTrialState.PAUSED
    assert scheduler.choose_trial_to_run(controller) is first
    assert [t.stopped_at for t in (ahead, behind, elsewhere)] == [None, 2, 2]


def test_nobody_waits_for_a_member_that_failed(trial: Trial):
    well, sick = like(trial, "well"), like(trial, "sick")
    scheduler, controller = scheduled([well, sick])
    [state] = controller.get_trials()
    reported(sick, 0.5)
    reported(well, 0.5, 0.4)
    failed = {"failed": ["sick"]}
    assert scheduler.on_trial_result(controller, state, failed) == TrialScheduler.CONTINUE
