"""The Pareto front of every group as an interactive figure that needs no network."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from orchestrator.labels import encoder_label
from orchestrator.pages.figures.style import GREY, group_colour
from orchestrator.sweeps.front import AIMS, front
from orchestrator.sweeps.winners import Result, rank

_SHAPES = {
    "dense": "circle",
    "Kronecker": "diamond",
    "beaten by another": "circle-open",
    "given up": "x-thin-open",
}
HEIGHT_PIXELS = 520
_HOVER = (
    "<b>group %{customdata[0]}, %{customdata[1]}, k %{customdata[2]}</b><br>"
    "FVU %{customdata[3]:.4f}, L0 %{customdata[4]:.1f}<br>"
    "%{customdata[5]:,} encoder parameters<br>"
    "%{customdata[6]:,} encoder FLOPs per token<br>%{customdata[7]}<extra></extra>"
)


def pareto(results: Sequence[Result]) -> go.Figure:
    """FVU of every trial against L0, encoder parameters or FLOPs, as a button chooses.

    Colour is the group; the shape tells dense encoders from Kronecker ones; only what is on its
    group's front is filled.
    """
    figure, shown = go.Figure(), []
    groups = sorted({result["group"] for result in results})
    for group in groups:
        mine = [result for result in results if result["group"] == group]
        whole = [result for result in mine if not rank(result)[0]]
        unbeaten = front(whole)
        names = {result["trial"] for result in unbeaten}
        parts = (
            ([r for r in mine if rank(r)[0]], "given up", 8),
            ([r for r in whole if r["trial"] not in names], "beaten", 8),
            (unbeaten, "on the front", 11),
        )
        for part, kind, size in parts:
            shown.append(part)
            figure.add_scatter(
                x=[r["l0"] for r in part],
                y=[r["fvu"] for r in part],
                customdata=[_details(r, kind) for r in part],
                hovertemplate=_HOVER,
                name=f"group {group}",
                legendgroup=f"group {group}",
                showlegend=part is unbeaten,
                mode="markers",
                opacity=1.0 if part is unbeaten else 0.6,
                marker={
                    "color": group_colour(group, max(groups) + 1),
                    "symbol": [_symbol(r, kind) for r in part],
                    "size": size,
                },
            )
    _explain(figure)
    figure.update_layout(
        template="plotly_white",
        dragmode=False,  # on a phone a finger scrolls the page
        height=HEIGHT_PIXELS,
        margin={"l": 56, "r": 12, "t": 48, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        xaxis={"title": {"text": AIMS["l0"]}},
        yaxis={"title": {"text": "FVU (lower is better)"}},
        legend={"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "pad": {"t": 0, "b": 0},
                "buttons": [
                    _button(label, aim, shown)
                    for label, aim in (
                        ("L0", "l0"),
                        ("parameters", "encoder_parameters"),
                        ("FLOPs", "encoder_flops_per_token"),
                    )
                ],
            }
        ],
    )
    return figure


def _details(result: Result, kind: str) -> list[Any]:
    return [result["group"], encoder_label(result), result["k"], *(result[a] for a in AIMS), kind]


def _symbol(result: Mapping[str, Any], kind: str) -> str:
    if kind == "given up":
        return "x-thin-open"
    shape = "circle" if result["encoder"] == "dense" else "diamond"
    return shape if kind == "on the front" else f"{shape}-open"


def _explain(figure: go.Figure) -> None:
    """Add what the shapes mean to the legend."""
    for name, symbol in _SHAPES.items():
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=name,
            marker={"color": GREY, "symbol": symbol, "size": 9},
            hoverinfo="skip",
        )


def _button(label: str, aim: str, shown: Sequence[Sequence[Result]]) -> dict[str, Any]:
    x = [[result[aim] for result in part] for part in shown] + [[None]] * len(_SHAPES)
    scale = "linear" if aim == "l0" else "log"
    axis = {"xaxis.title.text": AIMS[aim], "xaxis.type": scale, "xaxis.autorange": True}
    return {"label": label, "method": "update", "args": [{"x": x}, axis]}
