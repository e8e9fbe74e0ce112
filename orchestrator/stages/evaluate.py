"""The evaluation stage: every winner on every layer of its group, by a pool of evaluators."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from actors.evaluator import Evaluator, LayerReport
from actors.trial import Trial
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.session import Session
from storage.hygiene import RowFilter

Report = dict[str, Any]
"""The fields of `actors.evaluator.LayerReport`."""

Evaluations = dict[str, dict[int, Report]]
"""Per trial and layer."""


def evaluate(
    session: Session,
    winners: Sequence[Trial],
    row_filter: RowFilter,
    pool: Pool,
    title: str = "evaluate",
) -> Evaluations:
    """Reports of all winners; those that are on disk are not made again.

    But for those that an older version wrote, which lack a measure. `title` is what the stage is called.
    """
    cfg, run = session.cfg, session.run
    pairs = [(trial, layer) for trial in winners for layer in trial.layers]
    missing = [pair for pair in pairs if not _is_whole(_file(run, pair[0].id, pair[1]))]
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
        with session.stage(title, len(missing), "evaluations") as progress:
            jobs = {(trial.folder / "sae", layer): trial.id for trial, layer in missing}
            for job, report in pool.work(Evaluator, arguments, "evaluate", jobs):
                write_json(_file(run, jobs[job], job[1]), asdict(report))
                progress.figures.queues = pool.queues
                progress.advance(1, f"{jobs[job]} layer {job[1]}")
            seconds = progress.seconds
        session.say(f"evaluate  {len(missing)} pairs of winner and layer in {seconds:.0f} s")
    found: Evaluations = {}
    for trial, layer in pairs:
        found.setdefault(trial.id, {})[layer] = read_json(_file(run, trial.id, layer))
    recovered = [r["ce_recovered"] for layers in found.values() for r in layers.values()]
    metrics = {"worst_ce_recovered": min(recovered)} if session.shape.is_causal else {}
    session.tracker.stage(title, params={}, metrics=metrics)
    return found


def reports(run: RunDirectory, trial: str, layers: Sequence[int]) -> dict[int, Report] | None:
    """What is known of a trial on some layers; None unless each was evaluated, by this version."""
    files = {layer: _file(run, trial, layer) for layer in layers}
    if not all(map(_is_whole, files.values())):
        return None
    return {layer: read_json(file) for layer, file in files.items()}


def _file(run: RunDirectory, trial: str, layer: int) -> Path:
    return run.evaluations / trial / f"layer-{layer}.json"


def _is_whole(file: Path) -> bool:
    """Whether it is there, with all that this version measures."""
    return file.is_file() and {field.name for field in fields(LayerReport)} <= set(read_json(file))
