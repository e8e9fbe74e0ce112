"""The result of a run: `summary.json`, the final table, and what MLflow keeps with the parent run."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.evaluate import Evaluations
from orchestrator.figures import encoder_label, fvu_against_l0
from orchestrator.group import GroupStage
from orchestrator.session import Session
from sae.config import SaeConfig

_BEST = (
    *(
        "trial",
        "encoder",
        "h",
        "m",
        "n",
        "activation",
        "k",
        "selection",
        "fvu",
        "l0",
        "dead_fraction",
    ),
    *("n_parameters", "encoder_parameters"),
)


def summarise(
    session: Session,
    groups: GroupStage,
    results: Sequence[Mapping[str, Any]],
    winners: Sequence[Mapping[str, Any]],
    evaluations: Evaluations,
) -> dict[str, Any]:
    """The content of `summary.json`.

    `groups[].best` is the winner of least FVU; `groups[].winners` are all that were evaluated, and
    `groups[].front` names the trials that no other trial of the group beats in FVU, L0 and
    parameters at once. `ce_recovered` is empty for an encoder.
    """
    dense = SaeConfig(
        d_model=session.shape.d_model, d_sae=session.cfg.sweep.d_sae, k=min(session.cfg.sweep.k)
    )

    def entry(result: Mapping[str, Any]) -> dict[str, Any]:
        layers = evaluations[result["trial"]]
        return {
            **{key: result[key] for key in _BEST},
            "ce_recovered": {
                str(layer): r["ce_recovered"]
                for layer, r in layers.items()
                if r["ce_recovered"] is not None
            },
            "fvu_per_layer": {str(layer): r["fvu"] for layer, r in layers.items()},
        }

    by_group = []
    for group in groups.grouping.groups:
        mine = [entry(winner) for winner in winners if winner["group"] == group.id]
        by_group.append(
            {
                "id": group.id,
                "layers": list(group.layers),
                "max_distance": group.max_distance,
                "best": min(mine, key=lambda winner: winner["fvu"]),
                "winners": mine,
                "front": front([r for r in results if r["group"] == group.id]),
            }
        )
    return {
        "version": 1,
        "run_dir": str(session.run.path),
        "n_layers": session.shape.n_layers,
        "d_model": session.shape.d_model,
        "d_sae": session.cfg.sweep.d_sae,
        "dense_n_parameters": dense.n_parameters,
        "amad": groups.grouping.amad,
        "amad_curve": {str(g): value for g, value in groups.grouping.amad_curve.items()},
        "groups": by_group,
        "n_trials": len(results),
        "stage_seconds": session.run.stage_seconds(),
        "mlflow": session.tracker.identity(),
    }


def front(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Trials that no other beats: none is as good in FVU, L0 and parameters and better in one."""

    def cost(result: Mapping[str, Any]) -> tuple[float, float, int]:
        return result["fvu"], result["l0"], result["n_parameters"]

    def beaten(result: Mapping[str, Any]) -> bool:
        return any(
            cost(other) != cost(result)
            and all(a <= b for a, b in zip(cost(other), cost(result), strict=True))
            for other in results
        )

    return [result["trial"] for result in results if not beaten(result)]


def track(session: Session, results: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> None:
    """Tell MLflow what the run came to."""
    recovered = [
        v for g in data["groups"] for w in g["winners"] for v in w["ce_recovered"].values()
    ]
    session.tracker.metrics(
        {
            "amad": data["amad"],
            "n_groups": len(data["groups"]),
            "n_trials": data["n_trials"],
            "mean_best_fvu": sum(g["best"]["fvu"] for g in data["groups"]) / len(data["groups"]),
            **({"worst_ce_recovered": min(recovered)} if recovered else {}),
        }
    )
    session.tracker.figure(fvu_against_l0(results), "fvu_against_l0.png")
    session.tracker.artifact(session.run.report, "report")


def show(console: Console, data: Mapping[str, Any]) -> None:
    """Print the result of a finished run."""
    table = Table(title="Winners", title_justify="left", pad_edge=False)
    columns = ("group", "layers", "encoder", "k", "FVU", "L0", "dead", "CE recovered", "parameters")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[1:3] else "right")
    for group in data["groups"]:
        for winner in group["winners"]:
            is_best = winner["trial"] == group["best"]["trial"]
            share = winner["n_parameters"] / data["dense_n_parameters"]
            table.add_row(
                f"{group['id']}{'*' if is_best else ' '}",
                ", ".join(map(str, group["layers"])),
                f"{encoder_label(winner)}, {winner['selection']}",
                str(winner["k"]),
                f"{winner['fvu']:.4f}",
                f"{winner['l0']:.1f}",
                f"{winner['dead_fraction']:.1%}",
                _span(winner["ce_recovered"].values()),
                f"{winner['n_parameters']:,} ({share:.0%} of dense)",
            )
    console.print(table)
    seconds = data["stage_seconds"]
    console.print(
        f"{len(data['groups'])} groups over {data['n_layers']} layers (AMAD {data['amad']:.3f}), "
        f"{data['n_trials']} trials, {sum(seconds.values()):.0f} s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        "FVU: mean over the group's layers on unseen documents, lower is better; * is the group's best.",
        "CE recovered: 1 is the model untouched, 0 is the layer zeroed; least and most over the layers.",
        f"Run:    {data['run_dir']}",
        f"Report: {data['run_dir']}/report/index.html",
        f"MLflow: strata ui {data['run_dir']}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _span(values: Collection[float]) -> str:
    """The least and the most, or `-` where there are none."""
    if not values:
        return "-"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} .. {high}"
