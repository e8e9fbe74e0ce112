"""How alike layers are, and the groups that follow from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from actors.grouper import DistanceReport
from actors.grouping import Grouping
from orchestrator.pages.figures.style import COLOURS, GREY, group_colour, new

_MANY_LAYERS = 16
"""With more, cells have no figures and axes not every number."""


def distance_matrix(report: DistanceReport, grouping: Grouping) -> Figure:
    """Angular distance of every pair of layers, the groups framed."""
    figure, axes = new(4.6)
    matrix = report.matrix
    image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=max(0.5, float(matrix.max())))
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="mean angular distance")
    bar.ax.tick_params(labelsize=9)
    if len(matrix) <= _MANY_LAYERS:
        for (i, j), value in np.ndenumerate(matrix):
            shade = "white" if value < 0.3 else "black"
            axes.text(
                j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", color=shade, size=8
            )
    row_of = {layer: row for row, layer in enumerate(report.layers)}
    for group in grouping.groups:
        rows = [row_of[layer] for layer in group.layers]
        for i in rows:
            for j in rows:
                _frame_cell(axes, i, j, rows)
    axes.set(xlabel="layer", ylabel="layer")
    every = 1 if len(matrix) <= _MANY_LAYERS else len(matrix) // 12 + 1
    ticks = range(0, len(matrix), every)
    labels = [str(report.layers[row]) for row in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    return figure


def _frame_cell(axes: Axes, i: int, j: int, rows: Sequence[int]) -> None:
    """Draw those sides of the cell (i, j) that are a border of its group."""
    style: dict[str, Any] = {"color": COLOURS[1], "linewidth": 2.5, "clip_on": False}
    for di, dj, x, y in (
        (-1, 0, (-0.5, 0.5), (-0.5, -0.5)),
        (1, 0, (-0.5, 0.5), (0.5, 0.5)),
        (0, -1, (-0.5, -0.5), (-0.5, 0.5)),
        (0, 1, (0.5, 0.5), (-0.5, 0.5)),
    ):
        if (i + di) not in rows or (j + dj) not in rows:
            axes.plot([j + v for v in x], [i + v for v in y], **style)


def merges(report: DistanceReport, grouping: Grouping) -> Figure | None:
    """The dendrogram: which layers join at which distance, groups coloured.

    None where nothing was merged: a single layer, or the method `optimal`.
    """
    if not grouping.linkage:
        return None
    n = len(grouping.linkage) + 1
    group_of = {layer: group.id for group in grouping.groups for layer in group.layers}
    members = {row: {group_of[report.layers[row]]} for row in range(n)}
    for step, (left, right, *_) in enumerate(grouping.linkage):
        members[n + step] = members[int(left)] | members[int(right)]

    def colour(node: int) -> str:
        groups = members[node]
        return GREY if len(groups) > 1 else group_colour(min(groups), len(grouping.groups))

    figure, axes = new(3.4)
    drawn = dendrogram(np.array(grouping.linkage), no_plot=True, link_color_func=colour)
    for x, y, shade in zip(drawn["icoord"], drawn["dcoord"], drawn["color_list"], strict=True):
        axes.plot(x, y, color=shade, linewidth=2)
    places = [10 * i + 5 for i in range(n)]  # where scipy puts leaves
    layers = [str(report.layers[leaf]) for leaf in drawn["leaves"]]
    axes.set_xticks(places, layers, fontsize=9 if n <= _MANY_LAYERS else 6)
    n_groups = len({g for row in range(n) for g in members[row]})
    heights = [0.0, *(row[2] for row in grouping.linkage)]
    below, above = max(heights[: n - n_groups + 1]), min([*heights[n - n_groups + 1 :], np.inf])
    if below < above < np.inf:
        axes.axhline((below + above) / 2, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="layer", ylabel="largest distance inside")
    axes.set_ylim(bottom=0)
    return figure


def amad_curve(grouping: Grouping, threshold: float) -> Figure:
    """AMAD for every number of groups, the chosen one marked."""
    figure, axes = new(3.4)
    n_groups, amads = zip(*sorted(grouping.amad_curve.items()), strict=True)
    axes.plot(n_groups, amads, color=COLOURS[0], marker="o", markersize=4)
    axes.axhline(threshold, color=COLOURS[6], linestyle="--", linewidth=1)
    axes.annotate("threshold", (n_groups[-1], threshold), ha="right", va="bottom", size=9)
    chosen = next(g for g, value in sorted(grouping.amad_curve.items()) if value == grouping.amad)
    axes.plot(
        [chosen], [grouping.amad], marker="o", markersize=11, mfc="none", mec=COLOURS[1], mew=2
    )
    axes.annotate(
        f"G = {chosen}",
        (chosen, grouping.amad),
        xytext=(10, 8),
        textcoords="offset points",
        color=COLOURS[1],
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )
    axes.set(xlabel="groups G", ylabel="AMAD")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    return figure
