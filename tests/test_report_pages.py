"""The report of a finished run, as a browser shows it on a desk and on a phone, without a network."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from orchestrator.pages.report import SECTIONS, rewrite_report
from orchestrator.run_directory import RunDirectory
from storage.places import place
from tests.browser import chromium, needs_chromium

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OVERFLOWING = """
return [...document.querySelectorAll('body *')].filter(element => {
  if (element.closest('.scroll, pre')) return element.matches('.scroll, pre')
    && element.getBoundingClientRect().right > innerWidth + 1;
  return element.getBoundingClientRect().right > innerWidth + 1;
}).map(element => element.outerHTML.slice(0, 80));
"""


def measures(fvu: float) -> dict[str, Any]:
    """Of one layer, as docs/evaluation.md has them; all but FVU are any numbers."""
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": 8.0,
        "cosine": 0.9,
        "norm_ratio": 0.9,
        "relative_bias": 0.98,
        "dead_fraction": 0.01,
        "dense_fraction": 0.02,
        "n_rows": 3000,
        "ce_clean": 3.0,
        "ce_sae": 3.1,
        "ce_zero": 9.0,
        "ce_mean": 8.0,
        "ce_recovered": 0.98,
        "ce_recovered_mean": 0.97,
        "kl": 0.1,
        "kl_zero": 5.0,
        "n_tokens": 2000,
    }


def cards(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of `cards.json`, with baselines, and a group that misses the tolerance."""
    found = []
    for group in groups:
        each = []
        for layer, fvu in group["best"]["fvu_per_layer"].items():
            own = {**measures(0.9 * fvu), "ev_lost": 0.1 * fvu, "ce_recovered_lost": 0.002}
            histogram = {"log10_edges": [-4.0, -2.0, 0.0], "n_latents": [200, 56]}
            each.append(
                {
                    "layer": int(layer),
                    "excess_fvu": 0.1 * fvu,
                    "baseline": own,
                    **measures(fvu),
                    "frequency_histogram": histogram,
                }
            )
        found.append(
            {
                "id": group["id"],
                "layers": group["layers"],
                "trial": group["best"]["trial"],
                "mean": measures(group["best"]["fvu"]),
                "worst_layer": each[-1]["layer"],
                "misses": True,
                "advice": f"Group {group['id']} is to be split.",
                "cards": each,
            }
        )
    bill = {"model_flops": 2e12, "harvest_seconds": 20.0, "training_seconds": 30.0}
    cost = {
        "n_groups": len(groups),
        "n_layers": sum(len(g["layers"]) for g in groups),
        "grouped": {**bill, "autoencoder_flops": 1e12, "total_flops": 3e12},
        "per_layer": {**bill, "autoencoder_flops": 3.5e12, "total_flops": 5.5e12},
        "pilot_flops": 2e11,
        "saved": 0.45,
        "saved_training": 0.71,
        "saved_published": 0.5,
        "saved_seconds": 0.1,
    }
    lost = {"ev_lost": 0.01, "ce_recovered_lost": 0.002, "worst_ev_lost": 0.02, "worst_layer": 1}
    return {
        "is_causal": True,
        "tolerance": 0.01,
        "reference": "baseline",
        "dense_threshold": 0.1,
        "groups": found,
        "against_baselines": lost,
        "cost": cost,
    }


def sizes(trial: str, layer: int) -> dict[str, Any]:
    """A file of `strata progressive`, as docs/progressive.md has it."""
    curve = [
        {"size": size, "fvu": 8 / size, "rsa": 0.9, "l0": 7.0, "ce": 3.5, "ce_recovered": 0.9}
        for size in (16, 64, 256)
    ]
    law = {"factor": 1.0, "exponent": 1.0, "r_squared": 0.99, "exponential_r_squared": 0.9}
    law |= {"first_rank": 1, "last_rank": 100}
    law |= {"ranks": [1, 10, 100], "values": [1.0, 0.1, 0.01]}
    return {
        "version": 1,
        "trial": trial,
        "layer": layer,
        "n_tokens": 510,
        "curves": dict.fromkeys(("energy", "frequency", "decoder", "random"), curve),
        "power_laws": {"energy": law, "frequency": law, "spectrum": None},
    }


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A copy of the finished run without its stores, with everything that a report can have."""
    there, here = finished[0].parent / "runs" / "small", tmp_path_factory.mktemp("report") / "small"
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("*.zarr", "report", "lock"))
    directory = RunDirectory(here, place(here))
    groups = json.loads(directory.summary.read_text())["groups"]
    (here / "cards.json").write_text(json.dumps(cards(groups)))
    for group in groups:
        for winner in group["winners"]:
            folder = here / "progressive" / winner["trial"]
            folder.mkdir(parents=True)
            for layer in group["layers"]:
                text = json.dumps(sizes(winner["trial"], layer))
                (folder / f"layer-{layer}.json").write_text(text)
    rewrite_report(directory)
    return directory


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_the_page_fits_shows_every_figure_and_asks_nobody(
    run: RunDirectory, browser: Any, width: int
):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(run.report.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(OVERFLOWING) == []

    links = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))"
    )
    assert links == list(SECTIONS)
    ids = browser.execute_script("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert ids == links
    shown = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.alt])")
    assert len(shown) >= 11  # and the load, of a run that took a minute
    assert all(pixels > 200 and alt for pixels, alt in shown)
    drawn = "return document.querySelectorAll('#%s .scatterlayer .trace path').length"
    for figure in ("pareto", "parallel"):
        assert browser.execute_script(drawn % figure) >= 4

    place = browser.execute_script(
        "const mark = document.querySelector('#parallel .points path');"
        "mark.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
        "const box = mark.getBoundingClientRect();"
        "return {x: box.x + box.width / 2, y: box.y + box.height / 2}"
    )
    for aside in (30, 0):
        pointer = {"type": "mouseMoved", "x": place["x"] + aside, "y": place["y"]}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", pointer)
    followed = "const data = document.getElementById('parallel').data; return data[data.length - 1].x.length"
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(browser, 60)
    wait.until(lambda _: browser.execute_script(followed) == 6, "no line follows the pointer")

    asked = [
        urlsplit(message["params"]["request"]["url"]).scheme
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert "file" in asked
    assert not set(asked) & {"http", "https", "ws", "wss"}
    assert browser.get_log("browser") == []


def test_the_page_is_one_file_under_ten_megabytes_with_one_script_for_all_figures(
    run: RunDirectory,
):
    text = run.report.read_text()
    assert len(text.encode()) < 10e6
    assert len(re.findall(r"\* plotly\.js v", text)) == 1
    assert text.count("Plotly.newPlot(") - _newplot_of_the_script() == 2
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=.?(http|//)", text)
    assert "Group 1 is to be split." in text.partition("<nav")[0], "advice stands at the top"


def _newplot_of_the_script() -> int:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().count("Plotly.newPlot(")


def test_a_section_without_its_files_is_left_out(run: RunDirectory, tmp_path: Path):
    here = tmp_path / "small"
    absent = ("cards.json", "progressive", "report", "environment.json", "system_metrics.jsonl")
    shutil.copytree(run.path, here, ignore=shutil.ignore_patterns(*absent))
    bare = RunDirectory(here, place(here))
    rewrite_report(bare)
    ids = re.findall(r'<section id="(\w+)">', bare.report.read_text())
    assert ids == [s for s in SECTIONS if s not in ("fidelity", "progressive", "cost")]


def test_the_page_says_what_the_run_ran_on(run: RunDirectory):
    calls = json.loads(run.environment.read_text())
    assert len(calls) == 1
    text = run.report.read_text()
    assert f"torch {calls[0]['packages']['torch']}" in text
    assert calls[0]["since"] in text
