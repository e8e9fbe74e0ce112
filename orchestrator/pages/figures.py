"""The figures of a run, as matplotlib figures: for MLflow and for the report.

Colours are Okabe and Ito's, told apart by colour-blind readers; groups and encoders also differ in
marker.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from actors.grouper import DistanceReport
from actors.grouping import Grouping
from orchestrator.labels import encoder_label

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def distance_matrix(report: DistanceReport, grouping: Grouping) -> Figure:
    """Angular distance of every pair of layers, the groups framed."""
    figure, axes = _axes(5.4, 4.6)
    matrix = report.matrix
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=max(0.5, float(matrix.max())))
    figure.colorbar(image, ax=axes, label="mean angular distance (0.5: orthogonal)")
    if len(matrix) <= 16:
        for (i, j), value in np.ndenumerate(matrix):
            shade = "white" if value < 0.3 else "black"
            axes.text(
                j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", color=shade, size=7
            )
    row_of = {layer: row for row, layer in enumerate(report.layers)}
    for group in grouping.groups:
        rows = [row_of[layer] for layer in group.layers]
        for i in rows:
            for j in rows:
                _frame_cell(axes, i, j, rows)
    axes.set(xlabel="layer", ylabel="layer", title="Distance between layers, groups framed")
    axes.set_xticks(range(len(matrix)), [str(layer) for layer in report.layers])
    axes.set_yticks(range(len(matrix)), [str(layer) for layer in report.layers])
    return figure


def _frame_cell(axes: Axes, i: int, j: int, rows: Sequence[int]) -> None:
    """Draw those sides of the cell (i, j) that are a border of its group."""
    style: dict[str, Any] = {"color": COLOURS[1], "linewidth": 2}
    for di, dj, x, y in (
        (-1, 0, (-0.5, 0.5), (-0.5, -0.5)),
        (1, 0, (-0.5, 0.5), (0.5, 0.5)),
        (0, -1, (-0.5, -0.5), (-0.5, 0.5)),
        (0, 1, (0.5, 0.5), (-0.5, 0.5)),
    ):
        if (i + di) not in rows or (j + dj) not in rows:
            axes.plot([j + v for v in x], [i + v for v in y], **style)


def amad_curve(grouping: Grouping, threshold: float) -> Figure:
    """AMAD for every number of groups, the chosen one marked."""
    figure, axes = _axes(5.4, 3.4)
    n_groups, amads = zip(*sorted(grouping.amad_curve.items()), strict=True)
    axes.plot(n_groups, amads, color=COLOURS[0], marker="o", markersize=4)
    axes.axhline(threshold, color=COLOURS[6], linestyle="--", linewidth=1)
    axes.annotate("threshold", (n_groups[-1], threshold), ha="right", va="bottom", size=8)
    chosen = next(g for g, value in sorted(grouping.amad_curve.items()) if value == grouping.amad)
    axes.plot(
        [chosen], [grouping.amad], marker="o", markersize=11, mfc="none", mec=COLOURS[1], mew=2
    )
    axes.set(xlabel="groups", ylabel="AMAD (lower: more alike)", title=f"{chosen} groups chosen")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    return figure


def fvu_against_l0(results: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU against L0 for every trial: colour is the group, marker the encoder."""
    figure, axes = _axes(6.4, 4.2)
    encoders = sorted({encoder_label(r) for r in results})
    for r in results:
        axes.plot(
            *([r["l0"]], [r["fvu"]]),
            color=COLOURS[r["group"] % len(COLOURS)],
            marker=MARKERS[encoders.index(encoder_label(r)) % len(MARKERS)],
            linestyle="none",
            markersize=6,
            alpha=0.85,
        )
    for i, encoder in enumerate(encoders):
        axes.plot(
            [], [], color="grey", marker=MARKERS[i % len(MARKERS)], linestyle="none", label=encoder
        )
    for group in sorted({r["group"] for r in results}):
        axes.plot([], [], color=COLOURS[group % len(COLOURS)], linewidth=5, label=f"group {group}")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="L0 (latents per token)", ylabel="FVU (lower is better)", title="All trials")
    axes.set_ylim(bottom=0)
    return figure


def training_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """FVU of the training batches over steps, for each named trial."""
    figure, axes = _axes(6.4, 3.6)
    for i, (name, rows) in enumerate(curves.items()):
        steps, fvu = [row["step"] for row in rows], [row["fvu"] for row in rows]
        axes.plot(steps, fvu, color=COLOURS[i % len(COLOURS)], linewidth=1.3, label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="step", ylabel="FVU of the batch", title="Training of the winners")
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
