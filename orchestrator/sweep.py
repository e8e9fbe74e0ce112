"""The sweep: every candidate on every group, as Ray Tune trials of the trainer.

What a trial has done lies in its own folder (`actors.trainer`), not in Tune's experiment state, which
is written seconds late: so a killed sweep is continued by starting Tune on the trials that have no
result yet, each of which continues from its own checkpoint.
"""

import itertools
import math
import shutil
from typing import Any

from ray import tune

from actors.errors import InputError
from actors.grouping import Grouping
from actors.trainer import Trainer, Trial
from orchestrator.cluster import Placement
from orchestrator.pool import Pool
from orchestrator.progress import StageProgress, stage
from orchestrator.ring import harvesting_beside
from orchestrator.run_directory import read_json
from orchestrator.session import Session
from orchestrator.stores import shards_within
from orchestrator.tracking import Tracker
from sae.config import KronShape, SaeConfig
from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.hygiene import RowFilter

REPORTS_PER_TRIAL = 20


def candidates(
    session: Session, grouping: Grouping, mean_norm: dict[int, float], row_filter: RowFilter
) -> list[Trial]:
    """Every trial of the run: groups x k x encoders x selections, in a fixed order."""
    cfg, run = session.cfg, session.run
    spec = ActivationStore.open(run.train).spec
    ring = run.ring if shards_within(cfg, spec) else None
    axes = itertools.product(grouping.groups, cfg.sweep.k, cfg.sweep.encoders, cfg.sweep.selection)
    return [
        Trial(
            id=(name := _name(group.id, k, encoder, selection)),
            group=group.id,
            layers=group.layers,
            sae=SaeConfig(
                d_model=session.shape.d_model,
                d_sae=cfg.sweep.d_sae,
                k=k,
                encoder=encoder,
                selection=selection,
                scaling=cfg.sweep.scaling,
            ),
            fit=cfg.train,
            n_steps=math.ceil(cfg.sweep.tokens / cfg.train.batch_tokens),
            seed=cfg.seed,
            layer_scale={
                layer: math.sqrt(session.shape.d_model) / mean_norm[layer] for layer in group.layers
            },
            window_chunks=cfg.sweep.window_chunks,
            checkpoint_seconds=cfg.sweep.checkpoint_seconds,
            train_store=run.train,
            validation_store=run.validation,
            row_filter=row_filter,
            folder=run.trials / name,
            ring=ring,
        )
        for group, k, encoder, selection in axes
    ]


def sweep(session: Session, trials: list[Trial], pool: Pool) -> list[dict[str, Any]]:
    """Results of all trials; those without one are trained first, in parallel.

    Raises:
        RuntimeError: If a trial failed; finished ones are kept.
    """
    missing = [trial for trial in trials if not trial.result_file.is_file()]
    if missing:
        if len(missing) < len(trials):
            n = len(trials) - len(missing)
            session.say(f"sweep     {n} trials are finished already, {len(missing)} to go")
        total = sum(trial.n_steps * trial.fit.batch_tokens for trial in missing)
        pool.free()
        with (
            session.run.timed("sweep"),
            stage(session.console, f"sweep {len(missing)} trials", total, "tokens") as progress,
            harvesting_beside(session, pool),
        ):
            _tune(session, missing, pool.placement, progress)
            rate, seconds = progress.rate, progress.seconds
        session.say(
            f"sweep     {len(missing)} trials in {seconds:.0f} s ({rate:,.0f} tokens/s in all)"
        )
    return [read_json(trial.result_file) for trial in trials]


def winners(results: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """The results to evaluate: of each group the lowest FVU, for each k or over all.

    Ties go to the smaller encoder.
    """

    def contest(result: dict[str, Any]) -> tuple[int, int]:
        return (result["group"], result["k"] if rule == "lowest_fvu_per_k" else 0)

    chosen: dict[tuple[int, int], dict[str, Any]] = {}
    for result in results:
        champion = chosen.setdefault(contest(result), result)
        if _rank(result) < _rank(champion):
            chosen[contest(result)] = result
    return [chosen[key] for key in sorted(chosen)]


def _rank(result: dict[str, Any]) -> tuple[float, int]:
    return result["fvu"], result["n_parameters"]


def _name(group: int, k: int, encoder: str | KronShape, selection: str) -> str:
    if isinstance(encoder, str):
        return f"g{group}-k{k}-{encoder}-{selection}"
    other = "" if encoder.activation == "mand" else f"-{encoder.activation}"
    return f"g{group}-k{k}-kron-{encoder.h}x{encoder.m}x{encoder.n}{other}-{selection}"


def _tune(
    session: Session, trials: list[Trial], placement: Placement, progress: StageProgress
) -> None:
    scratch = session.run.path / "tune"
    shutil.rmtree(scratch, ignore_errors=True)
    by_id = {trial.id: trial for trial in trials}
    trainable = tune.with_parameters(
        TuneTrial, trials=by_id, device=placement.device, n_threads=placement.cpus
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": placement.cpus, "gpu": placement.gpus}),
        param_space={"trial": tune.grid_search(list(by_id))},
        tune_config=tune.TuneConfig(
            metric="fvu",
            mode="min",
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name="experiment",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[_Report(session.tracker, progress, by_id)],
        ),
    )
    results = tuner.fit()
    failed = [trial.id for trial in trials if not trial.result_file.is_file()]
    causes = [getattr(error, "cause", error) for error in results.errors]
    for cause in causes:
        if isinstance(cause, InputError | StoreError):
            raise cause
    if failed:
        why = f":\n{results.errors[0]}" if results.errors else ""
        raise RuntimeError(
            f"{len(failed)} of {len(trials)} trials failed ({', '.join(failed)}); the others are "
            f"kept, and the same command tries these again{why}"
        )
    shutil.rmtree(scratch, ignore_errors=True)


class TuneTrial(tune.Trainable):
    """A `Trainer` as Ray Tune wants it; the process is kept from one trial to the next."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride] (tune.with_parameters)
        self, config: dict[str, Any], trials: dict[str, Trial], device: str, n_threads: int
    ) -> None:
        """Begin or continue the trial that the configuration names."""
        trial = trials[config["trial"]]
        self._stride = math.ceil(trial.n_steps / REPORTS_PER_TRIAL)
        self._trainer = Trainer(trial, device, n_threads)

    def step(self) -> dict[str, Any]:
        """Train a stride; after the last one the result is there."""
        metrics: dict[str, Any] = self._trainer.advance(self._stride)
        if self._trainer.finished:
            metrics = {**metrics, "result": self._trainer.finish(), "done": True}
        return metrics

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial's own checkpoint; Tune's is empty."""
        self._trainer.save()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trainer began where its own checkpoint was."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another trial in the same process."""
        self.setup(new_config)  # pyright: ignore[reportCallIssue] (tune.with_parameters)
        return True


class _Report(tune.Callback):
    """Tells the tracker and the progress bar what trials report."""

    def __init__(self, tracker: Tracker, progress: StageProgress, trials: dict[str, Trial]) -> None:
        self._tracker, self._progress, self._trials = tracker, progress, trials
        self._step: dict[str, int] = {}
        self._left = len(trials)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks into its own state, which nobody reads."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """One report of one trial."""
        mine = self._trials[trial.config["trial"]]
        before = self._step.get(mine.id, 0)
        self._step[mine.id] = max(before, int(result["step"]))
        tokens = (self._step[mine.id] - before) * mine.fit.batch_tokens
        self._tracker.trial_progress(mine.settings(), mine.metrics_file)
        if "result" in result:
            self._left -= 1
            self._tracker.trial_result(mine.settings(), result["result"])
        note = f"{mine.id} fvu {result['fvu']:.4f}, {self._left} to go"
        self._progress.advance(tokens, note)
