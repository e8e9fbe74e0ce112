"""The dashboard's pages in Chromium: a planted example, in which every text is hostile."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from actors.latent_contexts import AFTER, BEFORE, LatentReport
from actors.token_text import TokenText
from actors.unembedding import DecodedTokens
from benchmarks.chromium import CHROMIUM, DRIVER, chromium, resized, wait_for
from orchestrator.pages import dashboard as pages
from sae.dictionary import nearest_rows
from sae.latent_statistics import LatentStatistics
from sae.top_activations import TopActivations
from tests.test_sae_latent_statistics import sparse

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

HOSTILE = {
    "a": "a",
    "</script><script>window.harmed=1</script>": "</script><script>window.harmed=1</script>",
    "<img src=x onerror='window.harmed=1'>": "<img src=x onerror='window.harmed=1'>",
    "');alert(1);(\"": "');alert(1);(\"",
    "two\nlines\r\n": "two↵lines␍↵",
    "nul\x00l": "nul␀l",
    "\u202eturned": "\\u202eturned",
    "\u05e9\u05dc\u05d5\u05dd": "\u05e9\u05dc\u05d5\u05dd",
    "\u2028": "\\u2028",
    "&lt;b&gt;${1}": "&lt;b&gt;${1}",
    "__proto__": "__proto__",
    "\U0001f600": "\U0001f600",
}
"""Tokens, and how the page shows them."""

CONTEXT, N_SEQUENCES, D_SAE, LAYERS = 40, 3, 300, (4, 9)
N_PLACES, LINES = CONTEXT * N_SEQUENCES, 4


def token_ids() -> np.ndarray:
    """Each token at the start; elsewhere any but LINES, which comes again as the last of all."""
    others = [i for i in range(len(HOSTILE)) if i != LINES]
    ids = np.random.default_rng(0).choice(others, (N_SEQUENCES, CONTEXT))
    ids[0, : len(HOSTILE)] = np.arange(len(HOSTILE))
    ids[-1, -1] = LINES
    return ids


def texts() -> TokenText:
    vocabulary = {token: i for i, token in enumerate(HOSTILE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    return TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def planted() -> LatentReport:
    """Latent j is strongest on the token of place j % N_PLACES, at layer 9; latent 299 never fires."""
    statistics = LatentStatistics(D_SAE, LAYERS)
    top = TopActivations(D_SAE, 4, CONTEXT, BEFORE, AFTER)
    places = torch.arange(N_PLACES)
    for layer, strength in zip(LAYERS, (1.0, 3.0), strict=True):
        x = torch.zeros(len(places), D_SAE)
        x[torch.arange(D_SAE - 1) % len(places), torch.arange(D_SAE - 1)] = strength
        x[5, 0] = strength / 4
        statistics.update(sparse(x), layer)
        top.update(sparse(x), places, layer)
    ids = torch.arange(D_SAE)[:, None] % len(HOSTILE)
    rows = torch.eye(D_SAE) + torch.rand(1, D_SAE)
    return LatentReport(
        statistics=statistics,
        top=top,
        nearest=nearest_rows(rows, 3),
        decoded=DecodedTokens(torch.ones(D_SAE, 1) * 2.5, ids),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("dashboard"), planted())


def written(folder: Path, report: LatentReport) -> Path:
    """A dashboard of one group."""
    text, ids = texts(), token_ids()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "BLOCK_TOKENS", 2 * CONTEXT)  # two blocks
        for block, span in enumerate((slice(0, 2), slice(2, 3))):
            pages.write_text(folder, block, np.array([4, 7, 8])[span], ids[span], text)
        entry = pages.write_group(folder, 3, report, ids, ids.astype(np.uint32) + 100, text)
        sizes = {"context": CONTEXT, "n_sequences": N_SEQUENCES, "block": 2}
        no = None if report.decoded else "An encoder <i>decodes</i> nothing"
        about = {
            "name": "<b>demo</b>",
            "model": "</title><script>window.harmed=1</script>",
            "n_tokens": N_PLACES,
            "decoded": "By <i>logit lens</i>" if report.decoded else None,
            "not_decoded": no,
        }
        pages.write_pages(folder, {**sizes, "not_decoded": no, "groups": [entry]}, about)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, folder: Path) -> Any:
    return opened(browser, folder)


def opened(browser: Any, folder: Path, at: str = "") -> Any:
    resized(browser, 1280, 1000)
    browser.get("about:blank")
    browser.get((folder / "index.html").as_uri() + at)
    wait_for(lambda: browser.execute_script("return document.body.dataset.ready"), "the page")
    return browser


def texts_of(page: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return page.execute_script(script, selector)


def searched(page: Any, query: str, where: str = "all") -> list[int]:
    """The latents that the page finds."""
    script = """
    const done = arguments[arguments.length - 1];
    document.getElementById("query").value = arguments[0];
    document.getElementById("where").value = arguments[1];
    strata.updateList().then(() => done(strata.list.order));
    """
    return sorted(page.execute_async_script(script, query, where))


def open_latent(page: Any, latent: int) -> None:
    page.execute_script("location.hash = arguments[0]", f"#g3/{latent}")
    wait_for(
        lambda: page.execute_script("return document.body.dataset.ready") == f"latent {latent}",
        f"latent {latent}",
    )


def test_hostile_text_is_shown_and_does_nothing(page: Any):
    for latent in range(len(HOSTILE)):
        open_latent(page, latent)
        marked = texts_of(page, "mark.token")
        shown = f" {list(HOSTILE.values())[latent]}"
        assert marked[0] == shown
        assert texts_of(page, "#latent section:nth-of-type(3) .chip") == [shown]
        assert texts_of(page, "ol.contexts li .soft")[0] == (
            f"3.00 at layer 9; document {100 + latent}, sequence 4, position {latent}"
        )
    assert page.execute_script("return window.harmed") is None
    assert texts_of(page, "h1") == ["Latents of <b>demo</b>"]
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_nothing_is_loaded_but_the_files_beside_the_page(page: Any, folder: Path):
    page.get_log("performance")  # what came before
    opened(page, folder, "#g3/17")
    asked = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    asked = {url for url in asked if not url.startswith(("about:", "data:"))}
    assert (folder / "data/g3/0.js").as_uri() in asked
    assert all(url.startswith(folder.as_uri()) for url in asked)


def test_a_latent_has_its_figures_layers_and_contexts(page: Any):
    open_latent(page, 0)
    assert texts_of(page, ".card b") == ["1.67 %", "4", "1.25", "3.00", "1.75"]
    rows = texts_of(page, "#latent section:nth-of-type(2) tbody tr")
    assert rows == ["425 %1.67 %", "975 %1.67 %"]
    assert len(texts_of(page, "#latent svg rect")) == 32
    assert sum(bins_of(page)) == 4
    assert len(texts_of(page, "ol.contexts li")) == 2  # a token counts once, at its strongest layer
    first, second = page.execute_script(
        """return [...document.querySelectorAll("ol.contexts .text")].map(
             (text) => [...text.children].map((token) => [token.localName, token.title]))"""
    )
    assert first[0] == ["mark", "3.00"]
    assert first[5] == ["bdi", "0.750"]
    assert [name for name, _ in second].index("mark") == 5
    assert len(first) == 1 + AFTER
    assert len(second) == 5 + 1 + AFTER


def bins_of(page: Any) -> list[int]:
    return [int(t.rsplit(": ")[1]) for t in texts_of(page, "#latent svg rect title")]


def test_search_finds_by_number_decoded_token_and_context(page: Any):
    assert searched(page, "17", "number") == [17]
    assert searched(page, "#17", "number") == [17]
    n = len(HOSTILE)
    assert searched(page, "PROTO", "decoded") == [j for j in range(D_SAE - 1) if j % n == 10]
    for query in ("two↵LINES", "SCRIPT> <IMG", "1)"):
        text = query.replace("↵", "\n").lower()
        wanted = [j for j in range(D_SAE - 1) if contains(j, text)]
        assert searched(page, query, "contexts") == wanted
    wanted = [j for j in range(D_SAE - 1) if contains(j, "two\nlines")]
    assert 0 < len(wanted) < D_SAE / 3
    either = {j for j in range(D_SAE) if j % n == LINES} | set(wanted)
    assert searched(page, "two↵LINES") == sorted(either)
    assert searched(page, "no such text") == []
    assert len(searched(page, "")) == D_SAE - 1


def contains(latent: int, wanted: str) -> bool:
    """Whether a context of the latent holds a text in lower case."""
    tokens = [f" {list(HOSTILE)[i]}".lower() for i in token_ids().ravel()]
    places = {latent % N_PLACES} | ({5} if latent == 0 else set())
    for place in places:
        start = place // CONTEXT * CONTEXT
        low, high = max(start, place - BEFORE), min(start + CONTEXT, place + AFTER + 1)
        if wanted in "".join(tokens[low:high]):
            return True
    return False


def test_the_list_is_sorted_filtered_and_paged(page: Any):
    def order() -> list[int]:
        return [int(text) for text in texts_of(page, "#rows td:first-child")]

    assert order()[:2] == [0, 1]  # the most frequent, then by number
    assert len(order()) == 50
    page.execute_script("document.getElementById('after').click()")
    wait_for(lambda: order()[0] == 50, "the second page")
    assert texts_of(page, "#pages") == ["6"]
    page.execute_script(
        """document.getElementById('alive').checked = false;
        const sort = document.getElementById('sort');
        sort.value = 'number';
        sort.dispatchEvent(new Event('change'));"""
    )
    wait_for(lambda: order()[0] == 0, "the first page")
    page.execute_script("document.getElementById('direction').click()")
    wait_for(lambda: order()[0] == 299, "the last latent")
    assert "300 of 300 latents; 1 never fire here." in texts_of(page, "#found")
    open_latent(page, 299)
    assert "It never fires here." in texts_of(page, "#latent")[0]


def test_the_keyboard_is_enough(page: Any):
    from selenium.webdriver.common.keys import Keys

    def pressed(*keys: str) -> None:
        page.switch_to.active_element.send_keys(*keys)

    def at(hash_: str) -> None:
        wait_for(lambda: page.execute_script("return location.hash") == hash_, hash_)

    pressed("/")
    assert page.switch_to.active_element.get_attribute("id") == "query"
    pressed("29", Keys.ENTER)
    at("#g3/29")
    pressed(Keys.ESCAPE)
    at("#g3")
    searched(page, "")
    page.execute_script("location.hash = '#g3/1'")
    wait_for(lambda: page.execute_script("return !!document.getElementById('next')"), "the link")
    page.find_element("css selector", "body").send_keys(Keys.ARROW_RIGHT)
    at("#g3/2")


@pytest.mark.parametrize("at", ["#g3", "#g3/1"])
def test_nothing_overflows_on_a_phone(page: Any, folder: Path, at: str):
    opened(page, folder, at)
    resized(page, 390, 844)
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width == page.execute_script("return innerWidth") == 390


def test_an_encoders_latents_have_no_decoded_tokens_and_the_page_says_so(
    browser: Any, tmp_path: Path
):
    page = opened(browser, written(tmp_path, replace(planted(), decoded=None)))
    assert "decoded tokens" not in texts_of(page, "thead")[0]
    assert "An encoder <i>decodes</i> nothing" in texts_of(page, "dl")[0]
    assert searched(page, "proto", "all") == searched(page, "proto", "contexts") != []
    open_latent(page, 3)
    assert texts_of(page, "#latent section:nth-of-type(3) p") == [
        "An encoder <i>decodes</i> nothing"
    ]
    assert len(texts_of(page, "#latent section:nth-of-type(4) tbody tr")) == 3


def test_a_missing_data_file_is_named(browser: Any, folder: Path, tmp_path: Path):
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "1.js":
            target = tmp_path / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    page = opened(browser, tmp_path)
    page.execute_script("location.hash = '#g3/280'")
    wait_for(lambda: texts_of(page, "[role=alert]"), "the message")
    assert "data/g3/1.js is missing or damaged" in texts_of(page, "[role=alert]")[0]
