"""The Pareto front of every group: the trials that no other beats in all that they cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.sweeps.winners import Result, rank

AIMS = {
    "fvu": "FVU",
    "l0": "L0",
    "encoder_parameters": "encoder parameters",
    "encoder_flops_per_token": "encoder FLOPs per token",
}
"""What a trial costs, and its name for people; of each, less is better."""

_SETTINGS = ("trial", "encoder", "h", "m", "n", "activation", "k", "selection", "d_sae")


def front(results: Sequence[Result]) -> list[Result]:
    """Those that no other beats, in their order: none is as good in every aim and better in one."""
    kept: list[tuple[float | int, ...]] = []
    for costs in sorted({_costs(result) for result in results}):
        # Who beats another comes before it in this order, and so does who beats that one.
        if not any(all(a <= b for a, b in zip(other, costs, strict=True)) for other in kept):
            kept.append(costs)
    unbeaten = set(kept)
    return [result for result in results if _costs(result) in unbeaten]


def fronts(results: Sequence[Result]) -> dict[int, list[dict[str, Any]]]:
    """Every group's front over trials trained to the end, by k and then FVU: settings and `AIMS`.

    Empty for a group of which all trials were given up.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for group in sorted({result["group"] for result in results}):
        whole = [r for r in results if r["group"] == group and not rank(r)[0]]
        ordered = sorted(front(whole), key=lambda r: (r["k"], r["fvu"], r["trial"]))
        found[group] = [{key: r[key] for key in (*_SETTINGS, *AIMS)} for r in ordered]
    return found


def to_json(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The content of `pareto.json`."""
    return {
        "version": 1,
        "minimised": list(AIMS),
        "groups": [{"id": group, "front": list(points)} for group, points in found.items()],
    }


def _costs(result: Result) -> tuple[float | int, ...]:
    return tuple(result[aim] for aim in AIMS)
