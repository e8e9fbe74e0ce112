"""What each layer gets of the autoencoder that it shares: figures of the fidelity cards."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.pages.figures.style import GREY, MARKERS, group_colour, new, panels_of


def per_layer(cards: Mapping[str, Any]) -> Figure:
    """FVU, and where the model predicts tokens CE recovered, of every layer; baselines beside them.

    Args:
        cards: The content of `cards.json` (docs/evaluation.md).
    """
    names = {"fvu": "FVU (lower is better)"}
    if cards["is_causal"]:
        names["ce_recovered"] = "CE recovered (1 is best)"
    figure, panels = panels_of(len(names), 2.6 * len(names) + 0.2)
    for axes, (key, label) in zip(panels, names.items(), strict=True):
        for group in cards["groups"]:
            _group(axes, group, key, len(cards["groups"]))
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if cards["against_baselines"]:
        panels[0].plot(
            [], [], marker="o", mfc="none", mec=GREY, linestyle="none", label="the layer's own"
        )
    panels[0].plot([], [], marker="o", color=GREY, linestyle="none", label="the group's")
    panels[0].plot([], [], color=GREY, linewidth=2, alpha=0.5, label="mean of the group")
    panels[0].legend(fontsize=8, frameon=False)
    panels[0].set_ylim(0, 1.08 * panels[0].get_ylim()[1])
    panels[-1].set_xlabel("layer")
    return figure


def _group(axes: Axes, group: Mapping[str, Any], key: str, n_groups: int) -> None:
    colour = group_colour(group["id"], n_groups)
    marker = MARKERS[group["id"] % len(MARKERS)]
    known = [card for card in group["cards"] if card[key] is not None]
    if not known:
        return
    layers = [card["layer"] for card in known]
    axes.plot(layers, [card[key] for card in known], color=colour, marker=marker, linestyle="none")
    own = [card for card in known if card["baseline"] and card["baseline"][key] is not None]
    axes.plot(
        [card["layer"] for card in own],
        [card["baseline"][key] for card in own],
        color=colour,
        marker=marker,
        mfc="none",
        markersize=9,
        linestyle="none",
    )
    if group["mean"][key] is not None:
        ends = (min(layers) - 0.3, max(layers) + 0.3)
        axes.plot(ends, [group["mean"][key]] * 2, color=colour, linewidth=2, alpha=0.5)


def frequencies(cards: Mapping[str, Any]) -> Figure:
    """How often latents fire: latents by the logarithm of their frequency, mean over layers."""
    figure, axes = new(3.0)
    for group in cards["groups"]:
        histograms = [card["frequency_histogram"] for card in group["cards"]]
        edges = np.array(histograms[0]["log10_edges"])
        counts = np.mean([histogram["n_latents"] for histogram in histograms], axis=0)
        colour = group_colour(group["id"], len(cards["groups"]))
        axes.stairs(counts, edges, color=colour, linewidth=1.6, label=f"group {group['id']}")
    limit = float(np.log10(cards["dense_threshold"]))
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "dense",
        (limit, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        size=9,
        va="top",
    )
    axes.set(xlabel="log10 of the share of rows that a latent fires on", ylabel="latents")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure
