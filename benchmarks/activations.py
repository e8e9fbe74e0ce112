"""Activations of a small language model: what the quality benchmark trains on."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.corpus import Corpus, FilesCorpus, StdlibCorpus
from actors.language_model import LanguageModel
from actors.model_source import ModelSource
from actors.packer import Packer
from benchmarks.worker import ROOT
from storage.hygiene import Hygiene, RowFilter
from storage.tokens import TokenStore

SEQUENCES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """A model, a text and a layer."""

    name: str
    model: Path
    corpus: Corpus
    context: int
    layer: int

    @property
    def present(self) -> bool:
        """Whether the model is here; stories260K comes with no checkout."""
        return (self.model / "config.json").is_file()

    def activations(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Rows for training, about `tokens`, and a tenth as many of other documents.

        Special tokens and massive activations are dropped, as a run drops them.
        """
        n_train = max(1, tokens // self.context)
        counts = {"train": n_train, "validation": max(1, n_train // 10)}
        source = ModelSource(name=str(self.model))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokens.zarr"
            Packer(source, self.corpus, self.context).pack(path, counts, seed)
            store = TokenStore.open(path)
            model = LanguageModel(source)
            parts = [self._rows(model, store, split) for split in counts]
        (train, train_ids), (validation, validation_ids) = parts
        median = float(train.norm(dim=1).median())
        keep = RowFilter(Hygiene(), store.special_ids, {self.layer: median})
        return self._kept(train, train_ids, keep), self._kept(validation, validation_ids, keep)

    def _rows(
        self, model: LanguageModel, store: TokenStore, split: str
    ) -> tuple[Tensor, np.ndarray]:
        rows, ids = [], []
        order = np.arange(store.n_sequences(split))
        for part in np.array_split(order, -(-len(order) // SEQUENCES_AT_ONCE)):
            tokens = store.ids(split, part)
            found = model.activations(torch.as_tensor(tokens), [self.layer])[self.layer]
            rows.append(found[:, store.first_position :].flatten(0, 1).float().clone())
            ids.append(tokens[:, store.first_position :].reshape(-1))
        return torch.cat(rows), np.concatenate(ids)

    def _kept(self, rows: Tensor, ids: np.ndarray, keep: RowFilter) -> Tensor:
        layer = np.full(len(ids), self.layer)
        norms = rows.norm(dim=1).numpy()
        mask = keep.keep(ids, np.zeros(len(ids), np.int64), layer, norms)
        return rows[torch.as_tensor(mask)]


PILOTS = (
    Pilot(
        name="tiny_lm, layer 4",
        model=ROOT / "examples/tiny_lm/model",
        corpus=StdlibCorpus(),
        context=256,
        layer=4,
    ),
    Pilot(
        name="stories260K, layer 3",
        model=ROOT.parent / "shared/models/stories260K",
        corpus=FilesCorpus(
            source="files", paths=(str(ROOT.parent / "shared/data/tinystories.jsonl"),)
        ),
        context=256,
        layer=3,
    ),
)


def shuffled(rows: Tensor, batch_rows: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows, epoch after epoch, each row once an epoch; short ends are dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for part in order.split(batch_rows):
            if len(part) == min(batch_rows, len(rows)):
                yield rows[part]
