"""What all figures share: colours, axes, and how a page holds them.

Colours are Okabe and Ito's, told apart by colour-blind readers; where there are more groups than
these, viridis. What colour says, a marker or a label says too.
"""

import base64
import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
GREY = "#5b6675"
WIDTH = 5.2
"""Inches; a phone shows it at three quarters of its size."""

MAX_SVG_BYTES = 200_000
_TEXT: Any = {"svg.hashsalt": "strata", "svg.fonttype": "path"}


def group_colour(group: int, n_groups: int) -> str:
    """The colour of a group, of so many."""
    if n_groups <= len(COLOURS):
        return COLOURS[group]
    return to_hex(matplotlib.colormaps["viridis"](0.95 * group / (n_groups - 1)))


def new(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure, panels = panels_of(1, height, width)
    return figure, panels[0]


def panels_of(n: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of panels, one above the other."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    panels = [figure.add_subplot(n, 1, i + 1) for i in range(n)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, panels


def image(figure: Figure) -> str:
    """The figure as the `src` of an image: SVG, or PNG where that is large. The same each time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_TEXT):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    kind = "svg+xml"
    if buffer.tell() > MAX_SVG_BYTES:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
