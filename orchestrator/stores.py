"""The stores of a run, as specifications: what the plan counts and the harvest fills."""

import hashlib
import math
from itertools import pairwise

from actors.language_model import ModelShape
from actors.model_source import ModelSource
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.sweeps.candidates import largest_batch
from storage.dtypes import stored_dtype
from storage.layout import StoreSpec
from storage.windows import chunks_to_mix, segments

SHARD_GROWTH = 4
"""Times `shard_mib` that a shard may have where single sequences are larger than `chunk_mib`."""


def n_sequences(cfg: RunConfig, rows_per_sequence: int) -> dict[str, int]:
    """Sequences to pack of each split, and to harvest for the pilot."""
    asked = {
        "train": cfg.harvest.tokens,
        "validation": cfg.harvest.validation_tokens,
        "pilot": min(cfg.harvest.n_pilot_tokens, cfg.harvest.tokens),
    }
    return {name: math.ceil(tokens / rows_per_sequence) for name, tokens in asked.items()}


def store_spec(
    cfg: RunConfig,
    shape: ModelShape,
    name: str,
    *,
    context: int,
    first_position: int,
    scales: dict[int, float],
    groups: tuple[tuple[int, ...], ...] = (),
    source: str = "",
) -> StoreSpec:
    """The store `name`: `pilot`, `validation` (an array per layer) or `train` (one per group).

    Args:
        cfg: Of the run.
        shape: Of the model.
        name: Of the store.
        context: Tokens of a sequence.
        first_position: The first position of a sequence that is stored.
        scales: Power of two per layer; those of the store's layers are used.
        groups: Layers of each group, for `train`.
        source: As `source_of` gives it, where model and tokens are known.
    """
    rows = context - first_position
    counts = n_sequences(cfg, rows)
    split = "validation" if name == "validation" else "train"
    layers = tuple(sorted(layer for group in groups for layer in group)) or tuple(
        range(shape.n_layers)
    )
    sequence_bytes = rows * shape.d_model * stored_dtype(cfg.harvest.dtype).itemsize
    chunk_bytes, shard_bytes = (
        mib * 2**20 for mib in (cfg.harvest.chunk_mib, cfg.harvest.shard_mib)
    )
    return StoreSpec(
        d_model=shape.d_model,
        layers=layers,
        groups=groups,
        split=split,
        n_population=counts[split],
        n_sequences=counts[name],
        rows_per_sequence=rows,
        first_position=first_position,
        sequences_per_chunk=max(1, round(chunk_bytes / sequence_bytes)),
        chunks_per_shard=_chunks_per_shard(
            chunk_bytes, shard_bytes, sequence_bytes, is_mixed=name == "train"
        ),
        seed=cfg.seed,
        dtype=cfg.harvest.dtype,
        codec=cfg.harvest.codec,
        scales=tuple(scales[layer] for layer in layers),
        source=source,
    )


def source_of(model: ModelSource, weights: str | None, tokens: str) -> str:
    """A fingerprint of all that activations are made of.

    Args:
        model: Of which the place in every layer and the dtype count.
        weights: What `actors.model_origin.identity` says of it.
        tokens: Of the tokens that it reads.
    """
    parts = (weights, model.site, model.hook_points, model.dtype, tokens)
    return hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def _chunks_per_shard(
    chunk_bytes: float, shard_bytes: float, sequence_bytes: int, is_mixed: bool
) -> int:
    """As many as are set; more bytes where a sequence is larger than a chunk, and more chunks where rows are mixed.

    The larger a chunk is, the fewer a window has room for. It mixes as many sequences as before if a shard,
    whose sequences are all in each of its chunks, has as many more of them (docs/configuration.md).
    """
    growth = max(1.0, sequence_bytes / chunk_bytes) if is_mixed else 1.0
    most = SHARD_GROWTH * shard_bytes / sequence_bytes
    return max(1, int(min(round(growth * shard_bytes / chunk_bytes), most)))


def window_chunks(cfg: RunConfig, spec: StoreSpec) -> int:
    """Chunks of the training store that are mixed at a time, whichever trial reads.

    It must not depend on a setting that may change while a run is under way.
    """
    return cfg.sweep.window_chunks or chunks_to_mix(spec, largest_batch(cfg))


def shards_within(cfg: RunConfig, spec: StoreSpec) -> int | None:
    """Shards of the training store that may be there at a time; None if all may.

    Raises:
        UserError: If these are too few for a segment that is in use and the next.
    """
    budget = cfg.harvest.budget_bytes
    if budget is None or spec.n_bytes <= budget:
        return None
    columns = sum(dtype.itemsize for dtype in spec.columns.values()) * spec.n_rows
    each = spec.shard_bytes(0)
    room = (budget - columns) // each
    sizes = [len(segment) for segment in segments(spec.n_shards, window_chunks(cfg, spec))]
    needed = max(map(sum, pairwise(sizes)), default=sizes[0])
    if room < needed:
        raise UserError(
            f"harvest.disk_budget: {budget:,} bytes have room for {max(0, room)} shards of the training "
            f"store ({each:,} bytes each) beside its columns, and readers need {needed} at a time; raise it "
            f"to {columns + needed * each}, or lower sweep.window_chunks or harvest.shard_mib"
        )
    return room
