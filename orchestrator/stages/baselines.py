"""Baselines: every layer gets an autoencoder of its own, with its group's configuration and budget.

What sharing an autoencoder costs is only known against these. A layer that is alone in its group has
one already: its group's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.trial import Trial
from orchestrator.errors import UserError
from orchestrator.labels import size
from orchestrator.planning.disk import bytes_under, free_disk_bytes, trials_bytes
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.session import Session
from orchestrator.stages import harvest
from orchestrator.stages.evaluate import Evaluations, evaluate, reports
from orchestrator.stages.sweep import train
from orchestrator.stores import shards_within
from storage.hygiene import RowFilter
from storage.layout import StoreSpec
from storage.sizes import store_bytes
from storage.tokens import TokenStore


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One layer's own autoencoder."""

    trial: str
    result: Mapping[str, Any]
    report: Mapping[str, Any]
    """Of its evaluation on the layer."""


Best = Sequence[tuple[Trial, Mapping[str, Any]]]
"""Of every group the best trial and its result."""


def train_baselines(
    session: Session, tokens: TokenStore, best: Best, row_filter: RowFilter, pool: Pool
) -> None:
    """Harvest, train and evaluate what is missing of the baselines of all layers that share.

    Raises:
        UserError: If the disk has no room for them, or one diverges.
    """
    run = session.run.baselines
    session = replace(session, run=run, tracker=session.tracker.of_baselines(run))
    layers = [layer for trial, _ in best for layer in _sharing(trial)]
    if not layers:
        session.say("baselines every layer is alone in its group, which is its baseline")
        return
    spec = harvest.train_spec(session, tokens, tuple((layer,) for layer in sorted(layers)))
    ring = run.ring if shards_within(session.cfg, spec) else None
    trials = [
        replace(
            trial,
            id=_id(trial, layer),
            group=spec.layers.index(layer),
            layers=(layer,),
            n_steps=result["tokens"] // trial.fit.batch_tokens,
            layer_scale={layer: trial.layer_scale[layer]},
            train_store=run.train,
            folder=run.trials / _id(trial, layer),
            ring=ring,
        )
        for trial, result in best
        for layer in _sharing(trial)
    ]
    for trial in trials:
        trial.forget_result_without_autoencoder()
    todo = [trial for trial in trials if not trial.result_file.is_file()]
    if todo:
        _refuse_what_cannot_fit(session, spec, todo, pool.placement.room())
        harvest.harvest_baselines(session, tokens, spec.layers, pool)

    def train_missing() -> None:
        n_left = sum(not trial.result_file.is_file() for trial in trials)
        if n_left:
            train(session, trials, n_left, len(layers), pool, title="baselines")

    pool.placement.elsewhere(train_missing)
    diverged = [trial.id for trial in trials if trial.diverged]
    if diverged:
        raise UserError(
            f"{len(diverged)} of {len(trials)} baselines diverged ({', '.join(diverged)}), and none may be judged by "
            "what is left of them; run again with a lower train.lr, and with train.grad_clip, in a run_dir of its own"
        )
    for trial in trials:
        session.tracker.trial_result(trial.settings(), read_json(trial.result_file))
    session.tracker.judged(evaluate(session, trials, row_filter, pool, "evaluate_baselines"))


def baselines(
    run: RunDirectory, best: Best, evaluations: Evaluations
) -> dict[int, Baseline] | None:
    """Every layer's baseline; None unless all are trained and evaluated.

    Args:
        run: Where.
        best: The best of every group.
        evaluations: Of these at least.
    """
    found: dict[int, Baseline] = {}
    for trial, result in best:
        if not _sharing(trial):
            [(layer, report)] = evaluations[trial.id].items()
            found[layer] = Baseline(trial=trial.id, result=result, report=report)
        for layer in _sharing(trial):
            name = _id(trial, layer)
            known, file = reports(run.baselines, name, [layer]), run.baselines.trials / name
            if known is None or not (file / "result.json").is_file():
                return None
            own = read_json(file / "result.json")
            found[layer] = Baseline(trial=name, result=own, report=known[layer])
    return found


def _sharing(trial: Trial) -> tuple[int, ...]:
    """The layers of a trial that need a baseline."""
    return trial.layers if len(trial.layers) > 1 else ()


def _id(trial: Trial, layer: int) -> str:
    return f"baseline-l{layer}-{trial.id.removeprefix(f'g{trial.group}-')}"


def _refuse_what_cannot_fit(
    session: Session, spec: StoreSpec, trials: Sequence[Trial], places: int
) -> None:
    """Compare what is still to be written with the room on this machine's disk."""
    run, budget = session.run, session.cfg.harvest.budget_bytes
    store = sum(store_bytes(spec).values())
    if budget is not None and spec.n_bytes > budget:
        store = budget
    at_once = places * session.cfg.compute.trials_per_actor
    needed = {"trials": trials_bytes(session.cfg, [trial.sae for trial in trials], at_once)}
    if run.store.folder is not None:
        needed["baselines.zarr"] = max(0, store - bytes_under(run.store.folder / "baselines.zarr"))
    free = free_disk_bytes(run.path)
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {size(n)}" for name, n in needed.items())
        raise UserError(
            f"the baselines of {len(spec.layers)} layers need {size(sum(needed.values()))} more of disk "
            f"({parts}), and {run.path} has {size(free)}; free as much, or set harvest.disk_budget or "
            "harvest.store, which may change: --set harvest.disk_budget=10GB"
        )
