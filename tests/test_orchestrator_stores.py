"""The two phases of a harvest: what their stores hold of which documents, and what they cost."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.language_model import ModelShape
from actors.model_source import ModelSource
from actors.packer import Packer
from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.stores import n_sequences, source_of, store_spec
from storage.activations import ActivationStore
from storage.layout import StoreSpec
from storage.tokens import TokenStore
from tests.stores import encoded
from tests.tokenizers_of_words import byte_pairs, corpus_of, random_texts, saved

CONTEXT = 16


def config(folder: Path, **harvest: object) -> RunConfig:
    return config_file.parse(
        {
            "run_dir": str(folder / "run"),
            "model": {"name": "a/b"},
            "corpus": {"source": "stdlib"},
            "harvest": harvest,
            "sweep": {"d_sae": 64, "k": [4]},
        },
        "test",
    )


def spec(cfg: RunConfig, name: str, d_model: int, groups: int = 0, **changes: int) -> StoreSpec:
    n_layers = max(4, groups)
    shape = ModelShape(n_layers=n_layers, d_model=d_model, longest=2048, vocabulary=300)
    layers = np.array_split(range(n_layers), groups) if groups else []
    return store_spec(
        *(cfg, shape, name),
        **{"context": CONTEXT, "first_position": 1, **changes},
        scales=dict.fromkeys(range(n_layers), 1.0),
        groups=tuple(tuple(group.tolist()) for group in layers),
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"site": "mlp"}},
        {"model": {"hook_points": "h.{layer}"}},
        {"model": {"dtype": "bfloat16"}},
        {"weights": "b"},
        {"tokens": "b"},
    ],
)
def test_whatever_makes_other_activations_makes_another_source(changed: dict[str, Any]):
    model = ModelSource(name="a/b")
    first = source_of(model, "a", "a")
    fingerprints = {"weights": "a", "tokens": "a", **changed}
    other = dataclasses.replace(model, **fingerprints.pop("model", {}))
    assert source_of(other, **fingerprints) != first == source_of(model, "a", "a")


def documents_of(tokens: TokenStore, store: StoreSpec) -> set[int]:
    """Every document that a row of the store is from."""
    found: set[int] = set()
    for shard in range(store.n_shards):
        sequence, position = store.rows_of(shard)
        documents = tokens.documents(store.split, np.arange(tokens.n_sequences(store.split)))
        found |= set(documents[sequence, position].tolist())
    return found


def test_no_document_of_the_validation_slab_is_in_the_pilot_or_trained_on(tmp_path: Path):
    cfg = config(tmp_path, tokens=6000, pilot_tokens=2000, validation_tokens=1500, chunk_mib=0.01)
    counts = n_sequences(cfg, CONTEXT - 1)
    model = saved(byte_pairs("<bos> $A"), tmp_path / "model")
    packer = Packer(model, corpus_of(random_texts(2000), tmp_path), CONTEXT)
    asked = {split: counts[split] for split in ("train", "validation")}
    packer.pack(tmp_path / "tokens.zarr", asked, cfg.seed)
    tokens = TokenStore.open(tmp_path / "tokens.zarr")
    pilot, validation, train = (
        documents_of(tokens, spec(cfg, name, 16, groups))
        for name, groups in (("pilot", 0), ("validation", 0), ("train", 2))
    )
    assert min(map(len, (pilot, validation, train))) > 10
    assert not validation & pilot
    assert not validation & train
    assert pilot < train


@pytest.mark.parametrize(
    ("d_model", "context", "shard_mib", "sequences", "chunks"),
    [
        (768, 512, 128, 11, 16),
        (4096, 1024, 128, 1, 16),  # a sequence is a chunk
        (5120, 1024, 128, 1, 20),  # and from here on larger than chunk_mib
        (8192, 1024, 128, 1, 32),
        (4096, 8192, 128, 1, 8),
        (4096, 8192, 16, 1, 1),
        (4096, 8192, 1024, 1, 64),
        (4096, 32_768, 128, 1, 2),
        (16_384, 32_768, 128, 1, 1),  # larger than four times shard_mib
    ],
)
def test_a_shard_grows_with_long_sequences_to_four_times_what_is_set(
    tmp_path: Path, d_model: int, context: int, shard_mib: int, sequences: int, chunks: int
):
    cfg = config(tmp_path, tokens=10**8, shard_mib=shard_mib)
    store = spec(cfg, "train", d_model, 1, context=context, first_position=0)
    assert (store.sequences_per_chunk, store.chunks_per_shard) == (sequences, chunks)
    kept = spec(cfg, "pilot", d_model, 0, context=context, first_position=0)  # it is not mixed
    assert kept.chunks_per_shard == min(chunks, shard_mib // 8)


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_the_training_store_costs_one_row_per_token_and_group(tmp_path: Path, groups: int):
    """Columns and metadata included; at the default sizes and at small ones that are written."""
    large = spec(
        config(tmp_path, tokens=10_000_000), "train", 768, groups, context=1024, first_position=1
    )
    rows = large.n_rows * groups * 768 * 2
    assert rows < large.n_bytes < 1.02 * rows

    cfg = config(tmp_path, tokens=5000, chunk_mib=0.25, shard_mib=2)
    small = spec(cfg, "train", 768, groups)
    store = ActivationStore.create(tmp_path / "train.zarr", small)
    for shard in range(small.n_shards):
        sequence, position = small.rows_of(shard)
        columns = {
            "sequence": sequence,
            "position": position,
            "token_id": np.zeros(len(sequence), np.uint32),
        }
        x = np.ones((len(sequence), 768), np.float32)
        store.write_shard(shard, encoded(small, shard, dict.fromkeys(small.arrays, x)), columns)
    on_disk = sum(file.stat().st_size for file in store.place.folder.rglob("*") if file.is_file())
    whole_chunks = small.n_chunks * small.chunk_rows * groups * 768 * 2
    assert whole_chunks < on_disk < 1.02 * whole_chunks
