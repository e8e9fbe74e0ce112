"""The fidelity cards as a person reads them in a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.labels import figure

MEASURES = {
    "fvu": ("FVU", ".4f"),
    "l0": ("L0", ".1f"),
    "cosine": ("cosine", ".4f"),
    "norm_ratio": ("norm", ".3f"),
    "relative_bias": ("bias", ".3f"),
    "dead_fraction": ("dead", ".1%"),
    "dense_fraction": ("dense", ".1%"),
    "ce_recovered": ("CE rec.", ".4f"),
    "ce_recovered_mean": ("of mean abl.", ".4f"),
    "kl": ("KL", ".4f"),
}
"""Columns of the table: heading and form."""


def show(console: Console, cards: Mapping[str, Any]) -> None:
    """Print the content of `cards.json`."""
    console.print(table(cards))
    lines = [f"! is the worst layer of its group; {_reference(cards)}."]
    lines.append(
        f"dense: latents on more than {cards['dense_threshold']:.0%} of rows. docs/evaluation.md defines "
        "all measures."
    )
    if not cards["is_causal"]:
        lines.append(
            "The model is an encoder, which predicts no next token: no cross-entropy, no KL."
        )
    lines += [group["advice"] for group in cards["groups"] if group["advice"]]
    if cards["against_baselines"]:
        lines.append(_claim(cards))
    lines.append(_cost(cards["cost"]))
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def table(cards: Mapping[str, Any]) -> Table:
    """A row per layer, and one per group for the mean of its layers."""
    shown = {
        key: of for key, of in MEASURES.items() if cards["is_causal"] or key not in _OF_LANGUAGE
    }
    by_baselines = cards["against_baselines"] is not None
    found = Table(title="Fidelity", title_justify="left", pad_edge=False)
    headings = ["group", "layer", *(name for name, _ in shown.values())]
    headings.append("EV lost" if by_baselines else "excess FVU")
    against = _against(cards)
    headings += [name for name, _ in against.values()]
    for heading in headings:
        found.add_column(heading, justify="right")
    for group in cards["groups"]:
        for card in group["cards"]:
            worst = card["layer"] == group["worst_layer"] and len(group["cards"]) > 1
            found.add_row(
                str(group["id"]),
                f"{card['layer']}{'!' if worst else ' '}",
                *_measured(card, shown),
                figure(card["excess_fvu"], "+.4f"),
                *_measured(card["baseline"] or {}, against),
                style="bold red" if worst and group["misses"] else None,
            )
        found.add_row(str(group["id"]), "mean ", *_measured(group["mean"], shown), style="dim")
    return found


def _against(cards: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What is shown of baselines, where there are some."""
    if cards["against_baselines"] is None:
        return {}
    recovered = {"ce_recovered_lost": ("CE rec. lost", "+.4f")} if cards["is_causal"] else {}
    return {**recovered, "l0": ("its own L0", ".1f")}


_OF_LANGUAGE = ("ce_recovered", "ce_recovered_mean", "kl")


def _measured(card: Mapping[str, Any], shown: Mapping[str, tuple[str, str]]) -> list[str]:
    return [figure(card[key], form) for key, (_, form) in shown.items()]


def _reference(cards: Mapping[str, Any]) -> str:
    if cards["reference"] == "baseline":
        return "lost is what the layer's own autoencoder has more"
    return "excess FVU is above the group's mean (--baselines compares with an autoencoder for each layer)"


def _claim(cards: Mapping[str, Any]) -> str:
    against = cards["against_baselines"]
    recovered = against["ce_recovered_lost"]
    told = "" if recovered is None else f" and {100 * recovered:.2f} of cross-entropy recovered"
    return (
        f"Sharing costs {100 * against['ev_lost']:.2f} points of explained variance{told} in the mean over "
        f"layers, at most {100 * against['worst_ev_lost']:.2f} (layer {against['worst_layer']}); published are "
        "1.1 to 2.2 points, and 0.2."
    )


def _cost(cost: Mapping[str, Any]) -> str:
    n_groups, n_layers = cost["n_groups"], cost["n_layers"]
    told = (
        f"Cost: {n_groups} autoencoders for {n_layers} layers save {cost['saved_training']:.0%} of the FLOPs of "
        "training"
    )
    if cost["saved"] is not None:
        flops = cost["grouped"]["total_flops"], cost["per_layer"]["total_flops"]
        told += (
            f", {cost['saved']:.0%} with the model's own ({flops[0]:.3g} of {flops[1]:.3g}; "
            f"{cost['saved_published']:.0%} by the published count)"
        )
    if cost["saved_seconds"] is not None:
        both = [
            part["harvest_seconds"] + part["training_seconds"]
            for part in (cost["grouped"], cost["per_layer"])
        ]
        told += (
            f"; measured: {both[0]:,.0f} s of {both[1]:,.0f} s, {cost['saved_seconds']:.0%} saved"
        )
    return f"{told}."
