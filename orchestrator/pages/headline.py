"""The answer first: what was trained, what it cost, what it recovers."""

from collections.abc import Mapping
from typing import Any

from orchestrator.labels import duration, model_label, span


def headline(
    cfg: Mapping[str, Any], data: Mapping[str, Any], cards: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What stands at the top of the report.

    Args:
        cfg: The resolved configuration.
        data: The summary's content.
        cards: Of `cards.json`, if there is one.

    Returns:
        `title`, `sentences`, `advice` (one per group that should be split) and `tiles`: pairs of a
        figure and what it is.
    """
    groups = data["groups"]
    best = [group["best"] for group in groups]
    recovered = [v for b in best for v in b["ce_recovered"].values()]
    unexplained = [b["fvu"] for b in best]
    seconds = sum(data["stage_seconds"].values())
    what = "autoencoder" if len(groups) == 1 else "autoencoders"
    sentences = [
        f"The best autoencoder of each group leaves {span(unexplained, '.1%')} of the variance of unseen "
        f"activations unexplained at {span([b['l0'] for b in best], '.0f')} latents per token"
        + (
            f", and recovers {span(recovered, '.1%')} of the cross-entropy that is lost when a layer is zeroed."
            if recovered
            else ". The model is an encoder, so cross-entropy has no part in this."
        ),
        f"{data['n_trials']} trials were trained on {cfg['sweep']['tokens']:,} tokens each"
        + (f" ({data['n_stopped']} given up before)" if data.get("n_stopped") else "")
        + f", and all stages took {duration(seconds)}.",
    ]
    tiles = [
        (f"{len(groups)} / {_n_covered(data)}", f"{what} / layers"),
        (f"{sum(unexplained) / len(groups):.3f}", "mean FVU of the best ↓"),
        *([(f"{min(recovered):.3f}", "CE recovered, worst layer ↑")] if recovered else []),
        (duration(seconds), "in all stages"),
    ]
    if cards is not None:
        sentences.append(_saved(cards))
        tiles.append((f"{cards['cost']['saved_training']:.0%}", "training FLOPs saved by sharing"))
    else:
        tiles.append((f"{data['n_trials']}", "trials"))
    return {
        "title": f"{len(groups)} sparse {what} for {covered(data)} layers of {model_label(cfg['model']['name'])}",
        "sentences": sentences,
        "advice": [g["advice"] for g in cards["groups"] if g["advice"]] if cards else [],
        "tiles": tiles,
    }


def _saved(cards: Mapping[str, Any]) -> str:
    cost, against = cards["cost"], cards["against_baselines"]
    saved = (
        f"Against one autoencoder for each layer, sharing saves {cost['saved_training']:.0%} of the "
        "training FLOPs"
    )
    if against is None:
        return f"{saved}; what it costs in fidelity is known after: strata evaluate --baselines."
    told = f"{saved} and costs {100 * against['ev_lost']:.2f} points of explained variance"
    if against["ce_recovered_lost"] is not None:
        told += f" and {100 * against['ce_recovered_lost']:.2f} points of cross-entropy recovered"
    return f"{told}, in the mean over layers."


def covered(data: Mapping[str, Any]) -> str:
    """How many layers the groups of a summary hold, and `of` how many, where that is more."""
    n = _n_covered(data)
    return f"{n}" if n == data["n_layers"] else f"{n} of {data['n_layers']}"


def _n_covered(data: Mapping[str, Any]) -> int:
    return sum(len(group["layers"]) for group in data["groups"])
