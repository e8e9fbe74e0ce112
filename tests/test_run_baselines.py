"""`strata evaluate --baselines` on a finished run: cards, baselines of every layer, cost, advice."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from actors.grouping import choose
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.stages.group import load_groups
from storage.activations import ActivationStore
from tests.runs import kill_when, start, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOLERANCE = 1e-4
FLAGS = ("--baselines", "--set", f"evaluate.tolerance={TOLERANCE}")


def copied(finished: Path, folder: Path) -> tuple[Path, Path]:
    """A finished run of its own: its configuration and directory."""
    config, run = write_config(folder), folder / "runs" / "small"
    shutil.copytree(finished.parent / "runs" / "small", run)
    (run / "config.yaml").write_text(config_file.dump(config_file.load(config)))
    return config, run


def stamps(folder: Path, pattern: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.glob(pattern)}


@dataclass
class Judged:
    config: Path
    run: Path
    output: str
    before: dict[Path, int]
    """The evaluations that were there."""

    outdated: Path
    """The one of them that lacked a measure."""

    @property
    def cards(self) -> dict[str, Any]:
        return json.loads((self.run / "cards.json").read_text())


@pytest.fixture(scope="module")
def judged(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Judged:
    config, run = copied(finished[0], tmp_path_factory.mktemp("judged"))
    outdated = min(run.glob("evaluations/*/*.json"))
    report = json.loads(outdated.read_text())
    del report["kl"]
    write_json(outdated, report)
    before = stamps(run, "evaluations/*/*.json")
    status, output = strata("evaluate", config, *FLAGS)
    assert status == 0, output
    return Judged(config=config, run=run, output=output, before=before, outdated=outdated)


def test_a_run_has_cards_against_the_groups_mean(finished: tuple[Path, str]):
    run = finished[0].parent / "runs" / "small"
    cards = json.loads((run / "cards.json").read_text())
    assert (cards["reference"], cards["against_baselines"]) == ("group_mean", None)
    for group in cards["groups"]:
        fvus = [card["fvu"] for card in group["cards"]]
        assert [card["layer"] for card in group["cards"]] == group["layers"]
        assert group["mean"]["fvu"] == pytest.approx(np.mean(fvus))
        excess = [card["excess_fvu"] for card in group["cards"]]
        np.testing.assert_allclose(excess, np.array(fvus) - np.mean(fvus))
        assert group["worst_layer"] == group["layers"][int(np.argmax(fvus))]
        assert group["misses"] == (max(excess) > cards["tolerance"])
    assert cards["cost"]["saved_seconds"] is None


def test_only_evaluations_that_lack_a_measure_are_made_again(judged: Judged):
    after = stamps(judged.run, "evaluations/*/*.json")
    changed = {file for file, stamp in after.items() if judged.before[file] != stamp}
    assert changed == {judged.outdated}
    assert "kl" in json.loads(judged.outdated.read_text())


def test_every_layer_has_a_baseline_of_its_groups_kind_and_budget(judged: Judged):
    for group in judged.cards["groups"]:
        best = read_json(judged.run / "trials" / group["trial"] / "result.json")
        for card in group["cards"]:
            if len(group["layers"]) == 1:
                assert card["baseline"]["trial"] == group["trial"]
                continue
            folder = judged.run / "baselines" / "trials" / card["baseline"]["trial"]
            own = read_json(folder / "result.json")
            assert own["layers"] == [card["layer"]]
            same = set(own) - {
                *("trial", "group", "layers", "seconds", "data_wait_fraction"),
                *("fvu", "fvu_per_layer", "l0", "dead_fraction"),
            }
            assert {key: own[key] for key in same} == {key: best[key] for key in same}


def test_cards_compare_with_the_baselines(judged: Judged):
    lost = []
    for group in judged.cards["groups"]:
        for card in group["cards"]:
            file = f"layer-{card['layer']}.json"
            report = read_json(judged.run / "evaluations" / group["trial"] / file)
            assert {key: card[key] for key in report} == report
            own = card["baseline"]
            assert card["excess_fvu"] == pytest.approx(card["fvu"] - own["fvu"])
            assert own["ev_lost"] == pytest.approx(card["fvu"] - own["fvu"])
            recovered = own["ce_recovered"] - card["ce_recovered"]
            assert own["ce_recovered_lost"] == pytest.approx(recovered)
            lost.append(own["ev_lost"])
    against = judged.cards["against_baselines"]
    assert against["ev_lost"] == pytest.approx(np.mean(lost))
    assert against["worst_ev_lost"] == max(lost)
    assert f"Sharing costs {100 * np.mean(lost):.2f} points" in judged.output


def test_a_baseline_trains_on_all_tokens_of_its_layer(judged: Judged):
    train, own = (
        ActivationStore.open(judged.run / name) for name in ("train.zarr", "baselines.zarr")
    )
    assert own.spec.n_rows == train.spec.n_rows
    assert own.spec.groups == tuple((layer,) for layer in own.spec.layers)
    span = (0, train.spec.n_rows)
    layers = train.row_layers("groups/0", *span)
    for layer in train.spec.groups[0]:
        place = own.spec.layers.index(layer)
        mine = layers == layer
        same = own.read(f"groups/{place}", *span)[mine] == train.read("groups/0", *span)[mine]
        assert same.all(), "the rows of the group's store are among them, at their places"


def test_a_split_is_advised_that_divides_the_group(judged: Judged):
    advised = [group for group in judged.cards["groups"] if group["misses"]]
    assert advised, "at this tolerance some layer is better off alone"
    cfg, found = (
        config_file.load(judged.config),
        load_groups(RunDirectory.of(config_file.load(judged.config))),
    )
    for group in advised:
        split = group["split"]
        for n_groups in range(cfg.group.n_groups + 1, split["n_groups"] + 1):
            grouping = choose(
                found.report.matrix, replace(cfg.group, n_groups=n_groups), found.report.layers
            )
            parts = [
                [layer for layer in g.layers if layer in group["layers"]] for g in grouping.groups
            ]
            parts = [part for part in parts if part]
            assert (len(parts) > 1) == (n_groups == split["n_groups"])
        assert parts == split["parts"]
        assert f"group.n_groups: {split['n_groups']} divides it" in group["advice"]
        assert group["advice"] in judged.output


def test_the_cost_is_that_of_the_results(judged: Judged):
    cost, groups = judged.cards["cost"], judged.cards["groups"]
    assert (cost["n_groups"], cost["n_layers"]) == (2, 7)
    folders = [judged.run / "trials" / group["trial"] for group in groups]
    seconds = [read_json(folder / "result.json")["seconds"] for folder in folders]
    assert cost["grouped"]["training_seconds"] == pytest.approx(sum(seconds))
    assert cost["per_layer"]["training_seconds"] > 0
    taken = json.loads((judged.run / "stage_seconds.json").read_text())
    assert cost["per_layer"]["harvest_seconds"] == taken["harvest_baselines"]
    model = cost["flops_per_token"]["model"]
    tokens = cost["grouped"]["model_flops"] / model
    rows = ActivationStore.open(judged.run / "train.zarr").spec
    assert tokens == rows.n_sequences * 256 == cost["tokens"]["harvested"]
    assert 0 < cost["saved"] < cost["saved_training"] < 1


def test_mlflow_has_the_baselines_and_what_they_say(judged: Judged):
    summary = json.loads((judged.run / "summary.json").read_text())
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    parent = client.get_run(summary["mlflow"]["parent_run_id"])
    figures = parent.data.metrics
    against = judged.cards["against_baselines"]
    assert figures["ev_lost"] == pytest.approx(against["ev_lost"])
    assert figures["saved"] == pytest.approx(judged.cards["cost"]["saved"])
    assert "cards.json" in {file.path for file in client.list_artifacts(parent.info.run_id)}
    own = client.search_runs([parent.info.experiment_id], "tags.kind = 'baseline'")
    trials = [card["baseline"] for group in judged.cards["groups"] for card in group["cards"]]
    assert sorted(str(run.info.run_name) for run in own) == sorted(t["trial"] for t in trials)
    for run in own:
        [told] = [t for t in trials if t["trial"] == run.info.run_name]
        [layer] = [k.removeprefix("kl_layer_") for k in run.data.metrics if k.startswith("kl_")]
        assert run.data.metrics[f"kl_layer_{layer}"] == pytest.approx(told["kl"])
        assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"sae"}


def test_it_is_done_once_and_kept_without_the_flag(judged: Judged):
    before = stamps(judged.run, "**/*.json")
    status, output = strata("evaluate", judged.config, *FLAGS[1:])
    assert status == 0, output
    assert stamps(judged.run, "**/*.json") == before
    assert "Sharing costs" in output
    table = output[output.index("Fidelity") :]
    assert len(re.findall(r"^\W+\d+ \W+\d+!", table, re.MULTILINE)) == 2


@pytest.mark.crash
def test_baselines_that_were_killed_end_like_unbroken_ones(
    judged: Judged, finished: tuple[Path, str], tmp_path: Path
):
    config, run = copied(finished[0], tmp_path)
    for made in ("baselines.zarr/commits/*.json", "baselines/trials/*/result.json"):
        kill_when(start("evaluate", config, *FLAGS), lambda made=made: bool(stamps(run, made)))
    kept = stamps(run, "baselines/trials/*/result.json")
    status, output = strata("evaluate", config, *FLAGS)
    assert status == 0, output
    after = stamps(run, "baselines/trials/*/result.json")
    assert {file: after[file] for file in kept} == kept
    cards = json.loads((run / "cards.json").read_text())
    assert cards["groups"] == judged.cards["groups"]
    assert cards["against_baselines"] == judged.cards["against_baselines"]
