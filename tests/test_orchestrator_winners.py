"""Which trials are evaluated."""

from typing import Any

from orchestrator.sweeps.winners import winners


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
