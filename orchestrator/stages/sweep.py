"""The sweep: every candidate on every group, as Ray Tune trials of the trainer.

What a trial has done lies in its own folder (`actors.trainer`), not in Tune's experiment state, which
is written seconds late: so a killed sweep is continued by starting Tune on the trials that have no
result yet, each of which continues from its own checkpoint.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.execution import class_cache
from ray.tune.schedulers import TrialScheduler

from actors.bundle import bundles
from actors.errors import InputError
from actors.trial import Trial
from orchestrator.errors import UserError
from orchestrator.node_error import NodeError
from orchestrator.placement import Placement
from orchestrator.planning.memory import kept_chunk_bytes
from orchestrator.pool import Pool
from orchestrator.redaction import is_secret
from orchestrator.run_directory import read_json
from orchestrator.session import Session
from orchestrator.shared_storage import SharedStorage
from orchestrator.stages.group_file import GroupStage
from orchestrator.stages.ring import harvesting_beside
from orchestrator.stores import shards_within, window_chunks
from orchestrator.sweeps.candidates import Candidate, candidates
from orchestrator.sweeps.chunk_keeper import keeping_chunks
from orchestrator.sweeps.data_wait import waiting
from orchestrator.sweeps.places import Places
from orchestrator.sweeps.rank_process import Workplace
from orchestrator.sweeps.save_now import save_now
from orchestrator.sweeps.scheduler import LikeWithLike
from orchestrator.sweeps.suggestions import Suggestions
from orchestrator.sweeps.sweep_report import Report
from orchestrator.sweeps.sweep_view import SweepView
from orchestrator.sweeps.tune_trial import TuneTrial
from orchestrator.sweeps.winners import Result
from storage.activations import ActivationStore
from storage.chunk_source import ChunkSource
from storage.errors import StoreError

RETRIES = 2
"""Of a trial that fails; when a node is lost, its trials have not failed."""


def sweep(session: Session, groups: GroupStage, pool: Pool) -> list[tuple[Trial, Result]]:
    """All trials with their results; those without one are trained first, in parallel.

    Raises:
        UserError: If a trial can't be trained, as it diverges; finished ones are kept, as always.
        RuntimeError: If a trial failed otherwise.
    """
    return pool.placement.elsewhere(lambda: _sweep(session, groups, pool))


def _sweep(session: Session, groups: GroupStage, pool: Pool) -> list[tuple[Trial, Result]]:
    cfg = session.cfg
    placement = Placement.of_trainers(cfg.compute, pool.placement.nodes)
    ids = [group.id for group in groups.grouping.groups]
    d_model, make = session.shape.d_model, _maker(session, groups)
    _warn_of_absent_groups(session, len(ids))
    suggestions = None
    if cfg.sweep.search.method == "optuna":
        kept = session.run.suggestions
        suggestions = Suggestions(cfg, ids, d_model, make, kept, placement.room)
        trials, n_trials = suggestions.trials, suggestions.wanted
    else:
        trials = [make(found) for group in ids for found in candidates(cfg, group, d_model)]
        n_trials = len(trials)
    n_left = n_trials - sum(trial.result_file.is_file() for trial in trials)
    if n_left:
        scheduler = None
        if cfg.sweep.stop.method != "none":
            scheduler = LikeWithLike(cfg.sweep.stop, trials, all_known=suggestions is None)
        train(session, suggestions or trials, n_left, len(ids), pool, scheduler)
    found = [(trial, _result(trial)) for trial in trials]
    if n_left:
        session.say(f"sweep     {waiting(cfg, [result for _, result in found])}")
    _tell_of_stopped(session, found)
    _track(session, [result for _, result in found])
    return found


def _result(trial: Trial) -> Result:
    result = read_json(trial.result_file)
    if result.get("trial") != trial.id:
        raise UserError(
            f"{trial.result_file} is of the trial {result.get('trial')!r}, and its folder is that of {trial.id}; it "
            "was copied or edited: delete it, and the same command makes it again"
        )
    trial.checkpoint_file.unlink(missing_ok=True)  # a crash may have left it, or an older version
    return result


def train(
    session: Session,
    trials: Suggestions | list[Trial],
    n_left: int,
    n_groups: int,
    pool: Pool,
    scheduler: TrialScheduler | None = None,
    title: str = "sweep",
) -> None:
    """Train those of some trials that have no result yet, in parallel, on the store `session.run.train`.

    Args:
        session: Of the run.
        trials: All of them, or what suggests them.
        n_left: How many have no result.
        n_groups: Of the store.
        pool: Freed, so that trials have its place.
        scheduler: Who gives trials up; None: nobody.
        title: What the stage is called.

    Raises:
        UserError: As `sweep`.
        RuntimeError: As `sweep`.
        NodeError: If a node can't do its part; without it they go on.
    """
    known = trials.trials if isinstance(trials, Suggestions) else trials
    waiting_trials = [trial for trial in known if not trial.result_file.is_file()]
    n_ended = len(known) - len(waiting_trials)
    if n_ended:
        session.say(f"{title:<9} {n_ended} trials are finished already, {n_left} to go")
    pool.free()
    view = SweepView(waiting_trials)
    n_tokens = sum(trial.n_steps * trial.fit.batch_tokens for trial in waiting_trials)
    n_tokens += (n_left - len(waiting_trials)) * session.cfg.sweep.tokens
    with (
        session.stage(title, n_tokens, "tokens", view) as bar,
        harvesting_beside(session, pool),
    ):
        placement = Placement.of_trainers(session.cfg.compute, pool.placement.nodes)
        report = Report(session.tracker, view, bar, n_left, placement.room)
        with _shared_chunks(session, placement, n_groups) as shared:
            try:
                _tune(session, trials, n_left, placement, scheduler, report, shared)
            except KeyboardInterrupt:
                session.say(f"{title:<9} interrupted: trials under way write their checkpoints")
                save_now(view.running, report.actors)
                raise
        rate, seconds, limit = bar.rate, bar.seconds, bar.figures.limit
    session.say(
        f"{title:<9} {n_left} trials in {seconds:.0f} s ({rate:,.0f} tokens/s in all, {limit})"
    )


def _maker(session: Session, groups: GroupStage) -> Callable[[Candidate], Trial]:
    """What turns a candidate into a trial of this run."""
    cfg, run = session.cfg, session.run
    spec = ActivationStore.open(run.train).spec
    ring, mixed = run.ring if shards_within(cfg, spec) else None, window_chunks(cfg, spec)
    layers = {group.id: group.layers for group in groups.grouping.groups}
    width, mean_norm = math.sqrt(session.shape.d_model), groups.report.mean_norm

    def make(found: Candidate) -> Trial:
        trial = Trial(
            id=found.id,
            group=found.group,
            layers=layers[found.group],
            sae=found.sae,
            fit=found.fit,
            n_steps=math.ceil(cfg.sweep.tokens / found.fit.batch_tokens),
            seed=cfg.seed,
            layer_scale={layer: width / mean_norm[layer] for layer in layers[found.group]},
            window_chunks=mixed,
            checkpoint_seconds=cfg.sweep.checkpoint_seconds,
            train_store=run.train,
            validation_store=run.validation,
            row_filter=groups.row_filter,
            folder=run.trials / found.id,
            ring=ring,
        )
        trial.forget_result_without_autoencoder()
        return trial

    return make


def _warn_of_absent_groups(session: Session, n_groups: int) -> None:
    for group in session.cfg.sweep.groups:
        if group >= n_groups:
            session.say(
                f"warning: sweep.groups[{group}] is of no group, as there are {n_groups}, from 0 on; "
                "it is not used"
            )


def _tell_of_stopped(session: Session, found: Sequence[tuple[Trial, Result]]) -> None:
    diverged = [trial.id for trial, _ in found if trial.diverged]
    if diverged:
        session.say(
            f"warning: {len(diverged)} of {len(found)} trials diverged and were given up there "
            f"({', '.join(diverged)}); a lower train.lr keeps such from it"
        )
    if session.cfg.sweep.stop.method == "none":
        return
    n_stopped = sum(result["stopped_at"] is not None for _, result in found)
    done = sum(result["tokens"] for _, result in found)
    whole = sum(trial.n_steps * trial.fit.batch_tokens for trial, _ in found)
    session.say(
        f"sweep     {n_stopped} of {len(found)} trials were given up early; all together were trained "
        f"for {done / whole:.0%} of their steps"
    )


def _track(session: Session, results: Sequence[Result]) -> None:
    session.tracker.stage(
        "sweep",
        params={"search": session.cfg.sweep.search.method, "stop": session.cfg.sweep.stop.method},
        metrics={
            "trials": len(results),
            "given_up": sum(result["stopped_at"] is not None for result in results),
            "tokens": sum(result["tokens"] for result in results),
        },
    )


def _shared_chunks(
    session: Session, placement: Placement, n_groups: int
) -> AbstractContextManager[ChunkSource | None]:
    """What trials read together, where the system's memory of files does not do that for them."""
    cfg, store = session.cfg, ActivationStore.open(session.run.train)
    if store.in_place or placement.room() == 1:
        return nullcontext()
    n_bytes = kept_chunk_bytes(cfg, store.spec, min(n_groups, max(1, placement.room())))
    return keeping_chunks(session.run.train, n_bytes)


def _tune(
    session: Session,
    trials: Suggestions | list[Trial],
    n_left: int,
    placement: Placement,
    scheduler: TrialScheduler | None,
    report: Report,
    shared: ChunkSource | None,
) -> None:
    scratch = session.run.path / "tune"
    shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(trials, Suggestions):
        chosen: dict[str, Any] = {"search_alg": trials, "num_samples": n_left}
        space = {}
    else:
        missing = [trial for trial in trials if not trial.result_file.is_file()]
        together = bundles(missing, session.cfg.compute.trials_per_actor)
        chosen, space = {}, {"trials": tune.grid_search(together)}
    trainable = tune.with_parameters(
        TuneTrial,
        workplace=Workplace(
            storage=SharedStorage.of(session.run),
            device=placement.device,
            n_threads=placement.cpus,
            shared=shared,
            grid=session.cfg.compute.ranks,
        ),
        gpus=placement.gpus,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, _resources(placement)),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            reuse_actors=True,
            # Tune would spell the whole trial; its configuration is still a placeholder here.
            trial_dirname_creator=lambda trial: trial.trial_id,
            **chosen,
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[report, Places(placement)],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told below
    # Tune would hand the driver's credentials to trials, by a way that Ray writes into its logs.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in os.environ if is_secret(name)}
    results = tuner.fit()
    known = trials.trials if isinstance(trials, Suggestions) else trials
    failed = [trial.id for trial in known if not trial.result_file.is_file()]
    causes = [getattr(error, "cause", error) for error in results.errors]
    for cause in causes:
        cause = cause.why if isinstance(cause, NodeError) else cause
        if isinstance(cause, InputError | StoreError | UserError):
            raise cause
    if failed:
        told = f"{len(failed)} of {n_left} trials failed ({', '.join(failed)}); the others are kept"
        if causes and all(isinstance(cause, ValueError) for cause in causes):
            raise UserError(
                f"{told}. {causes[0]}. If a setting is the reason, give a sweep without it in a run_dir of "
                "its own; the same command tries these trials again"
            )
        if causes and all(isinstance(cause, RayActorError) for cause in causes):
            raise UserError(
                f"{told}. Their processes ended {RETRIES + 1} times each; mostly memory is the reason: give each "
                "actor more of it (fewer of them by compute.cpus_per_actor or gpus_per_trial, a lower "
                "trials_per_actor, smaller batches); the same command goes on from their checkpoints. Ray says: "
                f"{str(causes[0]).strip().splitlines()[0]}"
            )
        why = f":\n{results.errors[0]}" if results.errors else ""
        raise RuntimeError(f"{told}, and the same command tries these again{why}")
    shutil.rmtree(scratch, ignore_errors=True)


def _resources(placement: Placement) -> tune.PlacementGroupFactory:
    """Of one bundle of trials; Tune asks by placement groups, whose requests an autoscaler goes by."""
    several = len(placement.bundles) > 1
    # Ranks have a place each, near one another; who starts them needs none.
    places: list[dict[str, float]] = [{}, *placement.bundles] if several else placement.bundles
    return tune.PlacementGroupFactory(places, **placement.where)
