"""The report: one HTML page with every figure inside it, for people; it works offline."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from orchestrator.labels import encoder_label
from orchestrator.pages import figures
from orchestrator.pages.pareto_figure import as_html, pareto
from orchestrator.run_directory import RunDirectory, read_json, write_atomically
from orchestrator.stages.group import GroupStage, load_groups
from orchestrator.sweeps.front import AIMS, fronts
from storage.files import read_json_lines

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    run: RunDirectory,
    groups: GroupStage,
    results: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
) -> None:
    """Write `report/index.html`, and the figure of the fronts as a page of its own.

    Args:
        run: Where.
        groups: What the grouping found.
        results: Of all trials.
        data: The summary's content.
    """
    config = run.config.read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["encoder"] = encoder_label
    threshold = yaml.safe_load(config)["group"]["threshold"]
    best = [group["best"]["trial"] for group in data["groups"]]
    figure = pareto(results)
    write_atomically(run.pareto_figure, as_html(figure, whole_page=True))
    page = environment.get_template("report.html.j2").render(
        data=data,
        worst=min(
            (v for g in data["groups"] for v in g["best"]["ce_recovered"].values()), default=None
        ),
        results=sorted(results, key=lambda r: (r["group"], r["k"], r["fvu"])),
        config=config,
        aims=AIMS,
        fronts=fronts(results),
        front_figure=as_html(figure, whole_page=False),
        images={
            "distances": _png(figures.distance_matrix(groups.report, groups.grouping)),
            "amad": _png(figures.amad_curve(groups.grouping, threshold)),
            "curves": _png(
                figures.training_curves(
                    {name: read_json_lines(run.trials / name / "metrics.jsonl") for name in best}
                )
            ),
        },
    )
    write_atomically(run.report, page)


def rewrite_report(run: RunDirectory) -> None:
    """Write the report of a finished run from its files alone."""
    results = [read_json(file) for file in sorted(run.trials.glob("*/result.json"))]
    write_report(run, load_groups(run), results, read_json(run.summary))


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
