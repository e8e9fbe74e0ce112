"""Someone's autoencoder, judged on a run's model and validation rows exactly as the run's own are."""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from actors.evaluator import Evaluator
from actors.model_origin import revision
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.labels import figure
from orchestrator.run_directory import RunDirectory, write_json
from orchestrator.stages.evaluate import reports
from orchestrator.stages.group import load_groups
from orchestrator.stages.same_model import check_model, pinned
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.formats import FORMATS, recognise
from sae.formats.origin import Origin, origin
from storage.activations import ActivationStore
from storage.tokens import TokenStore

_COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
    "ce_recovered": "CE recovered",
}


def judge(
    cfg: RunConfig, folder: Path, layer: int | None, same_model: bool, console: Console
) -> Path:
    """Measure an autoencoder of any of the formats; print it beside the run's own, and keep it.

    Args:
        cfg: Of a run whose validation rows are harvested.
        folder: The autoencoder.
        layer: The one that it reads; by default what its files say.
        same_model: Whether the model that its files name is the run's under another name.
        console: Where the table goes.

    Returns:
        The file in `evaluations/foreign/`.

    Raises:
        UserError: If the folder holds no autoencoder that can be read, or one of another model.
    """
    run = RunDirectory.of(cfg)
    if not run.config.is_file() or not run.groups.is_file():
        raise UserError(
            f"{run.path} has no groups of layers yet, and with them which rows are fit; bring it there with "
            f"`strata group {run.path}`"
        )
    run = RunDirectory.claim(cfg)
    cfg = pinned(cfg, run)
    tokens = TokenStore.open(run.tokens)
    stored = ActivationStore.open(run.validation).spec
    check_model(cfg, run, tokens.spec, stored.d_model)
    with _telling_what_is_wrong(folder):
        kind = recognise(folder)
        said = origin(kind, folder)
        layer = _layer(said, layer, stored.layers, folder)
        sae = FORMATS[kind].read(folder, layer)
        _refuse_another_model(
            said, sae, cfg, tokens.spec.tokenizer, stored.d_model, same_model, folder
        )
        broken = [name for name, values in sae.state_dict().items() if not values.isfinite().all()]
    if broken:
        raise UserError(
            f"{folder} holds numbers that are not finite ({', '.join(broken)}); it can't be judged: get it again "
            "from where it came"
        )
    device = "cuda" if cfg.compute.gpus_per_actor and torch.cuda.is_available() else "cpu"
    row_filter = load_groups(run).row_filter
    evaluator = Evaluator(
        *(cfg.model, run.tokens, run.validation, row_filter, cfg.evaluate.sequences),
        *(cfg.harvest.batch_tokens, device, cfg.compute.cpus_per_actor),
    )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint.save(scratch, sae)
        report = asdict(evaluator.evaluate(Path(scratch), layer))
    if not all(math.isfinite(v) for v in report.values() if isinstance(v, float)):
        raise UserError(
            f"{folder} gives reconstructions beyond all numbers on layer {layer} (FVU {report['fvu']}); there is "
            "nothing to compare: check that it was made for activations of this model and layer"
        )
    where = folder.resolve()
    name = f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}-layer-{layer}.json"
    file = run.evaluations / "foreign" / name
    write_json(file, {"sae": str(where), "format": kind, "layer": layer, **report})
    console.print(_table(run, f"{where.name} ({kind})", layer, report))
    console.print(f"Evaluation: {file}", soft_wrap=True, highlight=False)
    return file


@contextmanager
def _telling_what_is_wrong(folder: Path) -> Iterator[None]:
    """Files of others may hold anything in the place of anything.

    Raises:
        UserError: In place of whatever reading them raises, with the folder's name.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        text = str(error)
        if str(folder) not in text:
            text = f"{folder}: {text}. Its files say so: fetch or export it again, or correct them"
        raise UserError(text) from error
    except (
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise UserError(
            f"{folder} can't be read as an autoencoder ({type(error).__name__}: {error}); its files are damaged, "
            "or hold something else than their format asks for there: fetch or export it again"
        ) from error


def _layer(said: Origin, asked: int | None, layers: tuple[int, ...], folder: Path) -> int:
    layer = said.layer if asked is None else asked
    if layer is None:
        raise UserError(
            f"the files of {folder} do not say which layer it reads; give it with --layer "
            f"({layers[0]} to {layers[-1]})"
        )
    if layer not in layers:
        raise UserError(
            f"{folder} is for layer {layer}, and the run's validation rows are of layers "
            f"{', '.join(map(str, layers))}; give one of these with --layer if its files are wrong, or judge it "
            "in a run of its own model"
        )
    if asked is not None and said.layer not in (None, asked):
        raise UserError(
            f"--layer {asked}: {said.file} says that {folder} reads layer {said.layer}; leave --layer out, or "
            "give the folder of that layer"
        )
    return layer


def _refuse_another_model(
    said: Origin,
    sae: SparseAutoencoder,
    cfg: RunConfig,
    tokenizer: str,
    d_model: int,
    same_model: bool,
    folder: Path,
) -> None:
    mine = cfg.model.name
    if sae.d_model != d_model:
        raise UserError(
            f"{folder} reads activations of width {sae.d_model}, and those of {mine} have {d_model}; judge it "
            "in a run of the model it was trained on"
        )
    if said.tokenizer not in (None, tokenizer):
        raise UserError(
            f"{folder} was trained on tokens of a tokenizer with the fingerprint {said.tokenizer}, and this "
            f"run's are made by {tokenizer}; judge it in a run with the tokenizer it was trained with"
        )
    if same_model:
        return
    if said.model is not None and _base(said.model) != _base(mine):
        raise UserError(
            f"{said.file} says that it was trained on {said.model}, and the run's model is {mine}; judge it in "
            "a run of its own model, or give --same-model if these are two names of one"
        )
    here = revision(cfg.model)
    if None not in (said.revision, here) and said.revision != here:
        raise UserError(
            f"{folder} was trained on revision {said.revision} of {said.model}, and the run's is {here}; set "
            "model.revision in a run of its own, or give --same-model if the weights are the same"
        )


def _base(name: str) -> str:
    return Path(name).name.lower()


def _table(run: RunDirectory, name: str, layer: int, report: Mapping[str, Any]) -> Table:
    """It and the run's own autoencoders on the same layer."""
    table = Table(title=f"Layer {layer}", title_justify="left", pad_edge=False)
    for column in ("autoencoder", *_COLUMNS.values()):
        table.add_column(column, justify="left" if column == "autoencoder" else "right")
    known = {
        file.parent.name: reports(run, file.parent.name, [layer])
        for file in sorted(run.evaluations.glob(f"*/layer-{layer}.json"))
    }
    own = {name: found[layer] for name, found in known.items() if found}
    for label, found in {name: report, **own}.items():
        table.add_row(label, *(figure(found.get(key), ".4f") for key in _COLUMNS))
    return table
