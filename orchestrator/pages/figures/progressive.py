"""One winner at many sizes, as a matplotlib figure: for MLflow and for the report.

Orders differ in colour (Okabe and Ito's) and in marker; a band spans the layers of the group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from orchestrator.pages.figures.style import COLOURS, MARKERS, panels_of

ORDERS = {
    "nested": "nested prefixes",
    "energy": "by E[act²]",
    "frequency": "by frequency",
    "decoder": "by decoder spectrum",
    "random": "random",
}
"""As people read them."""

_LAWS = {  # with the order that it is drawn like
    "energy": ("E[act²]", "energy"),
    "frequency": ("frequency", "frequency"),
    "spectrum": ("decoder eigenvalues", "decoder"),
}


def mean_curves(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The curves of a winner, each figure the mean over its layers; None if a layer has none.

    Args:
        reports: What the files of its layers hold (docs/progressive.md).
    """
    return {
        order: [
            {key: _mean([p[key] for p in points]) for key in points[0]}
            | {"size": points[0]["size"]}
            for points in zip(*(report["curves"][order] for report in reports), strict=True)
        ]
        for order in ORDERS
        if order in reports[0]["curves"]
    }


def progressive_figure(trial: str, reports: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU, cross-entropy recovered, and importance against rank with the power laws.

    Args:
        trial: The winner's name, for the title.
        reports: As in `mean_curves`.
    """
    measures = {"fvu": "FVU (lower is better)", "ce_recovered": "CE recovered (1: lossless)"}
    if reports[0]["n_tokens"] is None:
        del measures["ce_recovered"]
    figure, axes = panels_of(len(measures) + 1, 2.7 * (len(measures) + 1))
    for panel, (measure, label) in zip(axes, measures.items(), strict=False):
        _curves(panel, reports, measure)
        panel.set(xlabel="latents left", ylabel=label)
    _laws(axes[-1], reports[0]["power_laws"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    layers = ", ".join(str(report["layer"]) for report in reports)
    figure.suptitle(f"{trial}: mean over layers {layers}", fontsize=10)
    return figure


def _curves(axes: Axes, reports: Sequence[Mapping[str, Any]], measure: str) -> None:
    for i, (order, points) in enumerate(mean_curves(reports).items()):
        style = list(ORDERS).index(order)
        sizes = [point["size"] for point in points]
        layers = np.array(
            [[point[measure] for point in report["curves"][order]] for report in reports]
        )
        axes.fill_between(
            sizes, layers.min(0), layers.max(0), color=COLOURS[style], alpha=0.12, linewidth=0
        )
        axes.plot(
            sizes,
            [point[measure] for point in points],
            color=COLOURS[style],
            marker=MARKERS[style],
            markersize=5,
            linewidth=1.4,
            label=ORDERS[order],
            zorder=3 - i / 10,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)


def _laws(axes: Axes, laws: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Each importance over its largest, against rank; dashed the power law fitted to it."""
    for name, (label, order) in _LAWS.items():
        law, style = laws[name], list(ORDERS).index(order)
        if law is None:
            continue
        ranks, values = np.array(law["ranks"]), np.array(law["values"])
        r_squared = f"r² {law['r_squared']:.2f} (exponential {law['exponential_r_squared']:.2f})"
        axes.plot(
            ranks,
            values / values[0],
            color=COLOURS[style],
            marker=MARKERS[style],
            markersize=3,
            linestyle="none",
            label=f"{label}: {r_squared}",
        )
        fitted = law["factor"] * ranks ** -law["exponent"]
        axes.plot(ranks, fitted / values[0], color=COLOURS[style], linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(
        fontsize=7, frameon=False, loc="lower left", title="dashed: power law", title_fontsize=7
    )
    axes.set(xlabel="rank", ylabel="importance over the largest")


def _mean(values: Sequence[int | float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
