"""A run as a table of contents: plan, harvest, group, harvest again, sweep, evaluate, summarise.

Every stage does what is missing and nothing else, so the same call continues a run after anything.
"""

from functools import partial

from rich.console import Console

from actors.language_model import describe
from actors.pretrained import check_device_map, check_weights
from orchestrator import cluster
from orchestrator.cluster_metrics import ClusterMetrics
from orchestrator.config import RunConfig
from orchestrator.pages.report import write_report
from orchestrator.planning import plan
from orchestrator.pool import Pool
from orchestrator.progress_file import ProgressFile
from orchestrator.run_directory import RunDirectory, write_json
from orchestrator.session import Session
from orchestrator.stages import harvest, summary
from orchestrator.stages.baselines import baselines, train_baselines
from orchestrator.stages.cards import cards
from orchestrator.stages.evaluate import evaluate
from orchestrator.stages.group import group
from orchestrator.stages.same_model import note_model, pinned
from orchestrator.stages.sweep import sweep
from orchestrator.stages.verify import take_back
from orchestrator.sweeps.front import fronts, to_json
from orchestrator.sweeps.winners import rank, sound, winners
from orchestrator.tracking.environment import note_environment
from orchestrator.tracking.tracker import Tracker

STAGES = ("group", "harvest", "sweep", "run")


def run(cfg: RunConfig, until: str, console: Console, with_baselines: bool = False) -> RunDirectory:
    """Do what an unfinished run lacks, up to and with the stage `until` (one of `STAGES`).

    `with_baselines` also trains every layer an autoencoder of its own, to compare with.
    """
    console.print(f"strata    {cfg.run_dir}: {cfg.model.name}", highlight=False, soft_wrap=True)
    shape = describe(cfg.model)
    check_weights(cfg.model)
    check_device_map(cfg.model)
    figures = plan.plan(cfg, shape)
    plan.refuse_what_cannot_fit(figures, cfg)
    directory = RunDirectory.claim(cfg)
    note_model(cfg, directory)
    cfg = pinned(cfg, directory)
    shape = describe(cfg.model)  # the branch may have moved on
    take_back(directory, console)
    note_environment(directory.environment)
    # It may refuse, and then there is no run in MLflow.
    with (
        ProgressFile.kept(directory) as file,
        cluster.connected(cfg.compute, figures.shared_bytes),
    ):
        say = partial(console.print, highlight=False, soft_wrap=True)
        pool = Pool.of_run(cfg, directory, say)
        tracker = Tracker(cfg, directory, console)
        session = Session(
            cfg=cfg,
            run=directory,
            shape=shape,
            tracker=tracker,
            console=console,
            watchers=(file, ClusterMetrics(directory.path.name)),
        )
        try:
            _stages(session, pool, STAGES.index(until), with_baselines)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        # Finished now, or before and only mended; otherwise it waits to be continued.
        tracker.finish("FINISHED" if directory.summary.is_file() else "SCHEDULED")
    return directory


def _stages(session: Session, pool: Pool, until: int, with_baselines: bool) -> None:
    run = session.run
    tokens = harvest.pack(session)
    harvest.harvest_pilot(session, tokens, pool)
    groups = group(session, tokens, pool)
    if until < STAGES.index("harvest"):
        return
    harvest.harvest_train(session, tokens, groups.partition, groups.row_filter, pool)
    if until < STAGES.index("sweep"):
        return
    found = sweep(session, groups, pool)
    harvest.count(session, groups.row_filter, pool)  # with a disk budget the rows came only now
    for trial, result in found:
        session.tracker.trial_result(trial.settings(), result)
    if until < STAGES.index("run"):
        return
    results = [result for _, result in found]
    chosen = winners(sound(found), session.cfg.sweep.winner)
    judged = [trial for trial, result in found if result in chosen]
    evaluations = evaluate(session, judged, groups.row_filter, pool)
    best = [
        min(
            (p for p in found if p[1] in chosen and p[1]["group"] == group.id),
            key=lambda p: rank(p[1]),
        )
        for group in groups.grouping.groups
    ]
    if with_baselines:
        train_baselines(session, tokens, best, groups.row_filter, pool)
    own = baselines(run, best, evaluations)
    fidelity = cards(session, groups, best, evaluations, own)
    write_json(run.cards, fidelity)
    data = summary.summarise(session, groups, results, chosen, evaluations)
    write_json(run.pareto, to_json(fronts(results)))
    drawn = write_report(run, groups, results, data)
    summary.track(session, results, data, fidelity)
    for name, figure in drawn.items():
        session.tracker.figure(figure, name)
    session.tracker.judged(evaluations)
    session.tracker.winners(data["groups"])
    session.tracker.finish("FINISHED")
    data["mlflow"]["complete"] = session.tracker.complete
    write_json(run.summary, data)
