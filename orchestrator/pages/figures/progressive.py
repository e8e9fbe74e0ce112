"""One dictionary at many sizes: figures of `strata progressive` (docs/progressive.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from orchestrator.pages.figures.style import COLOURS, MARKERS, panels_of

ORDERS = {
    "energy": "pruned by E[act²]",
    "frequency": "pruned by frequency",
    "decoder": "pruned by decoder spectrum",
    "random": "pruned at random",
    "nested": "nested prefixes",
}
_MEASURES = {"fvu": "FVU (lower is better)", "ce_recovered": "CE recovered"}


def sizes(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU and CE recovered against dictionary size by order, and the importances with their law.

    Args:
        layers: The files of one trial, one per layer; figures are means over them.
    """
    curves = layers[0]["curves"]
    shown = [key for key in _MEASURES if curves["energy"][0][key] is not None]
    figure, panels = panels_of(len(shown) + 1, 2.5 * (len(shown) + 1))
    for axes, key in zip(panels, shown, strict=False):
        for i, (order, label) in enumerate(ORDERS.items()):
            if order not in curves:
                continue
            x = [point["size"] for point in curves[order]]
            each = [[point[key] for point in layer["curves"][order]] for layer in layers]
            axes.plot(
                *(x, np.mean(each, axis=0)),
                color=COLOURS[i],
                marker=MARKERS[i],
                markersize=4,
                linestyle=":" if order == "random" else "-",
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="latents kept", ylabel=_MEASURES[key])
    panels[0].legend(fontsize=8, frameon=False)
    axes = panels[-1]
    for i, (name, law) in enumerate(layers[0]["power_laws"].items()):
        if law is None:
            continue
        label = f"{name}: slope -{law['exponent']:.2f}, r² {law['r_squared']:.2f}"
        ranks, values = np.array(law["ranks"]), np.array(law["values"])
        axes.plot(
            *(ranks, values / values[0]), color=COLOURS[i], marker=MARKERS[i], markersize=3,
            linestyle="none", label=label,
        )  # fmt: skip
        inside = (ranks >= law["first_rank"]) & (ranks <= law["last_rank"]) & (values > 0)
        fitted = ranks[inside].astype(float)
        # Least squares gives the line that passes through the mean of the logarithms.
        level = np.log(values[inside] / values[0]) + law["exponent"] * np.log(fitted)
        line = np.exp(level.mean()) * fitted ** -law["exponent"]
        axes.plot(fitted, line, color=COLOURS[i], linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="rank", ylabel="importance, first = 1")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return figure
