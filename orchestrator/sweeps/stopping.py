"""When a trial is given up: rules over what trials of one field have reported.

A field is all trials of one group, k and d_sae: FVU prefers the larger k and the wider dictionary, so no
others can be compared. A rule looks at the curves alone, which lie in the trials' folders. Of asha who
reported first, or how often a sweep was killed, has no part in it (but for trials that Optuna suggests, of
which nobody knows how many more will come); the median is that of the trials which have come as far by then.
"""

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from statistics import fmean, median
from typing import Any

from orchestrator.sweeps.sweep_config import StopConfig

Curve = Sequence[tuple[float, float]]
"""Of a trial: share of its steps that were done, and the FVU there; rising in the first."""

LEAST_PEERS = 3
"""With fewer others the median says nothing."""

_DIGITS = 9
"""Of shares, so that 3 * 0.1 is 0.3."""


class Verdict(Enum):
    """What becomes of a trial after a report."""

    GO = "go"
    WAIT = "wait"
    STOP = "stop"


class Field:
    """Trials that are compared with one another."""

    def __init__(self, cfg: StopConfig, waits: bool) -> None:
        """A field of nobody.

        Args:
            cfg: The rule.
            waits: Whether at a rung of asha one waits for all others that are on their way, which
                takes that all are known from the start.
        """
        self._cfg, self._waits = cfg, waits
        self.curves: dict[str, Curve] = {}
        """Of every trial, the ended ones included; empty before its first report."""
        self._out: set[str] = set()

    def leave(self, trial: str) -> None:
        """Nobody waits for this trial any more: it has ended."""
        self._out.add(trial)

    def come_back(self, trial: str) -> None:
        """It is trained again, as whoever trained it was lost."""
        self._out.discard(trial)

    def has_left(self, trial: str) -> bool:
        """Whether nobody waits for it."""
        return trial in self._out

    def verdict(self, trial: str) -> Verdict:
        """What becomes of a trial that is where its curve ends."""
        if not self.curves[trial]:
            return Verdict.GO
        verdict = self._asha(trial) if self._cfg.method == "asha" else self._median(trial)
        if verdict is Verdict.STOP:
            self.leave(trial)
        return verdict

    def _asha(self, trial: str) -> Verdict:
        """Successive halving: of those that came to a rung, one in `reduction` goes on."""
        *before, (share, _) = self.curves[trial]
        reached = self._rung(share)
        if reached is None or (before and self._rung(before[-1][0]) == reached):
            return Verdict.GO  # under the first rung, or judged there already
        at_rung = {
            name: next(fvu for share, fvu in curve if share >= reached)
            for name, curve in self.curves.items()
            if curve and curve[-1][0] >= reached
        }
        if self._waits and self.curves.keys() - at_rung.keys() - self._out:
            return Verdict.WAIT
        ranking = sorted(at_rung, key=lambda name: (at_rung[name], name))
        n_going_on = math.ceil(len(ranking) / self._cfg.reduction)
        return Verdict.GO if ranking.index(trial) < n_going_on else Verdict.STOP

    def _rung(self, share: float) -> float | None:
        """The highest rung under `share`: grace, grace * reduction, ... under 1."""
        rungs = [self._cfg.grace]
        while (following := round(rungs[-1] * self._cfg.reduction, _DIGITS)) < 1:
            rungs.append(following)
        return max((rung for rung in rungs if rung <= share), default=None)

    def _median(self, trial: str) -> Verdict:
        """Vizier's rule: the best so far against the median of the others' means up to here."""
        curve, share = self.curves[trial], self.curves[trial][-1][0]
        if share < self._cfg.grace:
            return Verdict.GO
        means = [
            fmean(fvu for at, fvu in other if self._cfg.grace <= at <= share)
            for name, other in self.curves.items()
            if name != trial and other and other[-1][0] >= share
        ]
        if len(means) < LEAST_PEERS or min(fvu for _, fvu in curve) <= median(means):
            return Verdict.GO
        return Verdict.STOP


def curve_of(rows: Sequence[Mapping[str, Any]], n_steps: int) -> Curve:
    """The curve that a trial's metrics draw."""
    return [(round(row["step"] / n_steps, _DIGITS), row["fvu"]) for row in rows]
