"""The model card of an exported autoencoder: `README.md` beside its weights."""

from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from actors.fidelity import LayerFidelity
from actors.parity import ACTIVATION_TOLERANCE, RECONSTRUCTION_TOLERANCE, Parity
from orchestrator.labels import model_label
from orchestrator.pages.report import TEMPLATES
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape
from sae.formats.description import Description
from sae.formats.folding import thresholds

_MEASURES = {
    "fvu": "FVU (lower is better)",
    "l0": "L0",
    "dead_fraction": "dead latents",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
}
_LOAD = {
    "sae_lens": ["from sae_lens import SAE", 'sae = SAE.load_from_disk("{folder}")'],
    "sparsify": [
        "from sparsify import SparseCoder",
        'coder = SparseCoder.load_from_disk("{folder}")',
    ],
    "dictionary_learning": [
        "from dictionary_learning.utils import load_dictionary",
        'dictionary, config = load_dictionary("{folder}", device="cpu")',
    ],
    "safetensors": [
        "import sae, torch",
        'autoencoder, about = sae.load("{folder}")',
        "x_hat = autoencoder.reconstruct(x, torch.full((len(x),), {layer})).x_hat",
    ],
}
_PLUGIN = (
    'import sys; sys.path.insert(0, "{folder}"); import kronsae  # makes the architecture known'
)


def model_card(
    *,
    kind: str,
    about: Description,
    sae: SparseAutoencoder,
    parities: Mapping[str, Parity],
    trained: LayerFidelity,
    exported: LayerFidelity,
    evaluation: Mapping[str, Any],
    tags: Mapping[str, str],
    licence: str | None,
    on_hub: bool,
) -> str:
    """The card as Markdown, with the header that the Hub reads.

    Args:
        kind: The format.
        about: Where the autoencoder came from.
        sae: What was written.
        parities: How it compared with what was trained: `formula`, `read_back`, and under its name and
            version the library.
        trained: How well the trained one reconstructs the layer's validation rows.
        exported: The same of what was written.
        evaluation: What `strata evaluate` found for the trained one, if it was evaluated.
        tags: Of the run: model, corpus, configuration hash, revision of the code.
        licence: Of the model's weights, if it is known.
        on_hub: Whether the model is one of the Hub.
    """
    lines = [*_LOAD[kind]]
    if kind == "sae_lens" and isinstance(sae.cfg.encoder, KronShape):
        lines.insert(0, _PLUGIN)
    header = {
        "library_name": kind,
        "tags": ["sparse-autoencoder", "interpretability"],
        **({"license": licence} if licence else {}),
        **({"base_model": about.model} if on_hub else {}),
    }
    named = {
        "formula": f"an implementation of {kind}'s mathematics",
        "read_back": "Strata's reader",
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("model_card.md.j2").render(
        about=about,
        parities={named.get(name, name): parity for name, parity in parities.items()},
        n_checked=parities["formula"].n_rows,
        by_library=len(parities) > len(named) or kind == "safetensors",
        title=model_label(about.model),
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        kind=kind,
        licence=licence,
        load=[line.format(folder=f"layer-{about.layer}", layer=about.layer) for line in lines],
        measures=[
            (name, getattr(trained, key), getattr(exported, key)) for key, name in _MEASURES.items()
        ],
        n_rows=exported.n_rows,
        recovered=evaluation.get("ce_recovered"),
        sae=sae.cfg,
        encoder=_encoder(sae),
        selection=_selection(sae),
        tags=tags,
        tolerances=(ACTIVATION_TOLERANCE, RECONSTRUCTION_TOLERANCE),
    )


def _encoder(sae: SparseAutoencoder) -> str:
    shape = sae.cfg.encoder
    if isinstance(shape, KronShape):
        return f"Kronecker, h={shape.h}, m={shape.m}, n={shape.n}, {shape.activation}"
    return "dense"


def _selection(sae: SparseAutoencoder) -> str:
    bounds = thresholds(sae)
    if bounds is None:
        return f"the {sae.cfg.k} largest of each token (TopK)"
    if bool((bounds == bounds[0]).all()):
        return f"those strictly above {float(bounds[0]):.6g}"
    return "those strictly above a threshold of each"
