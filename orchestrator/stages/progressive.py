"""Progressive coding of a finished run: every winner at many sizes, by a pool of progressive coders."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.language_model import describe
from actors.progressive_coder import ProgressiveCoder
from orchestrator import cluster
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.pages.figures.progressive import progressive_figure
from orchestrator.pool import Pool
from orchestrator.progress import stage
from orchestrator.run_directory import RunDirectory, read_json, read_summary, write_json
from orchestrator.session import Session
from orchestrator.stages.group import load_groups
from orchestrator.stages.same_model import pinned
from orchestrator.tracking.tracker import Tracker
from storage.tokens import TokenStore

VERSION = 1
"""Of the files; docs/progressive.md says what they hold."""

SUMMARY_VERSION = 1

Curves = dict[str, list[dict[str, Any]]]
"""Per winner's trial: what the file of each layer of its group holds."""


@dataclass(frozen=True, kw_only=True)
class _Winner:
    trial: str
    layers: tuple[int, ...]
    sae: Path


def progressive(cfg: RunConfig, n_sequences: int, console: Console) -> Curves:
    """Make what is missing of a finished run's `progressive/`, tell MLflow, and return all of it.

    Args:
        cfg: The run's configuration.
        n_sequences: Validation sequences that cross-entropy is over; there may be less.
        console: Where to tell of it.

    Raises:
        UserError: If the run isn't finished, is damaged or another version's, or n_sequences < 1.
    """
    if n_sequences < 1:
        raise UserError(
            f"--sequences {n_sequences}: cross-entropy is over 1 validation sequence or more; give a "
            "number from 1, or leave it out"
        )
    winners = _winners(RunDirectory.of(cfg))
    run = RunDirectory.claim(cfg)
    cfg = pinned(cfg, run)
    shape = describe(cfg.model)
    tracker = Tracker(cfg, run, console)
    session = Session(cfg=cfg, run=run, shape=shape, tracker=tracker, console=console, watchers=())
    try:
        _measure(session, winners, n_sequences)
        curves = {
            w.trial: [read_json(_file(run, w.trial, layer)) for layer in w.layers] for w in winners
        }
        _tell(session, curves)
    finally:
        tracker.finish("FINISHED")  # the run was before, and is
    return curves


def _winners(run: RunDirectory) -> list[_Winner]:
    """The winners of a finished run, from its summary."""
    if not run.summary.is_file():
        raise UserError(
            f"{run.path} holds no finished run, and only a finished one has winners; finish it with "
            f"`strata run {run.path if run.config.is_file() else 'CONFIG.yaml'}`"
        )
    if run.damage.is_file():
        raise UserError(
            f"{run.path}: `strata verify` found its stores damaged; they must be whole; mend them with "
            f"`strata run {run.path}`"
        )
    summary = read_json(run.summary)
    version = summary.get("version") if isinstance(summary, Mapping) else None
    if version != SUMMARY_VERSION:
        raise UserError(
            f"{run.summary} is of version {version}; this Strata reads version {SUMMARY_VERSION}; use the "
            "Strata that made the run, or make it again in a new run_dir"
        )
    summary = read_summary(run)
    winners = [
        _Winner(
            trial=winner["trial"],
            layers=tuple(group["layers"]),
            sae=run.trials / winner["trial"] / "sae",
        )
        for group in summary["groups"]
        for winner in group["winners"]
    ]
    lost = [str(w.sae) for w in winners if not (w.sae / "sae.safetensors").is_file()]
    if lost:
        raise UserError(
            f"{', '.join(lost)}: no autoencoder is there; those of all winners are needed; restore these "
            "folders, or make the run again in a new run_dir"
        )
    return winners


def _measure(session: Session, winners: Sequence[_Winner], n_sequences: int) -> None:
    run, cfg = session.run, session.cfg
    n_sequences = min(n_sequences, TokenStore.open(run.tokens).n_sequences("validation"))
    wanted = n_sequences if session.shape.is_causal else None
    # Autoencoder by autoencoder: a coder keeps the orders of the last one.
    pairs = [(w, layer) for w in winners for layer in w.layers]
    missing = [(w, layer) for w, layer in pairs if not _is_made(_file(run, w.trial, layer), wanted)]
    if wanted is None:
        session.say(
            f"progressive  {cfg.model.name} is an encoder, which predicts no next token: cross-entropy "
            "is left out"
        )
    if len(missing) < len(pairs):
        n_there = len(pairs) - len(missing)
        session.say(f"progressive  {n_there} curves are there already, {len(missing)} to go")
    if not missing:
        return
    row_filter = load_groups(run).row_filter
    with cluster.connected(cfg.compute):
        pool = Pool.of_run(cfg, run, session.say)
        arguments = (
            *(cfg.model, run.tokens, run.pilot, run.validation, row_filter, n_sequences),
            *(cfg.harvest.batch_tokens, pool.placement.device, pool.placement.cpus),
        )
        jobs = {(w.sae, w.layers, layer): w.trial for w, layer in missing}
        with stage(session.console, "progressive", len(jobs), "curves") as progress:
            for job, report in pool.work(ProgressiveCoder, arguments, "read", jobs):
                trial, layer = jobs[job], job[2]
                data = {"version": VERSION, "trial": trial, **asdict(report)}
                write_json(_file(run, trial, layer), data)
                progress.advance(1, f"{trial} layer {layer}")
            seconds = progress.seconds
    session.say(f"progressive  {len(jobs)} pairs of winner and layer in {seconds:.0f} s")


def _is_made(file: Path, n_sequences: int | None) -> bool:
    """Whether a file is there and holds what would be measured now."""
    if not file.is_file():
        return False
    there = read_json(file)
    return (there.get("version"), there.get("n_sequences")) == (VERSION, n_sequences)


def _tell(session: Session, curves: Curves) -> None:
    laws = [reports[0]["power_laws"]["energy"] for reports in curves.values()]
    r_squared = [law["r_squared"] for law in laws if law]
    session.tracker.stage(
        "progressive",
        params={},
        metrics={"least_power_law_r_squared": min(r_squared)} if r_squared else {},
    )
    for trial, reports in curves.items():
        session.tracker.figure(progressive_figure(trial, reports), f"progressive-{trial}.png")


def _file(run: RunDirectory, trial: str, layer: int) -> Path:
    return run.progressive / trial / f"layer-{layer}.json"
