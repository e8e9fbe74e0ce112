"""Tokens per second of a harvest against the bare forward pass of the same batches.

Both run in this process, in turns, on as many threads; medians of the pairs' ratios are compared. The
model is the embedded one's architecture scaled up, with random weights: what is stored does not
matter here, only how much.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from actors.harvester import SHARDS_AT_ONCE, Harvester
from actors.model_source import ModelSource
from benchmarks.rows import Row
from benchmarks.worker import ROOT
from storage.activations import ActivationStore
from storage.layout import StoreSpec
from storage.tokens import TokenSpec, TokenStore, TokenWriter


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and of one harvest."""

    d_model: int = 768
    n_layers: int = 12
    context: int = 512
    batch_sequences: int = 8
    shard_sequences: int = 16
    n_shards: int = 2
    n_groups: int = 4

    @property
    def n_sequences(self) -> int:
        """Of one harvest."""
        return self.shard_sequences * self.n_shards

    @property
    def n_tokens(self) -> int:
        """That one harvest puts through the model."""
        return self.n_sequences * self.context

    def __str__(self) -> str:
        return f"d_model {self.d_model}, {self.n_layers} layers, context {self.context}"


GPU_SIZES = (
    Size(batch_sequences=64, shard_sequences=256, n_shards=8),
    Size(
        d_model=2048,
        n_layers=16,
        context=1024,
        batch_sequences=16,
        shard_sequences=64,
        n_shards=8,
    ),
)
"""The CPU's model, and one of a billion weights, for which one takes a GPU."""


def measure(size: Size, pairs: int, threads: int, device: str = "cpu") -> list[Row]:
    """A row for the pilot's form (every layer of every token) and for the training store's."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = "float32" if device == "cpu" else "bfloat16"
        source = ModelSource(name=str(_model(folder / "model", size, dtype, device)), dtype=dtype)
        tokens = _tokens(folder / "tokens.zarr", size)
        harvester = Harvester(
            *(source, tokens, size.batch_sequences * size.context, device, threads)
        )
        bare = AutoModel.from_pretrained(source.name, dtype=dtype).eval().to(device)
        for form, groups in (("every layer", 0), (f"{size.n_groups} groups", size.n_groups)):
            spec = _spec(size, groups)
            times: list[tuple[float, float]] = []
            for turn in range(1 + pairs):
                seconds = [0.0, 0.0]
                for ours in (True, False) if turn % 2 else (False, True):
                    start = time.perf_counter()
                    if ours:
                        _harvest(harvester, folder / "store", spec)
                    else:
                        _forward(bare, tokens, spec, size, device)
                    seconds[not ours] = time.perf_counter() - start
                    shutil.rmtree(folder / "store", ignore_errors=True)
                print(f"  {turn}/{pairs} {form:14} {seconds[0]:7.2f} s, bare {seconds[1]:7.2f} s")
                if turn:
                    times.append((seconds[0], seconds[1]))
            rows.append(
                Row(
                    name=f"harvest of {form}, {size}, {dtype}",
                    against="bare forward pass",
                    ratio=statistics.median(theirs / ours for ours, theirs in times),
                    at_least=0.95 if device == "cpu" else 0.9,
                    aim=None,
                    values=[statistics.median(column) for column in zip(*times, strict=True)],
                    versions={name: version(name) for name in ("torch", "transformers", "zarr")},
                )
            )
    return rows


def _harvest(harvester: Harvester, path: Path, spec: StoreSpec) -> None:
    """A whole store, committed, as an actor with its threads fills it."""
    ActivationStore.create(path, spec)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        list(pool.map(lambda shard: harvester.harvest(path, shard), range(spec.n_shards)))


@torch.inference_mode()
def _forward(model: nn.Module, tokens: Path, spec: StoreSpec, size: Size, device: str) -> None:
    """The same batches through the model, and nothing else."""
    for batch in _batches(tokens, spec, size):
        model(input_ids=batch.to(device), use_cache=False)
    if device != "cpu":
        torch.cuda.synchronize()


def _batches(tokens: Path, spec: StoreSpec, size: Size) -> Iterator[torch.Tensor]:
    store = TokenStore.open(tokens)
    for shard in range(spec.n_shards):
        ids = torch.from_numpy(store.ids("train", spec.sequences_of(shard)))
        yield from ids.split(size.batch_sequences)


def _spec(size: Size, n_groups: int) -> StoreSpec:
    layers = tuple(range(size.n_layers))
    parts = np.array_split(layers, n_groups) if n_groups else []
    return StoreSpec(
        d_model=size.d_model,
        layers=layers,
        groups=tuple(tuple(part.tolist()) for part in parts),
        split="train",
        n_population=size.n_sequences,
        n_sequences=size.n_sequences,
        rows_per_sequence=size.context,
        first_position=0,
        sequences_per_chunk=size.shard_sequences // 2,
        chunks_per_shard=2,
        seed=0,
        dtype="float16",
        scales=(1.0,) * size.n_layers,
    )


def _model(folder: Path, size: Size, dtype: str, device: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        ROOT / "examples/tiny_lm/model",
        hidden_size=size.d_model,
        intermediate_size=4 * size.d_model,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.d_model // 64,
        max_position_embeddings=size.context,
    )
    with torch.device(device):
        AutoModel.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _tokens(path: Path, size: Size) -> Path:
    shape = size.n_sequences, size.context
    ids = np.random.default_rng(0).integers(0, 1000, shape, np.uint32)
    spec = TokenSpec(
        context=size.context, first_position=0, separator_id=None, special_ids=(), tokenizer="none"
    )
    writer = TokenWriter(path, spec, {"train": size.n_sequences})
    writer.append("train", ids, np.zeros_like(ids))
    writer.seal()
    return path
