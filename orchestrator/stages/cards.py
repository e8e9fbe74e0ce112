"""The fidelity cards: what each layer of a group gets of the autoencoder that it shares.

docs/evaluation.md has the schema of `cards.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.grouping import LayerGroup, choose
from actors.model_flops import forward_flops_per_token
from actors.trial import Trial
from orchestrator.planning.cost import Harvested, Shared, cost
from orchestrator.session import Session
from orchestrator.stages.baselines import Baseline, Best
from orchestrator.stages.evaluate import Evaluations, Report
from orchestrator.stages.group import GroupStage
from sae.metrics import DENSE_FREQUENCY
from storage.activations import ActivationStore

_SETTINGS = ("encoder", "h", "m", "n", "activation", "k", "selection", "d_sae")
_NOT_AVERAGED = ("frequency_histogram",)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The next grouping that divides a group."""

    n_groups: int
    """What `group.n_groups` has to be."""

    parts: tuple[tuple[int, ...], ...]
    """What becomes of the group's layers."""


def cards(
    session: Session,
    groups: GroupStage,
    best: Best,
    evaluations: Evaluations,
    own: Mapping[int, Baseline] | None,
) -> dict[str, Any]:
    """The content of `cards.json`.

    Args:
        session: Of the run.
        groups: What the grouping found.
        best: Of every group the best trial and its result, in the groups' order.
        evaluations: Of these at least.
        own: Every layer's baseline, if there are any.
    """
    judged = [
        _group_card(session, groups, group, trial, result, evaluations[trial.id], own)
        for group, (trial, result) in zip(groups.grouping.groups, best, strict=True)
    ]
    return {
        "version": 1,
        "run_dir": str(session.run.path),
        "is_causal": session.shape.is_causal,
        "tolerance": session.cfg.evaluate.tolerance,
        "reference": "group_mean" if own is None else "baseline",
        "dense_threshold": DENSE_FREQUENCY,
        "groups": judged,
        "against_baselines": None if own is None else _against_baselines(judged),
        "cost": _cost(session, best, own),
    }


def _group_card(
    session: Session,
    groups: GroupStage,
    group: LayerGroup,
    trial: Trial,
    result: Mapping[str, Any],
    reports: Mapping[int, Report],
    own: Mapping[int, Baseline] | None,
) -> dict[str, Any]:
    mean = _mean(list(reports.values()))
    of_layers = [_layer_card(layer, reports[layer], mean, own) for layer in group.layers]
    worst = max(of_layers, key=lambda card: card["excess_fvu"])
    misses = worst["excess_fvu"] > session.cfg.evaluate.tolerance
    split = next_split(session, groups, group.layers) if misses else None
    return {
        "id": group.id,
        "layers": list(group.layers),
        "trial": trial.id,
        **{key: result[key] for key in _SETTINGS},
        "mean": mean,
        "worst_layer": worst["layer"],
        "misses": misses,
        "split": split and {"n_groups": split.n_groups, "parts": [list(p) for p in split.parts]},
        "advice": _advice(session, group.id, worst, split) if misses else None,
        "cards": of_layers,
    }


def _layer_card(
    layer: int, report: Report, mean: Report, own: Mapping[int, Baseline] | None
) -> dict[str, Any]:
    reference = mean if own is None else own[layer].report
    return {
        "layer": layer,
        **report,
        "excess_fvu": report["fvu"] - reference["fvu"],
        "baseline": None if own is None else _baseline(own[layer], report),
    }


def _baseline(own: Baseline, report: Report) -> dict[str, Any]:
    recovered = own.report["ce_recovered"]
    return {
        "trial": own.trial,
        **own.report,
        "ev_lost": own.report["explained_variance"] - report["explained_variance"],
        "ce_recovered_lost": None if recovered is None else recovered - report["ce_recovered"],
    }


def _mean(reports: Sequence[Report]) -> Report:
    """Of every measure the mean over layers; None where a layer has none."""
    found: Report = {}
    for measure in reports[0]:
        values = [report[measure] for report in reports]
        if measure not in _NOT_AVERAGED:
            found[measure] = None if None in values else sum(values) / len(values)
    return found


def next_split(session: Session, groups: GroupStage, layers: tuple[int, ...]) -> Split | None:
    """The smallest `group.n_groups` above today's that divides a group; None if nothing does."""
    cfg, report = session.cfg.group, groups.report
    alone = cfg.last_layer == "alone"
    n_groupable = len(report.layers) - (cfg.last_layer != "grouped")
    for n_groups in range(len(groups.grouping.groups) - alone + 1, n_groupable + 1):
        found = choose(report.matrix, replace(cfg, n_groups=n_groups), report.layers)
        among = (tuple(layer for layer in g.layers if layer in layers) for g in found.groups)
        parts = tuple(part for part in among if part)
        if len(parts) > 1:
            return Split(n_groups=n_groups, parts=parts)
    return None


def _advice(session: Session, group: int, worst: Mapping[str, Any], split: Split | None) -> str:
    above = "its own autoencoder's" if worst["baseline"] else "its group's mean"
    advice = (
        f"group {group}: FVU of layer {worst['layer']} is {worst['fvu']:.4f}, {worst['excess_fvu']:.4f} above "
        f"{above}, and evaluate.tolerance allows {session.cfg.evaluate.tolerance:g}"
    )
    if split is None:
        return f"{advice}; no grouping divides it"
    parts = " ".join(str(list(part)) for part in split.parts)
    return f"{advice}; group.n_groups: {split.n_groups} divides it into {parts}, in a run_dir of its own"


def _against_baselines(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = {card["layer"]: card["baseline"] for group in judged for card in group["cards"]}
    lost = {layer: baseline["ev_lost"] for layer, baseline in own.items()}
    recovered = [baseline["ce_recovered_lost"] for baseline in own.values()]
    worst = max(lost, key=lambda layer: lost[layer])
    return {
        "ev_lost": sum(lost.values()) / len(lost),
        "ce_recovered_lost": None if None in recovered else sum(recovered) / len(recovered),
        "worst_ev_lost": lost[worst],
        "worst_layer": worst,
    }


def _cost(session: Session, best: Best, own: Mapping[int, Baseline] | None) -> dict[str, Any]:
    run, seconds = session.run, session.run.stage_seconds()
    shared = [
        Shared(
            n_layers=len(trial.layers),
            trial=trial,
            result=result,
            baselines=None if own is None else [own[layer].result for layer in trial.layers],
        )
        for trial, result in best
    ]
    harvested = Harvested(
        context=session.context,
        n_sequences=ActivationStore.open(run.train).spec.n_sequences,
        n_pilot_sequences=ActivationStore.open(run.pilot).spec.n_sequences,
        grouped_seconds=seconds.get("harvest_train"),
        per_layer_seconds=seconds.get("harvest_baselines"),
    )
    flops = forward_flops_per_token(session.cfg.model, session.context)
    return cost(shared, harvested, flops)
