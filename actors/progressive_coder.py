"""Reads one autoencoder at many sizes on one layer: pruned in several orders, or by its prefixes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from actors.cross_entropy import CrossEntropy
from actors.errors import InputError
from actors.fidelity import kept_rows
from actors.language_model import LanguageModel, describe
from actors.model_source import ModelSource
from actors.progressive_report import CurvePoint, ImportanceLaw, ProgressiveReport
from actors.saved import load_autoencoder
from actors.splice import Replacement
from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig
from sae.metrics import LatentCounts, ReconstructionMetrics
from sae.progressive import (
    decoder_importance,
    decoder_spectrum,
    evaluate_prefixes,
    importance,
    reconstruct_prefixes,
    reconstruct_subset,
    rsa,
)
from storage.activations import ActivationStore
from storage.hygiene import RowFilter
from storage.places import Location
from storage.tokens import TokenStore

NESTED = "nested"
"""The order in which latents stand."""

HALVINGS = 5
IMPORTANCE_ROWS = 20_000  # of each layer: a latent of one token in 2000 is met ten times
RANDOM_SEED = 0
RSA_ROWS = 1000  # it compares every pair


@dataclass(frozen=True)
class _Ranked:
    """What of an autoencoder is the same on all layers of its group."""

    folder: Path
    layers: tuple[int, ...]
    sae: SparseAutoencoder
    orders: dict[str, Int[Tensor, " d_sae"]]
    laws: dict[str, ImportanceLaw | None]
    n_rows: int


class ProgressiveCoder:
    """One language model, with its head if it predicts; reads any number of autoencoders.

    A plain class: tests call it in process. It keeps the last autoencoder's orders, so ask for one
    autoencoder's layers after the other.
    """

    def __init__(
        self,
        model: ModelSource,
        tokens: Location,
        pilot: Location,
        validation: Location,
        row_filter: RowFilter,
        n_sequences: int,
        batch_tokens: int,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Load the model and open the stores.

        Args:
            model: The model that the activations are from.
            tokens: Token store, whose validation split cross-entropy is measured on.
            pilot: Activation store that the orders are found on: other documents than those of
                `validation`, or the order would know what it is judged by.
            validation: Activation store that everything else is measured on.
            row_filter: The one the autoencoders were trained with.
            n_sequences: To measure cross-entropy on, spread evenly over the split.
            batch_tokens: Tokens of a forward pass; a whole sequence at least.
            device: For the model and the autoencoders.
            n_threads: Of torch on the CPU.

        Raises:
            InputError: If the model can't be loaded.
            StoreError: If a store is not there.
        """
        torch.set_num_threads(n_threads)
        shape = describe(model)
        self._d_model = shape.d_model
        self._cross_entropy = (
            CrossEntropy(
                LanguageModel(model, device, head=True),
                TokenStore.open(tokens),
                row_filter,
                n_sequences,
                batch_tokens,
            )
            if shape.is_causal
            else None
        )
        self._pilot = ActivationStore.open(pilot)
        self._validation = ActivationStore.open(validation)
        self._row_filter, self._device = row_filter, device
        self._ranked: _Ranked | None = None

    def read(self, sae_folder: Path, layers: tuple[int, ...], layer: int) -> ProgressiveReport:
        """Measure the autoencoder in a folder at all sizes on one of its layers.

        Args:
            sae_folder: Where it was saved.
            layers: Of its group: latents are ranked by what they do on all of them, so that a size
                means the same latents on every layer.
            layer: The one to measure.

        Raises:
            InputError: If the folder holds no autoencoder, it was made for another width, the row
                filter keeps no row of a layer, or zeros in place of the layer don't harm the model.
            ValueError: If the autoencoder has no scale for a layer.
            StoreError: If a store lacks a layer or a shard.
        """
        if self._ranked is None or (self._ranked.folder, self._ranked.layers) != (
            sae_folder,
            layers,
        ):
            self._ranked = self._rank(sae_folder, layers)
        sae, orders = self._ranked.sae, self._ranked.orders
        measured, sample = self._reconstructed(sae, orders, layer)
        curves, ce_whole = {}, self._ce(sae, layer, None)
        for name, by_size in measured.items():
            points, order = [], orders[name]
            again = reconstruct_prefixes(sae, sample, _ids(sample, layer), order, tuple(by_size))
            for (size, metrics), (_, out) in zip(by_size.items(), again, strict=True):
                whole = size == sae.cfg.d_sae
                ce = ce_whole if whole else self._ce(sae, layer, order[:size])
                points.append(
                    CurvePoint(
                        size=size,
                        fvu=metrics.fvu,
                        l0=metrics.l0,
                        rsa=_rsa(sample, out.x_hat),
                        ce=ce,
                        ce_recovered=None if ce is None else self._recovered(layer, ce),
                    )
                )
            curves[name] = tuple(points)
        ce = self._cross_entropy
        return ProgressiveReport(
            layer=layer,
            d_sae=sae.cfg.d_sae,
            prefixes=sae.cfg.prefixes,
            n_importance_rows=self._ranked.n_rows,
            n_rows=next(iter(measured["energy"].values())).n_tokens,
            n_rsa_rows=len(sample),
            n_sequences=ce.n_sequences if ce else None,
            n_tokens=ce.n_tokens if ce else None,
            ce_clean=ce.clean if ce else None,
            ce_zero=ce.zeroed(layer) if ce else None,
            curves=curves,
            power_laws=self._ranked.laws,
        )

    def _rank(self, folder: Path, layers: tuple[int, ...]) -> _Ranked:
        sae = load_autoencoder(folder, self._device, self._d_model)
        counts = LatentCounts(sae.cfg.d_sae)
        for layer in layers:
            for x in self._rows(self._pilot, layer, IMPORTANCE_ROWS):
                counts.update(sae.reconstruct(x, _ids(x, layer)).latents)
        laws = {
            name: ImportanceLaw.of(importance(counts, name)) for name in ("energy", "frequency")
        }
        # Centred rows of d_sae latents span d_sae - 1 directions at most.
        laws["spectrum"] = ImportanceLaw.of(decoder_spectrum(sae.w_dec)[: sae.cfg.d_sae - 1])
        return _Ranked(folder, layers, sae, latent_orders(sae, counts), laws, counts.n_tokens)

    def _reconstructed(
        self, sae: SparseAutoencoder, orders: dict[str, Tensor], layer: int
    ) -> tuple[dict[str, dict[int, ReconstructionMetrics]], Tensor]:
        """Metrics for each order and size over all rows, and the rows that RSA is to be over."""
        measured = {
            name: {size: ReconstructionMetrics() for size in sizes(sae.cfg, name)}
            for name in orders
        }
        sample, n_seen = [], 0
        stride = -(-self._validation.spec.n_rows // RSA_ROWS)
        for x in self._rows(self._validation, layer):
            for name, order in orders.items():
                parts = evaluate_prefixes(sae, x, _ids(x, layer), order, tuple(measured[name]))
                for size, part in parts:
                    measured[name][size].merge(part)
            sample.append(x[-n_seen % stride :: stride])
            n_seen += len(x)
        return measured, torch.cat(sample)

    def _rows(
        self, store: ActivationStore, layer: int, at_most: int | None = None
    ) -> Iterator[Float[Tensor, "rows d_model"]]:
        """The first kept rows of a layer, at least one; a store's rows are in random order."""
        n = 0
        for x in kept_rows(store, layer, self._row_filter):
            part = x if at_most is None else x[: at_most - n]
            n += len(part)
            yield part.to(self._device)
            if n == at_most:
                return
        if not n:
            raise InputError(
                f"the row filter keeps none of the {store.spec.n_rows} rows of layer {layer} of "
                f"{store.place}; at least one is needed: loosen the hygiene settings or harvest more"
            )

    def _ce(self, sae: SparseAutoencoder, layer: int, kept: Tensor | None) -> float | None:
        if self._cross_entropy is None:
            return None
        return self._cross_entropy.replaced(layer, _reconstruction(sae, layer, kept))

    def _recovered(self, layer: int, ce: float) -> float | None:
        return self._cross_entropy and self._cross_entropy.recovered(layer, ce)


def sizes(cfg: SaeConfig, order: str) -> tuple[int, ...]:
    """The sizes to read an autoencoder at: d_sae halved again and again, and its own prefixes."""
    if order == NESTED:
        return cfg.prefixes
    halved = {cfg.d_sae >> i for i in range(HALVINGS + 1)} - {0}
    return tuple(sorted(halved | set(cfg.prefixes)))


def latent_orders(sae: SparseAutoencoder, counts: LatentCounts) -> dict[str, Int[Tensor, " d_sae"]]:
    """All latents, the most important first, by every measure; `nested` if there are prefixes.

    Args:
        sae: The autoencoder.
        counts: How much each of its latents does.
    """
    by = {
        "energy": importance(counts, "energy"),
        "frequency": importance(counts, "frequency"),
        "decoder": decoder_importance(sae.w_dec),
    }
    orders = {name: values.argsort(descending=True, stable=True) for name, values in by.items()}
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    orders["random"] = torch.randperm(sae.cfg.d_sae, generator=generator)
    if sae.cfg.prefixes:
        orders[NESTED] = torch.arange(sae.cfg.d_sae)
    return {name: order.to(sae.b_dec.device) for name, order in orders.items()}


def _reconstruction(sae: SparseAutoencoder, layer: int, kept: Tensor | None) -> Replacement:
    def replace(x: Tensor) -> Tensor:
        x = x.to(sae.b_dec.device)
        if kept is None:
            return sae.reconstruct(x, _ids(x, layer)).x_hat
        return reconstruct_subset(sae, x, _ids(x, layer), kept).x_hat

    return replace


def _ids(x: Tensor, layer: int) -> Int[Tensor, " rows"]:
    return torch.full((len(x),), layer, dtype=torch.int64, device=x.device)


def _rsa(x: Tensor, x_hat: Tensor) -> float | None:
    try:
        return rsa(x, x_hat)
    except ValueError:  # nothing is left to tell rows apart by
        return None
