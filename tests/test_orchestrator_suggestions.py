"""What Optuna suggests: in the space, learnt from results, and kept over a kill."""

import dataclasses
import json
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from actors.trial import Trial
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.sweeps.candidates import Candidate, candidates
from orchestrator.sweeps.suggestions import Suggestions
from storage.hygiene import Hygiene, RowFilter
from tests.test_orchestrator_config_file import changed, load

D_MODEL = 16


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return space(tmp_path)


def space(folder: Path, **settings: object) -> RunConfig:
    defaults = {
        "d_sae": 64,
        "k": [4, 8],
        "encoders": ["dense", {"kron": {"m": [2, 4], "n": [4]}}],
        "vary": {"train": {"lr": {"min": 1e-4, "max": 1e-1, "log": True}}},
        "search": {"method": "optuna", "trials": 6},
    }
    return load(folder, changed(sweep={**defaults, **settings}))


def suggestions(cfg: RunConfig, folder: Path, groups: tuple[int, ...] = (0, 1)) -> Suggestions:
    def make(found: Candidate) -> Trial:
        return Trial(
            id=found.id,
            group=found.group,
            layers=(0,),
            sae=found.sae,
            fit=found.fit,
            n_steps=1,
            seed=0,
            layer_scale={},
            window_chunks=1,
            checkpoint_seconds=1.0,
            train_store=folder,
            validation_store=folder,
            row_filter=RowFilter(Hygiene(), (), {}),
            folder=folder / "trials" / found.id,
        )

    return Suggestions(cfg, groups, D_MODEL, make, folder / "suggested.json", lambda: 100)


def suggested(searcher: Suggestions, name: str) -> Trial:
    found = searcher.suggest(name)
    assert isinstance(found, dict)
    return found["trials"][0]


def ended(searcher: Suggestions, name: str, trial: Trial) -> None:
    """The trial's result is there: the nearer its rate is to 0.01, the better."""
    assert trial.fit.lr is not None
    fvu = abs(trial.fit.lr - 0.01)
    trial.folder.mkdir(parents=True, exist_ok=True)
    trial.result_file.write_text(json.dumps({**trial.settings(), "fvu": fvu}))
    searcher.on_trial_complete(name)


def test_every_study_gets_its_number_of_different_trials(cfg: RunConfig, tmp_path: Path):
    searcher = suggestions(cfg, tmp_path)
    assert searcher.wanted == 2 * 2 * 6
    for i in range(searcher.wanted):
        ended(searcher, str(i), suggested(searcher, str(i)))
    assert searcher.suggest("more") == Searcher.FINISHED
    assert len({trial.id for trial in searcher.trials}) == searcher.wanted
    for group in (0, 1):
        for k in (4, 8):
            mine = [t for t in searcher.trials if (t.group, t.sae.k) == (group, k)]
            assert len(mine) == 6
    assert all(1e-4 <= trial.fit.lr <= 1e-1 for trial in searcher.trials if trial.fit.lr)


def test_a_killed_sweep_goes_on_with_the_trials_it_had(cfg: RunConfig, tmp_path: Path):
    def course(folder: Path, kill: bool) -> list[str]:
        searcher = suggestions(cfg, folder)
        running = [suggested(searcher, str(i)) for i in range(10)]
        for i, trial in list(enumerate(running))[:8]:
            ended(searcher, str(i), trial)
        if kill:
            searcher = suggestions(cfg, folder)
            assert [trial.id for trial in searcher.trials] == [trial.id for trial in running]
            assert [suggested(searcher, str(i)).id for i in (8, 9)] == [t.id for t in running[8:]]
        for i in range(10, searcher.wanted):
            ended(searcher, str(i), suggested(searcher, str(i)))
        return [trial.id for trial in searcher.trials]

    assert course(tmp_path / "killed", kill=True) == course(tmp_path / "unbroken", kill=False)


def test_a_failed_trial_is_tried_again_by_the_next_call(cfg: RunConfig, tmp_path: Path):
    searcher = suggestions(cfg, tmp_path)
    first, second = suggested(searcher, "a"), suggested(searcher, "b")
    searcher.on_trial_complete("a", error=True)
    ended(searcher, "b", second)
    again = suggestions(cfg, tmp_path)
    assert suggested(again, "c").id == first.id
    assert suggested(again, "d").id not in (first.id, second.id)


def test_what_is_suggested_follows_what_was_learnt(tmp_path: Path):
    cfg = space(tmp_path, k=[4], encoders=["dense"], search={"method": "optuna", "trials": 60})
    searcher = suggestions(cfg, tmp_path, groups=(0,))
    for i in range(60):
        ended(searcher, str(i), suggested(searcher, str(i)))
    rates = [trial.fit.lr for trial in searcher.trials if trial.fit.lr]
    near = [0.005 < rate < 0.02 for rate in rates]
    assert sum(near[:10]) <= 4  # drawn at random: a fifth of the range
    assert sum(near[-20:]) >= 12


def test_a_finite_space_can_be_suggested_whole(tmp_path: Path):
    rates = {"train": {"lr": [1e-3, 1e-2]}}
    search = {"method": "optuna", "trials": 6}
    cfg = space(tmp_path, k=[4], vary=rates, search=search)
    searcher = suggestions(cfg, tmp_path, groups=(0,))
    for i in range(6):
        ended(searcher, str(i), suggested(searcher, str(i)))
    assert len({trial.id for trial in searcher.trials}) == 6


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_ranges_too_narrow_for_the_trials_are_told_before_anything_starts(
    tmp_path: Path, method: str
):
    narrow = {"train": {"lr": {"min": 1e-3, "max": 1.001e-3}}}
    search = {"method": method, "trials": 3}
    cfg = space(tmp_path, k=[4], encoders=["dense"], vary=narrow, search=search)
    with pytest.raises(UserError, match=r"^sweep\.search\.trials: 3 are .* 2 different ones were"):
        list(candidates(cfg, 0, D_MODEL))


def test_another_seed_suggests_others(cfg: RunConfig, tmp_path: Path):
    one = suggested(suggestions(cfg, tmp_path / "a"), "a")
    other = suggested(suggestions(dataclasses.replace(cfg, seed=1), tmp_path / "b"), "a")
    assert one.id != other.id
