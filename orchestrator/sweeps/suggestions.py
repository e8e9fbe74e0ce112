"""Trials that Optuna suggests: for each k of each group a study of its own, over FVU and encoder FLOPs.

What was suggested is kept in `suggested.json`, written before the trial begins. A sweep that was killed
tells new studies what came of each, takes up those that have no result yet, and goes on suggesting; every
suggestion has a seed of its own, so that it depends on the configuration and on what was known alone.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from actors.trial import Trial
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import read_json, write_json
from orchestrator.sweeps.axes import FloatRange, IntRange
from orchestrator.sweeps.candidates import PATIENCE, Candidate, candidate, too_narrow
from orchestrator.sweeps.space import Axis


class Suggestions(Searcher):
    """The searcher that Ray Tune asks for trials."""

    def __init__(
        self,
        cfg: RunConfig,
        groups: Sequence[int],
        d_model: int,
        make: Callable[[Candidate], Trial],
        file: Path,
        places: Callable[[], int],
    ) -> None:
        """Take up what was suggested in former calls.

        Args:
            cfg: Of the run.
            groups: All of it.
            d_model: Width of the activations.
            make: Turns a candidate into a trial.
            file: Where suggestions are kept.
            places: How many trials may be at work; more would be suggested knowing less.
        """
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._make, self._file, self._places_now = make, file, places
        self._studies = [
            _Study(cfg, group, k, d_model)
            for group in groups
            for k, _ in cfg.sweep.of_group(group)[0].ends
        ]
        self.wanted = (cfg.sweep.search.trials or 0) * len(self._studies)
        """Trials of the whole sweep."""
        self.trials: list[Trial] = []
        """Those suggested so far, in that order."""
        self._kept: list[dict[str, Any]] = read_json(file, list) if file.is_file() else []
        self._places: dict[str, tuple[_Study, int]] = {}
        by_key = {(study.group, study.k): study for study in self._studies}
        try:
            for entry in self._kept:
                study = by_key[entry["group"], entry["k"]]
                self._remember(study, *study.take_up(entry["params"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is not what was suggested for this sweep ({error!r}); restore it, or delete it with "
                "the folder of trials, and the same command suggests anew"
            ) from None
        for trial in self.trials:
            if trial.result_file.is_file():
                self._tell(trial)
        self._unfinished = [trial for trial in self.trials if not trial.result_file.is_file()]
        self._given: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles searchers into its own state, which nobody reads."""
        return {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Nothing to set: what is compared is known."""
        return True

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride] (FINISHED is a str)
        self, trial_id: str
    ) -> dict[str, tuple[Trial]] | str | None:
        """The next trial: of those that have no result, else one of the study that has the fewest; None: later."""
        if len(self._given) >= max(1, self._places_now()):
            return None
        if self._unfinished:
            trial = self._unfinished.pop(0)
        elif len(self.trials) < self.wanted:
            study = min(self._studies, key=lambda study: study.n_trials)
            number, new, params = study.ask()
            self._kept.append({"group": study.group, "k": study.k, "params": params})
            write_json(self._file, self._kept)
            trial = self._remember(study, number, new)
        else:
            return Searcher.FINISHED
        self._given[trial_id] = trial
        return {"trials": (trial,)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study what came of a trial; of a failed one, that nothing did."""
        self._tell(self._given.pop(trial_id))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all that is to be kept is in the run directory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""

    def _remember(self, study: "_Study", number: int, suggested: Candidate) -> Trial:
        trial = self._make(suggested)
        self.trials.append(trial)
        self._places[trial.id] = study, number
        return trial

    def _tell(self, trial: Trial) -> None:
        study, number = self._places[trial.id]
        result = read_json(trial.result_file) if trial.result_file.is_file() else None
        study.tell(number, result)


class _Study:
    """Optuna's study of one group at one k."""

    def __init__(self, cfg: RunConfig, group: int, k: int, d_model: int) -> None:
        self._cfg, self.group, self.k, self._d_model = cfg, group, k, d_model
        _, self._space = cfg.sweep.of_group(group)
        self._distributions = {name: _distribution(a) for name, a in self._space.axes.items()}
        self._study = optuna.create_study(directions=["minimize", "minimize"])
        self._ids: set[str] = set()

    @property
    def n_trials(self) -> int:
        """Suggested so far; each is another."""
        return len(self._ids)

    def take_up(self, params: Mapping[str, Any]) -> tuple[int, Candidate]:
        """Number and candidate of what was suggested in a former call."""
        running = create_trial(
            state=TrialState.RUNNING, params=dict(params), distributions=self._distributions
        )
        self._study.add_trial(running)
        taken = self._candidate(params)
        self._ids.add(taken.id)
        return len(self._study.trials) - 1, taken

    def ask(self) -> tuple[int, Candidate, dict[str, Any]]:
        """A new suggestion; where Optuna repeats itself, a random one."""
        for attempt in itertools.count():
            name = f"{self._cfg.seed}/{self.group}/{self.k}/{self.n_trials}/{attempt}"
            seed = Random(name).getrandbits(32)
            sampler = optuna.samplers.RandomSampler if attempt else optuna.samplers.TPESampler
            self._study.sampler = sampler(seed=seed)
            asked = self._study.ask(self._distributions)
            suggested = self._candidate(asked.params)
            if suggested.id not in self._ids:
                self._ids.add(suggested.id)
                return asked.number, suggested, asked.params
            self._study.tell(asked.number, state=TrialState.FAIL)
            if attempt == PATIENCE:
                raise too_narrow(self.n_trials, self._cfg)
        raise AssertionError

    def tell(self, number: int, result: Mapping[str, Any] | None) -> None:
        """What came of a suggestion."""
        if result is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, [result["fvu"], result["encoder_flops_per_token"]])

    def _candidate(self, params: Mapping[str, Any]) -> Candidate:
        choice = {name: _value(axis, params[name]) for name, axis in self._space.axes.items()}
        return candidate(self._cfg, self.group, self.k, self._space, choice, self._d_model)


def _distribution(axis: Axis) -> BaseDistribution:
    """What Optuna draws for an axis; of a list the position, as its values need not be plain."""
    values = axis.values
    if isinstance(values, IntRange):
        return IntDistribution(values.min, values.max, log=values.log)
    if isinstance(values, FloatRange):
        return FloatDistribution(values.min, values.max, log=values.log)
    return CategoricalDistribution(range(len(values)))


def _value(axis: Axis, drawn: Any) -> Any:
    if isinstance(axis.values, FloatRange):
        return axis.values.rounded(drawn)
    return drawn if isinstance(axis.values, IntRange) else axis.values[drawn]
