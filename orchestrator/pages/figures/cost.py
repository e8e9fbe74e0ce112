"""What grouping saves: C(G) = A + T G, the model's FLOPs and an autoencoder's for each group."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.pages.figures.style import COLOURS, GREY, new


def against_per_layer(cost: Mapping[str, Any]) -> Figure:
    """FLOPs against the number of autoencoders; this run's, and one for each layer.

    Args:
        cost: That section of `cards.json` (docs/evaluation.md).
    """
    figure, axes = new(3.2)
    n_groups, n_layers = cost["n_groups"], cost["n_layers"]
    model = (cost["grouped"]["model_flops"] or 0) / 1e12
    ends = {
        n_groups: cost["grouped"]["autoencoder_flops"] / 1e12,
        n_layers: cost["per_layer"]["autoencoder_flops"] / 1e12,
    }
    slope = ends[n_groups] / n_groups
    numbers = range(n_layers + 1)
    axes.fill_between(numbers, model, color=GREY, alpha=0.25, linewidth=0, label="model, A")
    axes.plot(
        numbers, [model + slope * g for g in numbers], color=COLOURS[0], label="autoencoders, T G"
    )
    for n, label, colour in (
        (n_groups, f"{n_groups} groups", COLOURS[1]),
        (n_layers, f"{n_layers} layers", "black"),
    ):
        axes.plot([n], [model + ends[n]], marker="o", color=colour, markersize=8)
        axes.annotate(
            f"{label}\n{model + ends[n]:.3g} TFLOP",
            (n, model + ends[n]),
            xytext=(-8, 2),
            textcoords="offset points",
            ha="right",
            color=colour,
            size=9,
        )
    axes.set(xlabel="autoencoders G", ylabel="TFLOP (lower is better)", xlim=(0, n_layers * 1.05))
    axes.set_ylim(0, 1.2 * (model + max(ends.values())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="lower right")
    return figure
