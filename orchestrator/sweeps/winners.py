"""Which trials win, by the rule of the configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
"""What `actors.trainer.Trainer.finish` returns."""


def winners(results: Sequence[Result], rule: str) -> list[Result]:
    """The results to evaluate: of each group the best, for each k or over all."""

    def contest(result: Result) -> tuple[int, int]:
        return (result["group"], result["k"] if rule == "lowest_fvu_per_k" else 0)

    chosen: dict[tuple[int, int], Result] = {}
    for result in results:
        champion = chosen.setdefault(contest(result), result)
        if rank(result) < rank(champion):
            chosen[contest(result)] = result
    return [chosen[key] for key in sorted(chosen)]


def rank(result: Result) -> tuple[bool, float, int]:
    """Trained to the end before given up; then the lowest FVU; then the smaller encoder."""
    return result.get("stopped_at") is not None, result["fvu"], result["n_parameters"]
