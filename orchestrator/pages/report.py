"""The report: one HTML page with every figure inside it, for people; it works offline.

It is made of a run's files alone, so `strata report` writes the same page again. A section whose
files are not there is left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from orchestrator.labels import encoder_label, figure, size, span
from orchestrator.pages.bottlenecks import bottlenecks, load_until_the_end
from orchestrator.pages.figures import (
    cost,
    fidelity,
    groups,
    interactive,
    progressive,
    time,
    training,
)
from orchestrator.pages.figures.parallel import FOLLOW, parallel
from orchestrator.pages.figures.pareto import pareto
from orchestrator.pages.figures.style import image
from orchestrator.pages.headline import headline
from orchestrator.run_directory import (
    RunDirectory,
    read_json,
    read_summary,
    write_atomically,
)
from orchestrator.stages.group_file import GroupStage, load_groups
from orchestrator.sweeps.front import AIMS, fronts
from orchestrator.sweeps.winners import Result
from storage.files import read_json_lines

TEMPLATES = Path(__file__).parent / "templates"

SECTIONS = {
    "autoencoders": "Autoencoders",
    "groups": "Groups of layers",
    "sweep": "Sweep",
    "training": "Training",
    "fidelity": "Fidelity of each layer",
    "progressive": "Smaller dictionaries",
    "cost": "Cost against one per layer",
    "time": "Time and bottlenecks",
    "environment": "Environment",
    "configuration": "Configuration",
}
"""In the order of the page; each has a template of its name, and its title here."""


def write_report(
    run: RunDirectory, stage: GroupStage, results: Sequence[Result], data: Mapping[str, Any]
) -> dict[str, Figure]:
    """Write `report/index.html`, and the figure of the fronts as a page of its own.

    Args:
        run: Where.
        stage: What the grouping found.
        results: Of all trials.
        data: The summary's content.

    Returns:
        The page's figures that no stage has told MLflow yet, by file name.
    """
    config = run.config.read_text()
    cfg = yaml.safe_load(config)
    cards = _if_there(run.cards)
    drawn = _figures(run, results, data, cards)
    early = {
        "distances.png": groups.distance_matrix(stage.report, stage.grouping),
        "amad.png": groups.amad_curve(stage.grouping, cfg["group"]["threshold"]),
    }
    dendrogram = groups.merges(stage.report, stage.grouping)
    if dendrogram is not None:
        early["dendrogram.png"] = dendrogram
    fronts_figure = pareto(results)
    title = f"Pareto fronts of {run.path.name}"
    write_atomically(run.pareto_figure, interactive.page(fronts_figure, "pareto", title))
    absent = {
        "fidelity": cards is None,
        "progressive": not any(name.startswith("progressive") for name in drawn),
        "cost": cards is None,
    }
    page = _environment().get_template("report.html.j2").render(
        sections={key: title for key, title in SECTIONS.items() if not absent.get(key)},
        head=headline(cfg, data, cards),
        data=data,
        cfg=cfg,
        stage=stage,
        cards=cards,
        results=sorted(results, key=lambda r: (r["group"], r["k"], r["fvu"])),
        aims=AIMS,
        fronts=fronts(results),
        script=interactive.script(),
        pareto=interactive.part(fronts_figure, "pareto"),
        parallel=interactive.part(parallel(results), "parallel", FOLLOW),
        images={Path(name).stem: image(figure) for name, figure in {**early, **drawn}.items()},
        time=bottlenecks(run, results),
        calls=_if_there(run.environment, list) or [],
        config=config,
    )  # fmt: skip
    write_atomically(run.report, page)
    return drawn


def rewrite_report(run: RunDirectory) -> None:
    """Write the report of a finished run from its files alone."""
    results = [read_json(file) for file in sorted(run.trials.glob("*/result.json"))]
    data = {**read_summary(run), "run_dir": str(run.path)}  # it may have moved
    write_report(run, load_groups(run), results, data)


def _figures(
    run: RunDirectory,
    results: Sequence[Result],
    data: Mapping[str, Any],
    cards: Mapping[str, Any] | None,
) -> dict[str, Figure]:
    """What matplotlib draws of what came after the groups, by file name."""
    result_of = {result["trial"]: result for result in results}
    won = [result_of[w["trial"]] for group in data["groups"] for w in group["winners"]]
    curves = {w["trial"]: read_json_lines(run.trials / w["trial"] / "metrics.jsonl") for w in won}
    drawn = {
        "training_curves.png": training.training_curves(won, curves),
        "dead_latents.png": training.dead_latents(won, curves),
        "stage_seconds.png": time.stages(data["stage_seconds"]),
    }
    load = load_until_the_end(run)
    if len(load) > 1:
        drawn["load.png"] = time.load(load)
    if cards is not None:
        drawn["fidelity.png"] = fidelity.per_layer(cards)
        drawn["latent_frequencies.png"] = fidelity.frequencies(cards)
        drawn["cost.png"] = cost.against_per_layer(cards["cost"])
    for winner in won:
        files = (run.progressive / winner["trial"]).glob("layer-*.json")
        layers = [read_json(file) for file in sorted(files, key=_natural)]
        if layers:
            drawn[f"progressive_{winner['trial']}.png"] = progressive.progressive_figure(
                winner["trial"], layers
            )
    return drawn


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["encoder"] = encoder_label
    environment.filters["bytes"] = size
    environment.filters["number"] = lambda value, digits=4: figure(value, f",.{digits}f")
    environment.filters["span"] = lambda values, digits: span(values, f",.{digits}f")
    environment.filters["percent"] = lambda value: figure(value, ".1%")
    environment.filters["difference"] = lambda value: figure(value, "+.4f")
    return environment


def _if_there(file: Path, kind: type = dict) -> Any:
    return read_json(file, kind) if file.is_file() else None


def _natural(file: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", file.stem)]
