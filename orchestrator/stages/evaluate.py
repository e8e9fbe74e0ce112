"""The evaluation stage: every winner on every layer of its group, by a pool of evaluators."""

from dataclasses import asdict
from typing import Any

from actors.evaluator import Evaluator
from actors.trial import Trial
from orchestrator.pool import Pool
from orchestrator.progress import stage
from orchestrator.run_directory import read_json, write_json
from orchestrator.session import Session
from storage.hygiene import RowFilter

Evaluations = dict[str, dict[int, dict[str, Any]]]
"""Per trial and layer: the fields of `actors.evaluator.LayerReport`."""


def evaluate(
    session: Session, winners: list[Trial], row_filter: RowFilter, pool: Pool
) -> Evaluations:
    """Reports of all winners; those that are on disk are not made again."""
    cfg, run = session.cfg, session.run
    pairs = [(trial, layer) for trial in winners for layer in trial.layers]
    missing = [(t, layer) for t, layer in pairs if not _file(session, t.id, layer).is_file()]
    # Layer by layer: an evaluator keeps what does not depend on the autoencoder.
    missing.sort(key=lambda pair: pair[1])
    if missing:
        if not session.shape.is_causal:
            session.say(
                f"evaluate  {cfg.model.name} is an encoder, which predicts no next token: "
                "cross-entropy is left out"
            )
        if len(missing) < len(pairs):
            n = len(pairs) - len(missing)
            session.say(f"evaluate  {n} evaluations are there already, {len(missing)} to go")
        arguments = (
            *(cfg.model, run.tokens, run.validation, row_filter, cfg.evaluate.sequences),
            *(cfg.harvest.batch_tokens, pool.placement.device, pool.placement.cpus),
        )
        title, unit = "evaluate", "evaluations"
        with run.timed(title), stage(session.console, title, len(missing), unit) as progress:
            jobs = {(trial.folder / "sae", layer): trial.id for trial, layer in missing}
            for job, report in pool.work(Evaluator, arguments, "evaluate", jobs):
                write_json(_file(session, jobs[job], job[1]), asdict(report))
                progress.advance(1, f"{jobs[job]} layer {job[1]}")
            seconds = progress.seconds
        session.say(f"evaluate  {len(missing)} pairs of winner and layer in {seconds:.0f} s")
    found: Evaluations = {}
    for trial, layer in pairs:
        found.setdefault(trial.id, {})[layer] = read_json(_file(session, trial.id, layer))
    recovered = [r["ce_recovered"] for layers in found.values() for r in layers.values()]
    metrics = {"worst_ce_recovered": min(recovered)} if session.shape.is_causal else {}
    session.tracker.stage("evaluate", params={}, metrics=metrics)
    return found


def _file(session: Session, trial: str, layer: int) -> Any:
    return session.run.evaluations / trial / f"layer-{layer}.json"
