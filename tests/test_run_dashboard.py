"""`strata dashboard` on a finished run: what it writes, what it leaves, what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.latent_contexts import AFTER, BEFORE
from actors.model_source import ModelSource
from actors.packer import load_tokenizer
from benchmarks.chromium import CHROMIUM, DRIVER, chromium, wait_for
from orchestrator.__main__ import main
from storage.tokens import TokenStore
from tests.runs import SMALL_RUN, strata, write_config
from tests.stores import files_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def made(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the finished run with its dashboard: its configuration, and what was printed."""
    folder = tmp_path_factory.mktemp("dashboard")
    shutil.copytree(finished[0].parent / "runs", folder / "runs")
    config = write_config(folder)
    status, output = strata("dashboard", config)
    assert status == 0, output
    return config, output


def run_of(config: Path) -> Path:
    return config.parent / "runs" / "small"


def data(run: Path, name: str) -> Any:
    """The JSON value that a data file hands to the page."""
    text = (run / "dashboard" / "data" / f"{name}.js").read_text(encoding="ascii")
    assert text.startswith(f'strata.put("{name}",')
    return json.loads(text.removeprefix(f'strata.put("{name}",').removesuffix(");\n"))


def test_every_group_is_there_with_all_latents_of_its_best_autoencoder(made: tuple[Path, str]):
    run = run_of(made[0])
    summary = json.loads((run / "summary.json").read_text())
    assert f"Dashboard: {run}/dashboard/index.html" in made[1]
    groups = data(run, "run")["groups"]
    assert [(g["id"], g["layers"]) for g in groups] == [
        (g["id"], g["layers"]) for g in summary["groups"]
    ]
    for told, group in zip(summary["groups"], groups, strict=True):
        index = data(run, f"g{group['id']}/index")
        assert len(index["count"]) == group["n_latents"] == told["best"]["d_sae"]
        # Validation's L0 is what the evaluation found, of the same rows and threshold.
        l0 = sum(index["count"]) / sum(group["n_tokens"])
        assert l0 == pytest.approx(told["best"]["l0"], rel=1e-5)
        assert index["count"].count(0) / group["n_latents"] == pytest.approx(
            told["best"]["dead_fraction"]
        )


def test_contexts_name_the_text_where_their_activation_is(made: tuple[Path, str]):
    run = run_of(made[0])
    facts, text, index = (data(run, name) for name in ("run", "text/0", "g0/index"))
    tokens, context = TokenStore.open(run / "tokens.zarr"), facts["context"]
    tokenizer = load_tokenizer(ModelSource(name=SMALL_RUN["model"]["name"]))
    n_seen = 0
    for j, latent in enumerate(data(run, "g0/0")):
        for place, layer, value, document, levels in latent["contexts"]:
            n_seen += 1
            assert layer in facts["groups"][0]["layers"]
            assert len(levels) == BEFORE + 1 + AFTER
            assert levels[BEFORE] == pytest.approx(1000 * value / index["max"][j], abs=1)
            row, position = divmod(place, context)
            sequence = np.array([text["sequences"][row]])
            assert tokens.documents("validation", sequence)[0, position] == document
            if j < 20:
                shown = text["ids"][row * context : (row + 1) * context]
                ids = tokens.ids("validation", sequence)[0]
                assert strings(text, shown[1:]) == tokenizer.decode(ids[1:])
        values = [value for _, _, value, _, _ in latent["contexts"]]
        assert values == sorted(values, reverse=True)
        assert values[:1] == ([index["max"][j]] if index["count"][j] else [])
    assert n_seen > 1000


def strings(text: dict[str, Any], ids: list[int]) -> str:
    return "".join(text["strings"][i] for i in ids)


@pytest.mark.crash
def test_what_is_there_is_left_and_what_another_autoencoder_made_is_made_again(
    made: tuple[Path, str], tmp_path: Path, finished: tuple[Path, str]
):
    shutil.copytree(made[0].parent / "runs", tmp_path / "runs")
    config = write_config(tmp_path)
    run = run_of(config)
    before = files_of(run / "dashboard")
    best = [g["best"]["trial"] for g in json.loads((run / "summary.json").read_text())["groups"]]
    others = [t.name for t in (run / "trials").iterdir() if t.name not in best and "g1" in t.name]
    shutil.copy(
        run / "trials" / others[0] / "sae" / "sae.safetensors", run / "trials" / best[1] / "sae"
    )
    (run / "dashboard" / "data" / "g1" / "9.js").write_text("left over")
    stamps = {
        file: file.stat().st_mtime_ns for file in (run / "dashboard" / "data" / "g0").iterdir()
    }
    status, output = strata("dashboard", config)
    assert status == 0, output
    assert "dashboard 1 of 2 groups are there already" in output
    after = files_of(run / "dashboard")
    assert set(after) == set(before)
    changed = {name.split("/")[1] for name in after if after[name] != before[name]}
    assert changed == {"g1"}
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_a_browser_finds_latents_by_the_text_of_their_contexts_and_shows_it(
    made: tuple[Path, str], tmp_path: Path
):
    run = run_of(made[0])
    text, facts = data(run, "text/0"), data(run, "run")
    places = np.array(data(run, "g0/contexts")).reshape(facts["groups"][0]["n_latents"], -1)
    context, wanted = facts["context"], "return"
    holding = []
    for j, row in enumerate(places.tolist()):
        windows = [
            (
                max(p - BEFORE, p // context * context),
                min(p + AFTER + 1, (p // context + 1) * context),
            )
            for p in row
            if p >= 0
        ]
        if any(wanted in strings(text, text["ids"][a:b]).lower() for a, b in windows):
            holding.append(j)
    with chromium(tmp_path) as driver:
        driver.get((run / "dashboard" / "index.html").as_uri())
        wait_for(lambda: driver.execute_script("return document.body.dataset.ready"), "the list")
        driver.find_element("id", "query").send_keys(wanted)
        driver.execute_script("document.getElementById('where').value = 'contexts'")
        script = "const f = arguments[0]; strata.updateList().then(() => f(strata.list.order))"
        assert sorted(driver.execute_async_script(script)) == holding
        assert 0 < len(holding) < len(places)
        # In one step: the list may be drawn anew between finding a line and clicking it.
        driver.execute_script("document.querySelector('#rows a').click()")
        texts = "[...document.querySelectorAll('ol.contexts .text')].map(e => e.textContent)"
        shown = wait_for(
            lambda: driver.execute_script(f"return {texts}"),
            "the contexts",
        )
        assert any(wanted in line.lower() for line in shown)


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["dashboard", str(write_config(tmp_path))]) == 2
    message = capsys.readouterr().err
    assert "holds no finished run; finish it with `strata run" in message


def test_another_tokenizer_is_refused(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    shutil.copytree(SMALL_RUN["model"]["name"], model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = not tokenizer["added_tokens"][0]["lstrip"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["dashboard", str(made[0]), "--set", f"model.name={model}"]) == 2
    message = capsys.readouterr().err
    assert "were made by another tokenizer" in message
    assert "restore the tokenizer" in message


def test_stores_that_are_gone_are_named(
    made: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, run = write_config(tmp_path), tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    for name in ("summary.json", "config.yaml"):
        shutil.copy(run_of(made[0]) / name, run / name)
    assert main(["dashboard", str(config)]) == 2
    assert "tokens.zarr" in capsys.readouterr().err
