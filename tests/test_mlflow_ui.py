"""`strata ui`, seen by a browser: the run, a trial's charts, a figure; nothing from elsewhere."""

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import psutil
import pytest
from mlflow import MlflowClient

from tests.browser import chromium, needs_chromium
from tests.runs import start

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_chromium]

PATIENCE = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pages(finished: tuple[Path, str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of `strata ui` on the finished run's store, and its process."""
    port = free_port()
    server = start("ui", finished[0], "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    process = psutil.Process(server.pid)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert server.poll() is None, server.communicate()[0]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except (URLError, OSError):
                assert time.monotonic() < deadline, "strata ui did not come up"
                time.sleep(0.2)
        yield address, process
    finally:
        for each in (*process.children(recursive=True), process):
            each.kill()
        server.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def wait_for(look: Callable[[], Any], what: str) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not appear"
        time.sleep(0.2)
    return found


def test_the_pages_show_the_run_a_trials_charts_and_a_figure_and_load_nothing_from_elsewhere(
    finished: tuple[Path, str], pages: tuple[str, psutil.Process], browser: Any
):
    address, server = pages
    runs = finished[0].parent / "runs"
    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    identity = json.loads((runs / "small" / "summary.json").read_text())["mlflow"]
    parent = client.get_run(identity["parent_run_id"])
    experiment = parent.info.experiment_id
    trial = client.search_runs([experiment], "tags.kind = 'trial'", max_results=1)[0]

    def elements(selector: str) -> list[Any]:
        return browser.find_elements("css selector", selector)

    def has_text(text: str) -> bool:
        return text in browser.execute_script("return document.body.innerText")

    browser.get(f"{address}/#/experiments/{experiment}/runs")
    wait_for(lambda: elements(f"a[href*='{parent.info.run_id}']"), "the parent run")
    assert has_text("small")

    browser.get(f"{address}/#/experiments/{experiment}/runs/{trial.info.run_id}/model-metrics")
    wait_for(lambda: elements(".js-plotly-plot .scatterlayer .trace path"), "a curve")
    assert has_text(str(trial.info.run_name))
    assert has_text("data_wait_fraction")

    figure = "figures/distances.png"
    browser.get(
        f"{address}/#/experiments/{experiment}/runs/{parent.info.run_id}/artifacts/{figure}"
    )
    drawn = (
        "return [...document.images].some(i => i.src.startsWith('blob:') && i.naturalWidth > 300)"
    )
    wait_for(lambda: browser.execute_script(drawn), "the figure")

    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(urlsplit(message["params"]["request"]["url"]))
    assert any(url.path.startswith("/static-files/") for url in asked)
    own = urlsplit(address).netloc
    assert {url.netloc for url in asked if url.scheme in ("http", "https", "ws", "wss")} == {own}

    listening = [
        connection.laddr.ip
        for process in (server, *server.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}
