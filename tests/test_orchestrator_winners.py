"""Which trials are evaluated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.sweeps.winners import sound, winners
from tests.trials import small_trial


def result(trial: str, group: int, k: int, fvu: float, size: int = 10) -> dict[str, Any]:
    return {"trial": trial, "group": group, "k": k, "fvu": fvu, "n_parameters": size}


RESULTS = [
    result("a", 0, 8, 0.3),
    result("b", 0, 8, 0.2),
    result("c", 0, 16, 0.1),
    result("d", 1, 8, 0.4, size=10),
    result("e", 1, 8, 0.4, size=5),
    result("f", 1, 16, 0.5),
]


def names(results: list[dict[str, Any]]) -> list[str]:
    return [r["trial"] for r in results]


def test_every_k_of_every_group_has_a_winner():
    assert names(winners(RESULTS, "lowest_fvu_per_k")) == ["b", "c", "e", "f"]


def test_or_every_group_has_one():
    assert names(winners(RESULTS, "lowest_fvu")) == ["c", "e"]


def test_a_trial_that_was_given_up_wins_only_where_no_other_is():
    given_up = {**result("early", 0, 8, 0.01), "stopped_at": 5}
    alone = {**result("alone", 0, 64, 0.01), "stopped_at": 5}
    assert names(winners([given_up, *RESULTS, alone], "lowest_fvu_per_k")) == [
        *("b", "c", "alone", "e", "f")
    ]
    assert names(winners([alone, given_up, *RESULTS], "lowest_fvu")) == ["c", "e"]


def test_a_trial_that_diverged_never_wins_and_a_group_of_such_is_refused(tmp_path: Path):
    base = small_trial(tmp_path)
    found = [
        (replace(base, id=r["trial"], folder=tmp_path / r["trial"]), r)
        for r in RESULTS
        if r["k"] == 8
    ]
    for trial, result in found:
        if result["trial"] in ("b", "d"):
            trial.stop_at(3, diverged=True)
    assert names(sound(found)) == ["a", "e"]
    found[-1][0].stop_at(3, diverged=True)
    with pytest.raises(
        UserError, match=r"all trials of group 1 diverged \(d, e\).*lower train\.lr"
    ):
        sound(found)
