"""Export: autoencoders of a run as folders that other libraries load, a folder for each layer.

A folder appears whole, after it was opened again and compared on held-out rows, or not at all.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.export_check import check_library
from actors.hook_names import hook_names
from actors.model_origin import licence, revision
from actors.target_library import by_library, interpreter_of
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.progress import stage
from orchestrator.run_directory import RunDirectory, read_summary
from orchestrator.stages.exported_layer import Draft, Exporter, ExportOptions
from orchestrator.stages.group import load_groups
from orchestrator.stages.same_model import check_model, pinned
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.formats import FORMATS
from sae.formats.folding import folded
from sae.formats.selecting import as_topk
from storage.activations import ActivationStore
from storage.files import sync
from storage.tokens import TokenStore


def export(cfg: RunConfig, options: ExportOptions, console: Console) -> list[Path]:
    """Write the folders; returns them.

    Raises:
        UserError: If the run has nothing to export, or the format can't hold it.
        InputError: If a folder computes another function than was trained; nothing of it is left.
    """
    run = RunDirectory.of(cfg)
    if not run.config.is_file():
        raise UserError(f"{run.path} holds no run; begin one with `strata run`")
    run = RunDirectory.claim(cfg)
    cfg = pinned(cfg, run)
    trials = _chosen(run, options.trial)
    tokens = TokenStore.open(run.tokens).spec
    check_model(cfg, run, tokens, ActivationStore.open(run.validation).spec.d_model)
    python = interpreter_of(options.to, options.python)
    with _told_to_the_user():
        found = {trial: checkpoint.load(run.trials / trial / "sae") for trial in trials}
    saes = {trial: sae for trial, (sae, _) in found.items()}
    for trial, sae in saes.items():
        _refuse_what_cannot_be_held(trial, sae, options)
    exporter = Exporter(
        cfg=cfg,
        run=run,
        options=options,
        row_filter=load_groups(run).row_filter,
        tokens=tokens,
        names=hook_names(cfg.model),
        revision=revision(cfg.model),
        licence=licence(cfg.model),
    )
    pairs = [(t, layer) for t, (_, extra) in found.items() for layer in _layers(run, t, extra)]
    root = run.exports / options.to
    with (
        stage(console, "export", len(pairs), "layers") as progress,
        _told_to_the_user(),
        _staged(root) as place,
    ):
        drafts: list[Draft] = []
        for trial, layer in pairs:
            folder = place / trial / f"layer-{layer}"
            drafts.append(exporter.draft(trial, saes[trial], layer, folder))
            progress.advance(1, f"{trial} layer {layer}")
        if python is not None:
            console.print(
                f"export    they are read again by {options.to} in {python}", highlight=False
            )
        _finish(exporter, drafts, saes, python)
    return [root / trial / f"layer-{layer}" for trial, layer in pairs]


def _chosen(run: RunDirectory, trial: str | None) -> list[str]:
    there = sorted(file.parent.name for file in run.trials.glob("*/result.json"))
    if trial is not None:
        if trial not in there:
            raise UserError(
                f"--trial {trial}: {run.path} has no finished trial of that name; it has "
                f"{', '.join(there) or 'none'}: name one of these"
            )
        return [trial]
    if not run.summary.is_file():
        raise UserError(
            f"{run.path} is not finished, so no trial is the best of its group; finish it with `strata run "
            f"{run.path}`, or name a finished trial with --trial ({', '.join(there) or 'there is none yet'})"
        )
    return [group["best"]["trial"] for group in read_summary(run)["groups"]]


def _layers(run: RunDirectory, trial: str, extra: Mapping[str, Any]) -> list[int]:
    """The layers of a trial's autoencoder, as its file says: a folder is named after each."""
    layers = extra.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise UserError(
            f"{run.trials / trial / 'sae'} says that it is of the layers {layers!r}, and layers are numbers; it is "
            "none of this run's: delete the folder of the trial, and `strata sweep` trains it again"
        )
    return layers


def _refuse_what_cannot_be_held(trial: str, sae: SparseAutoencoder, options: ExportOptions) -> None:
    """Before anything is computed."""
    is_kron = sae.cfg.encoder != "dense"
    shown = f"{'Kronecker' if is_kron else 'dense'} {sae.cfg.selection}"
    if options.distil and not is_kron:
        raise UserError(
            f"--distil: the encoder of {trial} is dense already; leave --distil out, or name a trial with a "
            "Kronecker encoder by --trial"
        )
    if options.as_topk and sae.cfg.selection == "topk":
        raise UserError(f"--as-topk: {trial} is TopK already; leave --as-topk out")
    if options.calibrate and (sae.cfg.selection != "batch_topk" or options.as_topk):
        raise UserError(
            f"--calibrate: {trial} ({shown}{', --as-topk' if options.as_topk else ''}) would be exported "
            "without the one threshold of BatchTopK, so there is none to fit; leave --calibrate out"
        )
    with _told_to_the_user():
        why = FORMATS[options.to].refusal(_shape_written(sae, options))
    if why is not None:
        raise UserError(f"--to {options.to} can't hold {trial} ({shown}): {why}")


def _shape_written(sae: SparseAutoencoder, options: ExportOptions) -> SparseAutoencoder:
    """An autoencoder of the architecture that will be written, whatever its weights."""
    shape = folded(sae, next(iter(sae.layer_scale), 0))
    if options.distil:
        cfg = replace(sae.cfg, encoder="dense")
        shape = SparseAutoencoder(cfg, sae.layer_scale or {0: 1.0}, seed=None)
        shape.threshold = sae.threshold.clone()
    return as_topk(shape, sae.cfg.k) if options.as_topk else shape


def _finish(
    exporter: Exporter,
    drafts: list[Draft],
    saes: Mapping[str, SparseAutoencoder],
    python: Path | None,
) -> None:
    """Have the library itself load what was written, if it is at hand; then write the cards."""
    if python is None:
        for draft in drafts:
            exporter.finish(draft, None, None)
        return
    kind = exporter.options.to
    rows = [exporter.rows(d.about.layer, saes[d.about.trial].cfg.d_sae) for d in drafts]
    folders = [draft.folder for draft in drafts]
    with by_library(python, kind, list(zip(folders, rows, strict=True))) as answers:
        for draft, x, (codes, library) in zip(drafts, rows, answers, strict=True):
            about = draft.about
            wanted = saes[about.trial]
            if about.changes:  # what was to be written; the files have been compared with it
                wanted = FORMATS[kind].read(draft.folder, about.layer)
            parity = check_library(kind, library, codes, wanted, about.layer, x)
            exporter.finish(draft, library, parity)


@contextmanager
def _staged(root: Path) -> Iterator[Path]:
    """A folder whose TRIAL/layer-L move to `root` if nothing goes wrong, each at once."""
    staging = root / ".partial"
    shutil.rmtree(staging, ignore_errors=True)  # what a call that was killed has left
    try:
        staging.mkdir(parents=True)
        yield staging
        for folder in sorted(staging.glob("*/layer-*")):
            for file in folder.iterdir():
                sync(file)
            place = root / folder.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                place.rename(folder.with_name(f"former-{folder.name}"))
            folder.rename(place)
            sync(place.parent)
    except OSError as error:
        raise UserError(
            f"{root} can't be written ({error.strerror or error}); nothing of it was kept: make room, or give "
            "the right to write there"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """What `sae` refuses is a user's to mend here."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
