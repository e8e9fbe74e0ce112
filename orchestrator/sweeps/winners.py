"""Which trials win, by the rule of the configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.trial import Trial
from orchestrator.errors import UserError

Result = Mapping[str, Any]
"""What `actors.trainer.Trainer.finish` returns."""


def sound(found: Sequence[tuple[Trial, Result]]) -> list[Result]:
    """The results of the trials that did not diverge: the others' autoencoders are of no use.

    Raises:
        UserError: If those of a whole group did.
    """
    kept = [result for trial, result in found if not trial.diverged]
    lost = {result["group"] for _, result in found} - {result["group"] for result in kept}
    if lost:
        ids = ", ".join(trial.id for trial, result in found if result["group"] in lost)
        groups = "group " + ", ".join(map(str, sorted(lost)))
        raise UserError(
            f"all trials of {groups} diverged ({ids}), so no autoencoder of it can be evaluated; the results of "
            "the others are kept: run again with a lower train.lr, and with train.grad_clip, in a run_dir of its own"
        )
    return kept


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
