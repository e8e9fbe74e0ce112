"""The dashboard stage: what each latent of each group's best autoencoder does, as pages."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.errors import InputError
from actors.language_model import describe
from actors.latent_contexts import LatentContexts, stored_sequences
from actors.packer import fingerprint, load_tokenizer
from actors.token_text import TokenText
from actors.unembedding import CONVENTION
from orchestrator import cluster
from orchestrator.config import RunConfig
from orchestrator.pages import dashboard as pages
from orchestrator.pool import Pool
from orchestrator.progress import stage
from orchestrator.run_directory import RunDirectory, read_json, read_summary, write_json
from orchestrator.stages.group import load_groups
from orchestrator.stages.same_model import pinned
from storage.activations import ActivationStore
from storage.files import FileRecord, read_parts
from storage.layout import StoreSpec
from storage.tokens import TokenStore

_VERSION = 1  # of the data files; those of another are made again
_SPLIT = "validation"

Group = dict[str, Any]
"""A group of `summary.json`."""


def dashboard(run: RunDirectory, cfg: RunConfig, console: Console) -> Path:
    """Write the dashboard of a finished run, but for the groups that are there already.

    Returns:
        Its page.

    Raises:
        InputError: If the model's tokenizer is not the one that made the run's tokens.
        StoreError: If the validation store or the tokens are gone or damaged.
        UserError: If what the run knows of itself is damaged.
    """
    cfg = pinned(cfg, run)
    tokens, store = TokenStore.open(run.tokens), ActivationStore.open(run.validation)
    text, causal = _text_of(cfg, tokens), describe(cfg.model).is_causal
    groups: list[Group] = read_summary(run)["groups"]
    _write_text(run, store.spec, tokens, text)
    identities = {g["id"]: _identity(run, store.spec, g) for g in groups}
    missing = [g for g in groups if _made(run, g).get("identity") != identities[g["id"]]]
    if len(missing) < len(groups):
        _say(console, f"{len(groups) - len(missing)} of {len(groups)} groups are there already")
    if missing:
        if not causal:
            _say(console, _not_decoded(cfg))
        _write_groups(run, cfg, console, missing, identities, tokens, text)
    _write_pages(run, cfg, store.spec, [_made(run, g)["entry"] for g in groups], causal)
    return run.dashboard / "index.html"


def _text_of(cfg: RunConfig, tokens: TokenStore) -> TokenText:
    """The text of the run's tokens."""
    tokenizer = load_tokenizer(cfg.model)
    now = fingerprint(tokenizer)
    if now != tokens.spec.tokenizer:
        raise InputError(
            f"the tokens of {cfg.run_dir} were made by another tokenizer (fingerprint "
            f"{tokens.spec.tokenizer}) than {cfg.model.name} has now ({now}), so their text can't be "
            "told; restore the tokenizer that the run was made with"
        )
    return TokenText(tokenizer)


def _write_text(run: RunDirectory, spec: StoreSpec, tokens: TokenStore, text: TokenText) -> None:
    """The text that contexts are shown from, a block of sequences at a time."""
    folder = run.dashboard / "data" / "text"
    identity = {"version": _VERSION, "store": spec.digest, "tokenizer": tokens.spec.tokenizer}
    if _read_made(folder).get("identity") == identity:
        return
    shutil.rmtree(folder, ignore_errors=True)
    sequences, step = stored_sequences(spec), pages.block_sequences(tokens.context)
    for block, first in enumerate(range(0, len(sequences), step)):
        some = sequences[first : first + step]
        pages.write_text(run.dashboard, block, some, tokens.ids(_SPLIT, some), text)
    write_json(folder / "made.json", {"identity": identity, "files": _sizes(folder)})


def _write_groups(
    run: RunDirectory,
    cfg: RunConfig,
    console: Console,
    groups: Sequence[Group],
    identities: dict[int, dict[str, Any]],
    tokens: TokenStore,
    text: TokenText,
) -> None:
    """Describe the latents of some groups, in parallel, and write each group as it comes."""
    sequences = stored_sequences(ActivationStore.open(run.validation).spec)
    ids, documents = tokens.ids(_SPLIT, sequences), tokens.documents(_SPLIT, sequences)
    row_filter = load_groups(run).row_filter
    jobs = {_job(run, group): group for group in groups}
    with (
        cluster.connected(cfg.compute),
        stage(console, "dashboard", len(jobs), "groups") as progress,
    ):
        pool = Pool.of_run(cfg, run, partial(_say, console))
        arguments = (
            *(cfg.model, text.vocabulary, run.validation, row_filter),
            *(pool.placement.device, pool.placement.cpus),
        )
        for job, report in pool.work(LatentContexts, arguments, "report", jobs):
            group = jobs[job]
            folder = _folder(run, group)
            shutil.rmtree(folder, ignore_errors=True)
            entry = pages.write_group(run.dashboard, group["id"], report, ids, documents, text)
            made = {"identity": identities[group["id"]], "entry": entry, "files": _sizes(folder)}
            write_json(folder / "made.json", made)
            progress.advance(1, f"group {group['id']}")
        seconds = progress.seconds
    n_latents = sum(_made(run, group)["entry"]["n_latents"] for group in groups)
    _say(console, f"{n_latents:,} latents of {len(groups)} groups in {seconds:.0f} s")


def _write_pages(
    run: RunDirectory, cfg: RunConfig, spec: StoreSpec, entries: list[dict[str, Any]], causal: bool
) -> None:
    context = spec.first_position + spec.rows_per_sequence
    about = {
        "name": run.path.name,
        "model": "/".join(
            Path(cfg.model.name).parts[-2:]
        ),  # of a Hub name all, of a folder the end
        "n_tokens": spec.n_rows,
        "decoded": CONVENTION if causal else None,
        "not_decoded": None if causal else _not_decoded(cfg),
    }
    sizes = {
        "context": context,
        "n_sequences": spec.n_sequences,
        "block": pages.block_sequences(context),
    }
    facts = {**sizes, "not_decoded": about["not_decoded"], "groups": entries}
    pages.write_pages(run.dashboard, facts, about)


def _job(run: RunDirectory, group: Group) -> tuple[Path, tuple[int, ...]]:
    """What describes a group's latents: its best autoencoder and its layers."""
    return run.trials / group["best"]["trial"] / "sae", tuple(group["layers"])


def _identity(run: RunDirectory, spec: StoreSpec, group: Group) -> dict[str, Any]:
    """What the pages of a group were made from; those made from something else are made again."""
    folder, layers = _job(run, group)
    sae = FileRecord.of(read_parts(folder / "sae.safetensors")).xxh3
    return {"version": _VERSION, "sae": sae, "layers": list(layers), "store": spec.digest}


def _folder(run: RunDirectory, group: Group) -> Path:
    return run.dashboard / "data" / f"g{group['id']}"


def _made(run: RunDirectory, group: Group) -> dict[str, Any]:
    """What is said of a group's pages; empty if they are not whole."""
    return _read_made(_folder(run, group))


def _read_made(folder: Path) -> dict[str, Any]:
    """What is said of the data in a folder, written after it; empty if it is not whole."""
    file = folder / "made.json"
    made = read_json(file) if file.is_file() else {}
    return made if made.get("files") == _sizes(folder) else {}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of data."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.js"))}


def _not_decoded(cfg: RunConfig) -> str:
    return (
        f"{cfg.model.name} is an encoder, which has no unembedding that predicts a next token: "
        "decoded tokens are left out"
    )


def _say(console: Console, text: str) -> None:
    console.print(f"dashboard {text}", highlight=False, soft_wrap=True)
