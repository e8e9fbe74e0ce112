"""What a run costs against an autoencoder for every layer, by Group-SAE's model C(G) = A + T G.

A is what the language model costs per token, T what training an autoencoder does; both are counted
from shapes (arXiv 2410.21508; docs/evaluation.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.trial import Trial
from sae.config import SaeConfig

_PUBLISHED_FACTOR = 10
"""Of d_model * d_sae: the paper's T, a dense step whose gradients leave nothing out."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A group and the autoencoder that its layers share."""

    n_layers: int
    trial: Trial
    result: Mapping[str, Any]

    baselines: Sequence[Mapping[str, Any]] | None
    """Results of an autoencoder for each of the layers, or None if there are none."""


@dataclass(frozen=True, kw_only=True)
class Harvested:
    """What the harvests took."""

    context: int
    n_sequences: int
    """That go through the model for training."""

    n_pilot_sequences: int
    """And for the pilot."""

    grouped_seconds: float | None
    per_layer_seconds: float | None
    """None if nobody measured it: there are no baselines, or the harvest ran beside the training."""


def cost(
    groups: Sequence[Shared], harvested: Harvested, model_flops_per_token: float | None
) -> dict[str, Any]:
    """The section `cost` of `cards.json`; docs/evaluation.md says what each figure is."""
    n_groups, n_layers = len(groups), sum(group.n_layers for group in groups)
    tokens = harvested.n_sequences * harvested.context
    model = None if model_flops_per_token is None else model_flops_per_token * tokens
    whole = all(group.baselines is not None for group in groups)
    grouped = _bill(
        model,
        sum(_training_flops(group) for group in groups),
        harvested.grouped_seconds,
        sum(group.result["seconds"] for group in groups),
    )
    per_layer = _bill(
        model,
        sum(group.n_layers * _training_flops(group) for group in groups),
        harvested.per_layer_seconds if whole else None,
        sum(own["seconds"] for group in groups for own in group.baselines or ()) if whole else None,
    )
    published = [_published(group.trial.sae) for group in groups]
    return {
        "n_groups": n_groups,
        "n_layers": n_layers,
        "flops_per_token": {
            "model": model_flops_per_token,
            "autoencoder": _mean([g.trial.sae.training_flops_per_token for g in groups]),
            "published": _mean(published),
        },
        "tokens": {
            "harvested": tokens,
            "trained": _mean([group.result["tokens"] for group in groups]),
        },
        "grouped": grouped,
        "per_layer": per_layer,
        "pilot_flops": model_flops_per_token
        and (model_flops_per_token * harvested.n_pilot_sequences * harvested.context),
        "saved": _saved(grouped["total_flops"], per_layer["total_flops"]),
        "saved_training": _saved(grouped["autoencoder_flops"], per_layer["autoencoder_flops"]),
        "saved_published": model_flops_per_token
        and _saved(
            model_flops_per_token + sum(published),
            model_flops_per_token
            + sum(g.n_layers * t for g, t in zip(groups, published, strict=True)),
        ),
        "saved_seconds": _saved(_seconds(grouped), _seconds(per_layer)),
    }


def _bill(
    model: float | None, autoencoders: float, harvest: float | None, training: float | None
) -> dict[str, float | None]:
    return {
        "model_flops": model,
        "autoencoder_flops": autoencoders,
        "total_flops": None if model is None else model + autoencoders,
        "harvest_seconds": harvest,
        "training_seconds": None if training is None else round(training, 3),
    }


def _training_flops(group: Shared) -> float:
    return float(group.trial.sae.training_flops_per_token * group.result["tokens"])


def _published(sae: SaeConfig) -> float:
    return float(_PUBLISHED_FACTOR * sae.d_model * sae.d_sae)


def _seconds(bill: Mapping[str, float | None]) -> float | None:
    harvest, training = bill["harvest_seconds"], bill["training_seconds"]
    return None if harvest is None or training is None else harvest + training


def _saved(less: float | None, more: float | None) -> float | None:
    return None if less is None or more is None else 1 - less / more


def _mean(values: Sequence[int] | Sequence[float]) -> float:
    return sum(values) / len(values)
