"""The result of a run: `summary.json`, and what MLflow keeps with the parent run."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pages.figures.training import fvu_against_l0
from orchestrator.session import Session
from orchestrator.stages.evaluate import Evaluations
from orchestrator.stages.group_file import GroupStage
from orchestrator.sweeps.front import fronts
from orchestrator.sweeps.winners import rank
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
        "d_sae",
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

    `groups[].best` is the winner of least FVU (of those trained to the end, if there are any); `groups[].winners` are all that were evaluated, and
    `groups[].front` names the trials of the Pareto front, of which `pareto.json` has the figures.
    `ce_recovered` is empty for an encoder.
    """

    def dense(d_sae: int) -> int:
        return SaeConfig(d_model=session.shape.d_model, d_sae=d_sae, k=1).n_parameters

    def entry(result: Mapping[str, Any]) -> dict[str, Any]:
        layers = evaluations[result["trial"]]
        return {
            **{key: result[key] for key in _BEST},
            "stopped_at": result.get("stopped_at"),
            "dense_n_parameters": dense(result["d_sae"]),
            "ce_recovered": {
                str(layer): r["ce_recovered"]
                for layer, r in layers.items()
                if r["ce_recovered"] is not None
            },
            "fvu_per_layer": {str(layer): r["fvu"] for layer, r in layers.items()},
        }

    by_group, unbeaten = [], fronts(results)
    for group in groups.grouping.groups:
        mine = [entry(winner) for winner in winners if winner["group"] == group.id]
        by_group.append(
            {
                "id": group.id,
                "layers": list(group.layers),
                "max_distance": group.max_distance,
                "best": min(mine, key=rank),
                "winners": mine,
                "front": [point["trial"] for point in unbeaten[group.id]],
            }
        )
    return {
        "version": 1,
        "run_dir": str(session.run.path),
        "n_layers": session.shape.n_layers,
        "d_model": session.shape.d_model,
        "d_sae": session.cfg.sweep.d_sae,
        "dense_n_parameters": dense(session.cfg.sweep.d_sae),
        "amad": groups.grouping.amad,
        "amad_curve": {str(g): value for g, value in groups.grouping.amad_curve.items()},
        "groups": by_group,
        "n_trials": len(results),
        "n_stopped": sum(rank(result)[0] for result in results),
        "stage_seconds": session.run.stage_seconds(),
        "mlflow": session.tracker.identity(),
    }


def track(
    session: Session,
    results: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    cards: Mapping[str, Any],
) -> None:
    """Tell MLflow what the run came to; `cards` is the content of `cards.json`."""
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
            **_of_cards(cards),
        }
    )
    session.tracker.artifact(session.run.cards)
    session.tracker.figure(fvu_against_l0(results), "fvu_against_l0.png")
    session.tracker.artifact(session.run.pareto)
    session.tracker.artifact(session.run.pareto_figure, "figures")
    session.tracker.artifact(session.run.report, "report")


def _of_cards(cards: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow has of the fidelity cards as figures; those that are known."""
    excess = [card["excess_fvu"] for group in cards["groups"] for card in group["cards"]]
    figures = {
        "worst_excess_fvu": max(excess),
        **{key: cards["cost"][key] for key in ("saved", "saved_training", "saved_seconds")},
    }
    for key in ("ev_lost", "ce_recovered_lost", "worst_ev_lost"):
        figures[key] = cards["against_baselines"] and cards["against_baselines"][key]
    return {key: value for key, value in figures.items() if value is not None}
