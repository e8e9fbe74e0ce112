"""How pages hold plotly's figures: the script that draws them is in the page, once."""

from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


def script() -> str:
    """What draws all figures of a page; some 5 MB, as the page must work where there is no network."""
    return get_plotlyjs()


def part(figure: go.Figure, name: str, then: str | None = None) -> str:
    """The figure as a part of a page that has the `script` already. The same figure, the same text.

    Args:
        figure: With its height set.
        name: Its id in the page.
        then: JavaScript that runs when it is drawn.
    """
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        config=_config(figure),
        post_script=then,
    )


def page(figure: go.Figure, name: str, title: str) -> str:
    """The figure as a page of its own, as wide as the screen that shows it."""
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        config=_config(figure),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title></head>\n<body>{drawn}</body></html>\n"
    )


def _config(figure: go.Figure) -> dict[str, Any]:
    """Buttons to zoom with, where there are axes to zoom."""
    zooms = figure.layout.xaxis.visible is not False
    return {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": zooms,
        "modeBarButtons": [["zoom2d", "resetScale2d"]],
    }
