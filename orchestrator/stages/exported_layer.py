"""One layer of an export: what is written, what it costs, and the card that says both."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.export_check import check_files, rows_to_check
from actors.fidelity import LayerFidelity, reconstruction_quality
from actors.hook_names import HookNames
from actors.layer_rows import layer_rows
from actors.parity import ACTIVATION_TOLERANCE, RECONSTRUCTION_TOLERANCE, Parity
from orchestrator.config import RunConfig
from orchestrator.pages.model_card import model_card
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.tracking.run_tags import run_tags
from sae.autoencoder import SparseAutoencoder
from sae.formats import FORMATS
from sae.formats.description import Description, write_description
from sae.formats.distillation import distilled
from sae.formats.folding import folded
from sae.formats.selecting import as_topk, calibrated
from storage.hygiene import RowFilter
from storage.tokens import TokenSpec

FIT_ROWS = 50_000
"""Rows of the pilot that a threshold or a distilled encoder is fitted on."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user asked for."""

    to: str
    """One of `sae.formats.FORMATS`."""

    trial: str | None = None
    """Of which; by default the best of each group."""

    python: Path | None = None
    """An interpreter that has the format's library."""

    calibrate: bool = False
    """Whether a BatchTopK threshold is fitted to each layer's own rows."""

    distil: bool = False
    """Whether a dense encoder stands in for a Kronecker one."""

    as_topk: bool = False
    """Whether TopK stands in for a threshold."""


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """What all layers of an export share."""

    cfg: RunConfig
    run: RunDirectory
    options: ExportOptions
    row_filter: RowFilter
    tokens: TokenSpec
    names: list[HookNames]
    revision: str | None
    licence: str | None

    def draft(self, trial: str, sae: SparseAutoencoder, layer: int, folder: Path) -> "Draft":
        """Write a layer's autoencoder into a new folder, and check it by its files.

        Raises:
            InputError: If what was written computes another function.
            ValueError: If the format or an option does not suit the autoencoder.
        """
        validation = self.run.validation
        trained = reconstruction_quality(sae, validation, [layer], self.row_filter).layers[layer]
        alone, changes = self._substituted(sae, layer, trained)
        exported = trained
        if changes:
            quality = reconstruction_quality(alone, validation, [layer], self.row_filter)
            exported = quality.layers[layer]
        about = self._description(trial, sae, layer, exported.l0, changes)
        folder.mkdir(parents=True)
        written = FORMATS[self.options.to]
        written.write(folder, alone, about)
        write_description(folder, about, written.WEIGHTS)
        x = self.rows(layer, sae.cfg.d_sae)
        return Draft(
            folder=folder,
            about=about,
            trained=trained,
            exported=exported,
            parities=check_files(self.options.to, folder, alone if changes else sae, layer, x),
        )

    def rows(self, layer: int, d_sae: int) -> Tensor:
        """The validation rows of a layer that an export is checked on: (rows, d_model)."""
        return layer_rows(self.run.validation, layer, self.row_filter, rows_to_check(d_sae))

    def finish(self, draft: "Draft", library: str | None, by_library: Parity | None) -> None:
        """Write beside the weights what was found of them, and the card."""
        parities: dict[str, Any] = {name: asdict(found) for name, found in draft.parities.items()}
        tolerances = {
            "activation_delta": ACTIVATION_TOLERANCE,
            "reconstruction_delta": RECONSTRUCTION_TOLERANCE,
        }
        parities |= {
            "library": by_library and asdict(by_library),
            "library_version": library,
            "tolerances": tolerances,
        }
        write_json(draft.folder / "parity.json", parities)
        about = draft.about
        evaluation = self.run.evaluations / about.trial / f"layer-{about.layer}.json"
        card = model_card(
            kind=self.options.to,
            about=about,
            sae=FORMATS[self.options.to].read(draft.folder, about.layer),
            parities=draft.parities | ({} if by_library is None else {str(library): by_library}),
            trained=draft.trained,
            exported=draft.exported,
            evaluation=read_json(evaluation) if evaluation.is_file() else {},
            tags=run_tags(self.cfg, self.run.path),
            licence=self.licence,
            on_hub=not self.cfg.model.is_local,
        )
        (draft.folder / "README.md").write_text(card, encoding="utf-8")

    def _description(
        self, trial: str, sae: SparseAutoencoder, layer: int, l0: float, changes: tuple[str, ...]
    ) -> Description:
        tags, names = run_tags(self.cfg, self.run.path), self.names[layer]
        mlflow = self.run.trials / trial / "mlflow.json"
        return Description(
            model=self.cfg.model.name,
            revision=self.revision,
            tokenizer=self.tokens.tokenizer,
            layer=layer,
            hook_name=names.transformer_lens or names.module,
            module=names.module,
            trunk_module=names.trunk_module,
            context=self.tokens.context,
            prepend_bos=self.tokens.first_position == 1,
            excluded_tokens=self.tokens.special_ids if self.cfg.hygiene.drop_special_tokens else (),
            corpus=tags["corpus"],
            trial=trial,
            selection=sae.cfg.selection,
            k=sae.cfg.k,
            prefixes=sae.cfg.prefixes,
            l0=l0,
            config_hash=tags["config_hash"],
            mlflow_run=read_json(mlflow)["run_id"] if mlflow.is_file() else None,
            changes=changes,
        )

    def _substituted(
        self, sae: SparseAutoencoder, layer: int, trained: LayerFidelity
    ) -> tuple[SparseAutoencoder, tuple[str, ...]]:
        """The autoencoder of one layer to be written, and in what it differs from the trained one."""
        options, alone = self.options, folded(sae, layer)
        changes: list[str] = []
        if options.distil or options.calibrate:
            pilot = layer_rows(self.run.pilot, layer, self.row_filter, FIT_ROWS)
            on = f"on {len(pilot):,} rows of the layer"
            if options.distil:
                alone = distilled(alone, pilot, self.cfg.seed)
                changes.append(
                    f"a dense encoder, fitted {on} to the latents of the Kronecker one, stands in for it"
                )
            if options.calibrate:
                alone = calibrated(alone, pilot, float(sae.cfg.k))
                changes.append(f"the threshold was fitted {on} to a mean L0 of k = {sae.cfg.k}")
        if options.as_topk:
            k = max(1, round(trained.l0))
            alone = as_topk(alone, k)
            changes.append(f"TopK with k = {k}, its mean L0, stands in for {sae.cfg.selection}")
        return alone, tuple(changes)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A layer that is written, and not yet in its place."""

    folder: Path
    about: Description

    trained: LayerFidelity
    """How well the trained autoencoder does on the layer's validation rows."""

    exported: LayerFidelity
    """The same of what was written."""

    parities: dict[str, Parity]
    """As `actors.export_check.check_files` gives them."""
