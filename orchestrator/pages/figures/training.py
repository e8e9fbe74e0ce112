"""How trials learnt, and where they came to."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from orchestrator.labels import encoder_label
from orchestrator.pages.figures.style import LINES, MARKERS, group_colour, new

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""The rows of `metrics.jsonl`, by trial."""


def training_curves(winners: Sequence[Mapping[str, Any]], curves: Curves) -> Figure:
    """FVU of the batches over steps: colour is the group, line the k.

    Args:
        winners: Results, whose `trial`, `group` and `k` are shown.
        curves: Of these trials.
    """
    figure, axes = _over_steps(winners, curves, "fvu", 1.0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("FVU of the batch")
    return figure


def dead_latents(winners: Sequence[Mapping[str, Any]], curves: Curves) -> Figure:
    """The share of latents that were dead over steps, for the same trials in the same style."""
    figure, axes = _over_steps(winners, curves, "dead_fraction", 100.0)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_ylabel("dead latents, %")
    return figure


def _over_steps(
    winners: Sequence[Mapping[str, Any]], curves: Curves, key: str, unit: float
) -> tuple[Figure, Axes]:
    figure, axes = new(3.2)
    groups, ks = sorted({w["group"] for w in winners}), sorted({w["k"] for w in winners})
    for winner in winners:
        rows = curves[winner["trial"]]
        axes.plot(
            [row["step"] for row in rows],
            [unit * row[key] for row in rows],
            color=group_colour(winner["group"], max(groups) + 1),
            linestyle=LINES[ks.index(winner["k"]) % len(LINES)],
            linewidth=1.5,
        )
    _name_groups(axes, groups)
    for i, k in enumerate(ks):
        axes.plot([], [], color="grey", linestyle=LINES[i % len(LINES)], label=f"k {k}")
    axes.legend(fontsize=9, frameon=False, ncols=2, loc="upper right")
    axes.set_xlabel("step")
    return figure, axes


def fvu_against_l0(results: Sequence[Mapping[str, Any]]) -> Figure:
    """FVU against L0 for every trial: colour is the group, marker the encoder."""
    figure, axes = new(4.2, 6.4)
    encoders = sorted({encoder_label(r) for r in results})
    groups = sorted({r["group"] for r in results})
    for r in results:
        axes.plot(
            *([r["l0"]], [r["fvu"]]),
            color=group_colour(r["group"], max(groups) + 1),
            marker=MARKERS[encoders.index(encoder_label(r)) % len(MARKERS)],
            linestyle="none",
            markersize=6,
            alpha=0.85,
        )
    for i, encoder in enumerate(encoders):
        axes.plot(
            [], [], color="grey", marker=MARKERS[i % len(MARKERS)], linestyle="none", label=encoder
        )
    _name_groups(axes, groups)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="L0 (latents per token)", ylabel="FVU (lower is better)", title="All trials")
    axes.set_ylim(bottom=0)
    return figure


def _name_groups(axes: Axes, groups: Sequence[int]) -> None:
    for group in groups:
        colour = group_colour(group, max(groups) + 1)
        axes.plot([], [], color=colour, linewidth=5, label=f"group {group}")
