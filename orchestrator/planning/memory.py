"""Peak memory of the actors of a run, from its configuration alone.

Counted are the large blocks: weights, what a batch leaves behind, the rows under way. What a process
needs before it has any of them is IMPORTED_BYTES. tests/test_orchestrator_memory.py compares the
figures with real actors in processes of their own.
"""

from dataclasses import dataclass

from actors.cross_entropy import KEPT_LOGITS_BYTES
from actors.grouper import BLOCK_VALUES
from actors.harvester import SHARDS_AT_ONCE
from actors.language_model import ModelShape
from orchestrator.config import RunConfig
from orchestrator.stores import window_chunks
from orchestrator.sweeps.candidates import corners, largest_batch
from sae.losses import auxk_size
from storage.dtypes import stored_dtype
from storage.layout import StoreSpec

IMPORTED_BYTES = 520_000_000
"""Of a process that has imported torch and transformers and loaded nothing."""

KEPT_COLUMN_BYTES = 64 * 2**20
"""Of columns that trainers read together; each is read once in an epoch."""

_FLOAT = 4
_INDEX = 8
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}

_BLOCK_WIDTHS = 16
"""Widths of d_model that a transformer block holds at once per token: an MLP of 4, twice, 4 for attention,
and 4 that the heap was seen to keep beyond."""

_STEP_WIDTHS = 16
"""The same of a training step: the batch, its scaled form, reconstruction, residual, gradients, and what
the heap was seen to keep beyond."""

_ENTRY_BYTES = 80
"""Of a latent in use: value, place, two sorted orders, gradients, and what sorting needs."""

_SCORE_BYTES = 32 * 2**20
"""Blocks of scores that are searched for the largest (`sae.encoders`)."""


@dataclass(frozen=True, kw_only=True)
class ActorMemory:
    """Peak bytes beyond IMPORTED_BYTES of one actor."""

    host: int
    """In main memory, without pages of files that the system takes back."""

    device: int
    """On its GPU; 0 where it computes on the CPU."""


def harvester(
    cfg: RunConfig, shape: ModelShape, n_parameters: int, specs: dict[str, StoreSpec]
) -> ActorMemory:
    """A harvester: the model, a batch in every layer, and the largest shards that meet."""
    weights = n_parameters * _WEIGHT_BYTES[cfg.model.dtype]
    batch = _batch_bytes(cfg, shape) * SHARDS_AT_ONCE  # each thread has a heap, which keeps it
    stages = ((specs["pilot"], specs["validation"]), (specs["train"],))
    shards = max(_shards_under_way(cfg, specs) for specs in stages)
    if cfg.compute.gpus_per_actor:
        copies = _batch_tokens(cfg, shape) * shape.d_model * _FLOAT * shape.n_layers
        return ActorMemory(host=shards + copies, device=weights + batch)
    return ActorMemory(host=shards + weights + batch, device=0)


def _batch_tokens(cfg: RunConfig, shape: ModelShape) -> int:
    return max(cfg.harvest.batch_tokens, cfg.harvest.context or shape.context)


def _batch_bytes(cfg: RunConfig, shape: ModelShape) -> int:
    """Of one forward pass: every layer's output, kept while the next batch is computed."""
    width = shape.d_model * _WEIGHT_BYTES[cfg.model.dtype]
    return _batch_tokens(cfg, shape) * width * (2 * shape.n_layers + _BLOCK_WIDTHS)


def _shards_under_way(cfg: RunConfig, specs: tuple[StoreSpec, ...]) -> int:
    """The largest `SHARDS_AT_ONCE` shards of a stage, encoded, with the places of their rows.

    In a bucket a copy is kept of what may have to be sent once more: of each array that is written at a time.
    """
    sizes: list[int] = []
    for spec in specs:
        noted = 2 * _INDEX + _FLOAT + _INDEX  # where the row comes from and goes; norm and clipped
        stored, n_arrays = spec.d_model * stored_dtype(spec.dtype).itemsize, len(spec.arrays)
        copies = min(cfg.compute.cpus_per_actor, n_arrays) if _in_a_bucket(cfg) else 0
        row = n_arrays * (stored + noted) + copies * stored
        left = spec.n_rows
        for _ in range(min(SHARDS_AT_ONCE, spec.n_shards)):
            sizes.append(min(spec.shard_rows, left) * row)
            left -= spec.shard_rows
    return sum(sorted(sizes)[-SHARDS_AT_ONCE:])


def trainer(
    cfg: RunConfig, shape: ModelShape, train: StoreSpec, n_trainers: int = 1
) -> ActorMemory:
    """A trainer of the largest autoencoders: their state, a step, and a window of chunks.

    Where ranks share an autoencoder, one of them. Chunks that `n_trainers` at a time share are not counted: `shared_bytes` has them.
    """
    largest = max(corners(cfg, shape.d_model), key=lambda sae: (sae.n_parameters, sae.k))
    grid = cfg.compute.ranks
    # All ranks hold the bias of the decoder, and each its share of the rest.
    held = -(-(largest.n_parameters - largest.d_model) // grid.latents) + largest.d_model
    weights = held * _FLOAT
    # Weights and two moments of each, gradients of one; a checkpoint copies all but the gradients.
    state = (3 * cfg.compute.trials_per_actor + 1) * weights
    copy = 3 * weights
    batch = largest_batch(cfg)
    tokens = -(-batch // grid.batch)
    has_auxk = cfg.train.auxk_coefficient > 0 or cfg.sweep.vary.train.auxk_coefficient is not None
    entries = tokens * (largest.k + auxk_size(shape.d_model) * has_auxk // 4)
    step = tokens * shape.d_model * _FLOAT * _STEP_WIDTHS + entries * _ENTRY_BYTES
    step += _SCORE_BYTES * 3 // 2  # the heap was seen to keep none to all of another block
    in_place = not shares_chunks(cfg) or n_trainers > 1
    window = _windows_bytes(cfg, train, in_place) + 2 * batch * shape.d_model * _FLOAT
    if cfg.compute.gpus_per_trainer:
        return ActorMemory(host=window + copy, device=state + copy + step)
    return ActorMemory(host=window + state + max(copy, step), device=0)


def _windows_bytes(cfg: RunConfig, train: StoreSpec, in_place: bool) -> int:
    """The window that is served and the next: what is noted of their rows, and perhaps the rows.

    Chunks that are read in place stay in the system's memory of files, which it takes back.
    """
    noted = min(2 * window_chunks(cfg, train) * train.chunk_rows, train.n_rows) * 3 * _INDEX
    return noted if in_place else noted + _chunk_bytes(cfg, train, 2)


def _chunk_bytes(cfg: RunConfig, train: StoreSpec, n_windows: int) -> int:
    rows = min(n_windows * window_chunks(cfg, train) * train.chunk_rows, train.n_rows)
    return rows * train.d_model * stored_dtype(train.dtype).itemsize


def shares_chunks(cfg: RunConfig) -> bool:
    """Whether trainers share what they read through Ray's object store, and not through files."""
    return cfg.harvest.codec != "none" or _in_a_bucket(cfg)


def _in_a_bucket(cfg: RunConfig) -> bool:
    return "://" in str(cfg.harvest.store or "")


def kept_chunk_bytes(cfg: RunConfig, train: StoreSpec, n_groups: int) -> int:
    """What is kept for trainers at work on some groups: two windows of each, and columns.

    Those that are in step need no more: one window is served, the next is read.
    """
    columns = sum(dtype.itemsize for dtype in train.columns.values()) * train.n_rows
    return n_groups * _chunk_bytes(cfg, train, 2) + min(columns, KEPT_COLUMN_BYTES)


def shared_bytes(cfg: RunConfig, train: StoreSpec, n_groups: int, n_trainers: int) -> int:
    """Shared memory for what trainers read together; 0 if they do not.

    Beside what is kept a third window, as some still use one that others are done with.
    """
    if not shares_chunks(cfg) or n_trainers == 1:
        return 0
    at_work = min(n_groups, n_trainers)
    return kept_chunk_bytes(cfg, train, at_work) + at_work * _chunk_bytes(cfg, train, 1)


def grouper(pilot: StoreSpec) -> ActorMemory:
    """The grouper: two chunks of every layer, a block at work, the columns of the whole pilot."""
    chunk = min(pilot.chunk_rows, pilot.n_rows) * pilot.d_model * _FLOAT
    columns = pilot.n_rows * 4 * _INDEX
    # In float64, with the two that its norms need, and as much again that the heap was seen to keep.
    block = 5 * BLOCK_VALUES * _INDEX
    return ActorMemory(host=chunk * (2 * len(pilot.layers) + 2) + block + columns, device=0)


def evaluator(
    cfg: RunConfig, shape: ModelShape, n_parameters: int, validation: StoreSpec
) -> ActorMemory:
    """An evaluator: the model with its head, the logits of two passes, and an autoencoder."""
    head = shape.vocabulary * shape.d_model
    weights = (n_parameters + head) * _WEIGHT_BYTES[cfg.model.dtype]
    tokens = _batch_tokens(cfg, shape)
    # Of the untouched model and of the changed one; what compares them goes sequence by sequence.
    context = cfg.harvest.context or shape.context
    of_tokens = shape.vocabulary * _FLOAT if shape.is_causal else 0
    logits = (2 * tokens + 4 * context) * of_tokens
    kept = min(KEPT_LOGITS_BYTES, cfg.evaluate.sequences * context * of_tokens)
    block = tokens * shape.d_model * _FLOAT * _BLOCK_WIDTHS
    widest = max(sae.d_sae for sae in corners(cfg, shape.d_model))
    sae = 2 * widest * shape.d_model * _FLOAT
    # The model's passes and the search for latents come one after the other, but the heap keeps of both.
    work = max(logits, block) + _SCORE_BYTES
    chunk = 3 * min(validation.chunk_rows, validation.n_rows) * shape.d_model * _FLOAT
    if cfg.compute.gpus_per_actor:
        return ActorMemory(host=chunk, device=weights + work + kept + sae)
    return ActorMemory(host=weights + work + kept + sae + chunk, device=0)
