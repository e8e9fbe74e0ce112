"""Parallel coordinates: every trial as a line through its settings, its costs and its results.

Drawn as plain lines: plotly's own kind needs WebGL, which a browser without a GPU lacks, and paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from orchestrator.labels import encoder_label
from orchestrator.pages.figures.style import GREY, group_colour
from orchestrator.sweeps.front import front
from orchestrator.sweeps.winners import Result, rank

HEIGHT_PIXELS = 460
_FEW = 6
"""So many values of an axis are all named."""

_APART = 0.012
"""Lines of different groups through the same setting lie so far apart."""

_LOG_FROM = 8
"""A number that varies by this factor or more has a logarithmic axis."""

_ALWAYS = {
    "encoder": "encoder",
    "k": "k",
    "d_sae": "d_sae",
    "encoder_flops_per_token": "FLOPs ↓",
    "l0": "L0 ↓",
    "fvu": "FVU ↓",
}
_RESULTS = ("l0", "fvu")
_IF_VARIED = {"selection": "selection", "scaling": "scaling", "lr": "lr"}

FOLLOW = """
const plot = document.getElementById('{plot_id}'), last = plot.data.length - 1;
const show = event => {
  const point = event.points[0], width = point.data.meta;
  if (!width) return;
  const start = Math.floor(point.pointNumber / width) * width, end = start + width - 1;
  Plotly.restyle(plot, {x: [point.data.x.slice(start, end)], y: [point.data.y.slice(start, end)]}, [last]);
};
plot.on('plotly_hover', show);
plot.on('plotly_click', show);
"""
"""Draws the line of the trial under the pointer in black."""


@dataclass(frozen=True)
class _Axis:
    """One of the upright axes: where a value stands on it, from 0 to 1, and which are named."""

    title: str
    places: dict[Any, float]
    named: dict[str, float]
    is_setting: bool

    def at(self, value: Any, aside: float) -> float:
        """Where a line passes; `aside` parts lines that would else lie on one another."""
        return self.places[value] + (aside if self.is_setting else 0.0)


def parallel(results: Sequence[Result]) -> go.Figure:
    """A line per trial, coloured by group; trials on their group's front are bold."""
    rows = [{**result, "encoder": encoder_label(result)} for result in results]
    varied = {key: t for key, t in _IF_VARIED.items() if len({row[key] for row in rows}) > 1}
    columns = {"encoder": _ALWAYS["encoder"], **varied, **_ALWAYS}
    axes = {
        key: _axis(title, [row[key] for row in rows], key not in _RESULTS)
        for key, title in columns.items()
    }
    figure = go.Figure()
    groups = sorted({row["group"] for row in rows})
    for i, group in enumerate(groups):
        aside = _APART * (i - (len(groups) - 1) / 2)
        mine = [row for row in rows if row["group"] == group]
        whole = [row for row in mine if not rank(row)[0]]
        unbeaten = {row["trial"] for row in front(whole)}
        for on_front in (False, True):
            part = [row for row in mine if (row["trial"] in unbeaten) == on_front]
            figure.add_scatter(
                x=[x for _ in part for x in (*range(len(axes)), None)],
                y=[
                    y
                    for row in part
                    for y in (*(axis.at(row[key], aside) for key, axis in axes.items()), None)
                ],
                text=[row["trial"] for row in part for _ in range(len(axes) + 1)],
                customdata=[
                    value for row in part for value in (*(_told(row[key]) for key in axes), None)
                ],
                hovertemplate="<b>%{text}</b><br>%{customdata}<extra></extra>",
                mode="lines+markers",
                name=f"group {group}",
                legendgroup=f"group {group}",
                showlegend=on_front,
                meta=len(axes) + 1,
                opacity=0.9 if on_front else 0.3,
                line={"color": group_colour(group, len(groups)), "width": 2 if on_front else 1},
                marker={"size": 5},
            )
    figure.add_scatter(
        x=[], y=[], mode="lines", line={"color": "black", "width": 4}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    _draw(figure, list(axes.values()))
    fronts_only = [*[False, True] * len(groups), True]
    buttons = (("all trials", [True] * len(fronts_only)), ("on a front", fronts_only))
    figure.update_layout(
        template="plotly_white",
        dragmode=False,
        height=HEIGHT_PIXELS,
        margin={"l": 12, "r": 12, "t": 70, "b": 12},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.04, "yanchor": "top", "x": 0},
        xaxis={"visible": False, "range": [-0.55, len(axes) - 0.45]},
        yaxis={"visible": False, "range": [-0.06, 1.06]},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.1,
                "yanchor": "bottom",
                "pad": {"t": 0, "b": 0},
                "buttons": [
                    {"label": label, "method": "restyle", "args": [{"visible": visible}]}
                    for label, visible in buttons
                ],
            }
        ],
    )
    return figure


def _axis(title: str, values: Sequence[Any], is_setting: bool) -> _Axis:
    distinct = sorted(set(values))
    if isinstance(distinct[0], str):
        places = {v: (i + 0.5) / len(distinct) for i, v in enumerate(distinct)}
        return _Axis(title, places, {str(v): place for v, place in places.items()}, is_setting)
    low, high = distinct[0], distinct[-1]
    logarithmic = low > 0 and high >= _LOG_FROM * low

    def place(value: Any) -> float:
        if low == high:
            return 0.5
        if logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    named = distinct if len(distinct) <= _FEW else [low, middle, high]
    named_far_enough: dict[str, float] = {}
    for value in named:
        if all(abs(place(value) - other) > 0.05 for other in named_far_enough.values()):
            named_far_enough[_told(value)] = place(value)
    return _Axis(title, {v: place(v) for v in distinct}, named_far_enough, is_setting)


def _draw(figure: go.Figure, axes: Sequence[_Axis]) -> None:
    """Draw the upright axes, their titles and the values that are named."""
    for x, axis in enumerate(axes):
        figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, line={"color": GREY, "width": 1})
        figure.add_annotation(x=x, y=1.06, text=f"<b>{axis.title}</b>", showarrow=False)
        for text, place in axis.named.items():
            figure.add_annotation(
                x=x,
                y=place,
                text=text,
                showarrow=False,
                xanchor="left",
                xshift=5,
                font={"size": 11},
                bgcolor="rgba(255, 255, 255, 0.8)",
                borderpad=1,
            )


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.3g}"
