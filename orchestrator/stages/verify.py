"""Verification of a run's stores: names all damage, and takes it back when the run goes on."""

import os
from dataclasses import asdict
from functools import partial

from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.progress import stage
from orchestrator.run_directory import RunDirectory, read_json, write_json
from storage.errors import StoreError
from storage.metadata import has_metadata
from storage.repair import take_back_shards, take_back_tokens
from storage.verify import Damage, Verification, damaged_shards

MAX_THREADS = 8


def verify(run: RunDirectory, console: Console) -> None:
    """Read everything in the run's stores; keep what is damaged in `damage.json`, for `take_back`.

    Raises:
        UserError: If something is damaged (with array, shard and chunk of each), or there is
            nothing to verify.
    """
    grouped = run.groups.is_file()
    # Under a disk budget only the shards that trials came to were ever written.
    counted = run.rows.is_file() and not (run.path / run.ring.name).is_dir()
    stores = [
        (run.tokens, "token", grouped or has_metadata(run.pilot)),
        *((store, "activation", grouped) for store in (run.pilot, run.validation)),
        (run.train, "activation", counted),
        (run.baselines.train, "activation", False),
    ]
    # Files that no root stands beside count for nothing; of a store that was complete it is missed.
    there = [
        (where, kind, complete)
        for where, kind, complete in stores
        if has_metadata(where) or (complete and where.names())
    ]
    if not there:
        raise UserError(
            f"{run.path} holds no store; give a run directory, or a configuration file whose run "
            "has begun (`strata harvest` begins it)"
        )
    found: dict[str, list[Damage]] = {}
    n_bytes = 0
    for where, kind, complete in there:
        verification = Verification(where, kind, complete=complete)
        with stage(
            console, f"verify {where.name.removesuffix('.zarr')}", verification.n_bytes, "bytes"
        ) as progress:
            for done in verification.run(min(MAX_THREADS, os.cpu_count() or 1)):
                progress.advance(done)
                n_bytes += done
        if verification.damages:
            found[where.name] = verification.damages
    if found:
        raise UserError(f"{_told(run, found)}{_note(run, found)}")
    if run.damage.is_file():
        run.damage.unlink()
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"verify    {', '.join(where.name for where, *_ in there)}: {n_bytes / 1e6:,.0f} MB are as they "
        "were written"
    )
    gone = [store[0].name for store in stores if store[2] and store not in there]
    if gone:
        say(
            f"verify    {', '.join(gone)}: not there any more; an unfinished run writes it again, and a "
            "finished one goes without"
        )


def _note(run: RunDirectory, found: dict[str, list[Damage]]) -> str:
    """Keep what was found for `take_back`; what is to be said if that can't be done."""
    try:
        write_json(
            run.damage, {name: [asdict(d) for d in damages] for name, damages in found.items()}
        )
    except StoreError as error:
        return (
            f"\nBut the harvest does not know of it yet, as {error}: run `strata verify {run.path}` again "
            "first"
        )
    return ""


def _told(run: RunDirectory, found: dict[str, list[Damage]]) -> str:
    lines = [f"  {name}: {damage}" for name, damages in found.items() for damage in damages]
    own = run.baselines.train.name
    again = [
        f"all of {name}"
        if name == run.tokens.name
        else f"{len(damaged_shards(damages))} shards of {name}"
        for name, damages in found.items()
        if name != own
    ]
    mends = [f"`strata harvest {run.path}` writes {', '.join(again)} again"] if again else []
    if own in found:
        mends.append(
            f"`strata evaluate {run.path} --baselines` writes what it still needs of {own}"
        )
    return (
        f"{run.path} is damaged in {len(lines)} places:\n"
        + "\n".join(lines)
        + f"\nNothing was changed; {'; '.join(mends)}"
    )


def take_back(run: RunDirectory, console: Console) -> None:
    """Uncommit what `verify` found damaged, so that the harvest that follows writes it again."""
    if not run.damage.is_file():
        return
    for name, damages in _noted(run).items():
        where = run.store / name
        if where == run.tokens:
            take_back_tokens(where)
        else:
            take_back_shards(where, damages)
        console.print(
            f"harvest   {name}: what `strata verify` found damaged is written again",
            highlight=False,
            soft_wrap=True,
        )
    run.damage.unlink()


def _noted(run: RunDirectory) -> dict[str, list[Damage]]:
    """By store, what the last `verify` found."""
    try:
        return {
            name: [Damage(**{**row, "chunks": tuple(row["chunks"])}) for row in damages]
            for name, damages in read_json(run.damage).items()
        }
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.damage} is not what `strata verify` wrote ({error}), so what is damaged is not known; run "
            f"`strata verify {run.path}` again, and then this"
        ) from error
