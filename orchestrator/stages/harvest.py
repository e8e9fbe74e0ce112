"""The harvest: text to packed tokens, tokens to activation stores, by a pool of Ray actors.

Two phases (docs/layout.md): the pilot and validation stores hold every layer of a small sample; the
training store, made once the groups are known, holds one activation per token and group.
"""

import shutil
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from actors.harvester import Harvester
from actors.packer import Packer
from actors.row_counts import RowCounter, added, counting_jobs
from orchestrator.planning.rounding import int8_cost, told
from orchestrator.pool import Pool
from orchestrator.progress import Figures
from orchestrator.run_directory import read_json, write_json
from orchestrator.session import Session
from orchestrator.stages.same_tokens import note_tokens
from orchestrator.stores import n_sequences, shards_within, source_of, store_spec
from storage.activations import ActivationStore
from storage.dtypes import power_of_two_scale
from storage.hygiene import RowFilter
from storage.layout import StoreSpec
from storage.metadata import has_metadata
from storage.places import Place
from storage.tokens import TokenStore

CALIBRATION_SEQUENCES = 8  # enough for a layer's mean norm to within its nearest power of two


def pack(session: Session) -> TokenStore:
    """The run's packed tokens, made from the corpus if they are not there yet."""
    cfg, run = session.cfg, session.run
    if not has_metadata(run.tokens):
        packer = Packer(cfg.model, cfg.corpus, session.context)
        counts = n_sequences(cfg, session.context - packer.spec.first_position)
        asked = {split: counts[split] for split in ("train", "validation")}
        total = sum(asked.values()) * session.context
        with session.stage("pack", total, "tokens") as progress:
            packer.pack(run.tokens, asked, cfg.seed, on_tokens=progress.advance)
        session.say(f"pack      {total:,} tokens in contexts of {session.context}")
    tokens = TokenStore.open(run.tokens)
    note_tokens(run, tokens)
    counts = {f"{of}_sequences": tokens.n_sequences(of) for of in ("train", "validation")}
    session.tracker.stage("pack", params={"context": session.context}, metrics=counts)
    return tokens


def harvest_pilot(session: Session, tokens: TokenStore, pool: Pool) -> None:
    """Fill the pilot and validation stores: every layer, a small sample."""
    run = session.run
    there = [path for path in (run.pilot, run.validation) if has_metadata(path)]
    scales = _scales_of(there[0]) if there else _calibrated_scales(session, tokens, pool)
    for name, path in (("pilot", run.pilot), ("validation", run.validation)):
        ActivationStore.create(path, _spec(session, tokens, name, scales))
    _fill(session, "pilot", [run.pilot, run.validation], pool)
    if session.cfg.harvest.dtype == "int8":
        _tell_rounding(session)


def _tell_rounding(session: Session) -> None:
    costs = int8_cost(session.run.validation)
    assert costs is not None
    session.say(f"harvest   int8: rounding alone costs {told(costs)}, on the validation rows")
    session.tracker.metrics(
        {"rounding_fvu": fmean(costs.values()), "rounding_fvu_worst": max(costs.values())}
    )


def harvest_train(
    session: Session,
    tokens: TokenStore,
    groups: tuple[tuple[int, ...], ...],
    row_filter: RowFilter,
    pool: Pool,
) -> None:
    """Fill the training store: one layer's activation per token and group.

    With `harvest.disk_budget` too small for all of it, it is only made, and filled beside the sweep.
    """
    if _filled(session, tokens, "train", groups, pool):
        count(session, row_filter, pool)


def harvest_baselines(
    session: Session, tokens: TokenStore, layers: Sequence[int], pool: Pool
) -> None:
    """Fill the store of the baselines: an activation of each of these layers per token, all of them.

    It is `session.run.train` of a run of baselines, and bound by `harvest.disk_budget` like any.
    """
    _filled(session, tokens, "baselines", tuple((layer,) for layer in layers), pool)


def _filled(
    session: Session,
    tokens: TokenStore,
    name: str,
    groups: tuple[tuple[int, ...], ...],
    pool: Pool,
) -> bool:
    """Make `session.run.train`; whether it is filled, which within a disk budget is done later."""
    spec = train_spec(session, tokens, groups)
    ActivationStore.create(session.run.train, spec)
    if shards_within(session.cfg, spec) is not None:
        return False
    _fill(session, name, [session.run.train], pool)
    # Of a budget that there was; `verify` takes it for a sign that shards may be absent.
    if session.run.ring.folder is not None:
        shutil.rmtree(session.run.ring.folder, ignore_errors=True)
    return True


def train_spec(
    session: Session, tokens: TokenStore, groups: tuple[tuple[int, ...], ...]
) -> StoreSpec:
    """The store to train on, for these groups; scales are the pilot's, which must be there."""
    return _spec(session, tokens, "train", _scales_of(session.run.pilot), groups)


def _scales_of(store: Place) -> dict[int, float]:
    spec = ActivationStore.open(store).spec
    return dict(zip(spec.layers, spec.scales, strict=True))


def count(session: Session, row_filter: RowFilter, pool: Pool) -> None:
    """Say, once, how many rows of the training store are fit."""
    run = session.run
    if run.rows.is_file():
        return
    jobs, parts = counting_jobs(run.train), []
    if not jobs:  # under a disk budget, where all was trained and the store deleted
        return
    with session.stage("count_rows", sum(map(len, jobs)), "shards") as progress:
        found = pool.work(
            *(RowCounter, (run.train, row_filter), "count", jobs),
            n_actors=session.cfg.compute.harvesters,
        )
        for shards, part in found:
            parts.append(part)
            progress.figures.queues = pool.queues
            progress.advance(len(shards))
    counts = added(parts)
    _tell_rows(session, counts)
    write_json(run.rows, counts)


def _tell_rows(session: Session, counts: dict[str, dict[str, int]]) -> None:
    """Say how many rows training will use, and for what reason it leaves others out."""
    total = {key: sum(c[key] for c in counts.values()) for key in next(iter(counts.values()))}
    stored, used = total.pop("stored"), total.pop("used")
    reasons = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in total.items())
    session.say(
        f"hygiene   {used:,} of {stored:,} rows are used; dropped {1 - used / stored:.2%}: {reasons}"
    )
    metrics = {f"dropped_{reason}": float(n) for reason, n in total.items()}
    session.tracker.stage("count_rows", params={}, metrics={})
    session.tracker.metrics({"rows_stored": float(stored), "rows_used": float(used), **metrics})


def _fill(session: Session, name: str, stores: list[Place], pool: Pool) -> None:
    """Write the shards that the stores still miss."""
    opened = [ActivationStore.open(path) for path in stores]
    jobs = [
        (p, shard) for p, store in zip(stores, opened, strict=True) for shard in store.missing()
    ]
    if not jobs:
        return
    done = sum(len(store.committed()) for store in opened)
    if done:
        session.say(f"harvest   {name}: {done} shards are there already, {len(jobs)} to go")
    cfg = session.cfg
    spec_of = {path: store.spec for path, store in zip(stores, opened, strict=True)}
    total = sum(len(spec_of[path].sequences_of(shard)) for path, shard in jobs)
    seconds: dict[str, float] = {"model": 0.0, "write": 0.0}
    rows = clipped = n_bytes = 0
    with session.stage(f"harvest_{name}", total * session.context, "tokens") as progress:
        arguments = harvester_arguments(session, pool)
        receipts = pool.work(
            *(Harvester, arguments, "harvest", jobs), n_actors=cfg.compute.harvesters, overlap=True
        )
        for _, receipt in receipts:
            seconds["model"] += receipt.model_seconds
            seconds["write"] += receipt.write_seconds
            rows, n_bytes = rows + receipt.n_rows, n_bytes + receipt.n_bytes
            clipped += receipt.n_clipped
            found = Figures(n_bytes=n_bytes, queues=pool.queues)
            found.seconds = _of_all(seconds, pool.n_at_work * progress.seconds)
            progress.figures = found
            note = f"{n_bytes / 1e6 / progress.seconds:.0f} MB/s, {found.limit}"
            progress.advance(receipt.n_tokens, note)
        rate, elapsed, limit = progress.rate, progress.seconds, progress.figures.limit
    session.say(
        f"harvest   {name}: {rows:,} rows, {n_bytes / 1e6:,.0f} MB in {elapsed:.0f} s "
        f"({rate:,.0f} tokens/s, {limit})"
    )
    if clipped:
        session.say(
            f"warning: {clipped:,} values were beyond {cfg.harvest.dtype} and are clipped in {name}; "
            "set harvest.dtype to bfloat16 to keep them"
        )
    session.tracker.stage(
        f"harvest_{name}",
        params={
            "dtype": cfg.harvest.dtype,
            "codec": cfg.harvest.codec,
            "hook_points": cfg.model.hook_points or cfg.model.site,
            "shards": len(jobs),
        },
        metrics={
            "tokens_per_second": rate,
            "megabytes": n_bytes / 1e6,
            **{f"{part}_seconds": spent for part, spent in seconds.items()},
        },
    )


def _of_all(seconds: Mapping[str, float], there: float) -> dict[str, float]:
    """Where the time `there` of all harvesters went: they may compute and write at once."""
    return {**seconds, "start and lack of work": max(0.0, there - sum(seconds.values()))}


def _spec(
    session: Session,
    tokens: TokenStore,
    name: str,
    scales: dict[int, float],
    groups: tuple[tuple[int, ...], ...] = (),
) -> StoreSpec:
    return store_spec(
        *(session.cfg, session.shape, name),
        context=tokens.context,
        first_position=tokens.first_position,
        scales=scales,
        groups=groups,
        source=source_of(
            *(session.cfg.model, read_json(session.run.model).get("weights"), tokens.fingerprint)
        ),
    )


def _calibrated_scales(session: Session, tokens: TokenStore, pool: Pool) -> dict[int, float]:
    """Powers of two that bring each layer's activations into float16's best range.

    What a float16 model computes is in its range as it is, and is stored bit for bit.
    """
    layers = range(session.shape.n_layers)
    if session.cfg.harvest.dtype != "float16" or session.cfg.model.dtype == "float16":
        return dict.fromkeys(layers, 1.0)
    sample = np.arange(min(CALIBRATION_SEQUENCES, tokens.n_sequences("train")))
    norms: dict[int, float] = pool.call(
        Harvester, harvester_arguments(session, pool), "mean_norms", tuple(layers), "train", sample
    )
    return {layer: power_of_two_scale(norms[layer], session.shape.d_model) for layer in layers}


def harvester_arguments(session: Session, pool: Pool) -> tuple[Any, ...]:
    """What every harvester is made with."""
    cfg, placement = session.cfg, pool.placement
    batch = cfg.harvest.batch_tokens
    return cfg.model, session.run.tokens, batch, placement.device, placement.cpus
