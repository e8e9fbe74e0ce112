"""The pages of the dashboard: files that a browser opens from a disk, without a server.

Data files are scripts that hand one JSON value to the page, as a page on a disk may not fetch. The
JSON is ASCII, so no text of a model can end a script or depend on an encoding.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

from actors.latent_contexts import AFTER, BEFORE, LatentReport
from actors.token_text import TokenText
from orchestrator.run_directory import write_atomically

TEMPLATES = Path(__file__).parent / "templates" / "dashboard"
SCRIPTS = ("data.js", "search.js", "list.js", "latent.js", "main.js")
SHARD_LATENTS = 256
"""Latents whose details are in one file."""

BLOCK_TOKENS = 2**17
"""Tokens of the text in one file, or one sequence."""


def write_pages(folder: Path, run: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the page itself, last of all, and what it has to know of the run.

    Args:
        folder: Of the dashboard.
        run: For the page's scripts: `groups`, as `write_group` returns them; `context`, `n_sequences` and
            `block`, the sizes of the text; `not_decoded`.
        about: For the page's text: `name`, `model`, `n_tokens`, and either `decoded`, the convention of
            decoded tokens, or `not_decoded`, why there are none.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    for name in ("dashboard.css", *SCRIPTS):
        write_atomically(folder / name, (TEMPLATES / name).read_text(encoding="utf-8"))
    _put(folder, "run", {**run, "before": BEFORE, "after": AFTER})
    page = environment.get_template("index.html.j2").render(scripts=SCRIPTS, **about)
    write_atomically(folder / "index.html", page)


def block_sequences(context: int) -> int:
    """Sequences of the text in one file."""
    return max(1, BLOCK_TOKENS // context)


def write_text(
    folder: Path,
    block: int,
    sequences: np.ndarray,
    ids: np.ndarray,
    text: TokenText,
) -> None:
    """Write a block of the text that contexts are shown from.

    Args:
        folder: Of the dashboard.
        block: Its number; all but the last have `block_sequences`.
        sequences: (n,); the number of each in its split.
        ids: (n, context); their tokens.
        text: Of the tokenizer.
    """
    strings, places = _table(ids, text)
    content = {"sequences": sequences.tolist(), "strings": strings, "ids": places.ravel().tolist()}
    _put(folder, f"text/{block}", content)


def write_group(
    folder: Path,
    group: int,
    report: LatentReport,
    ids: np.ndarray,
    documents: np.ndarray,
    text: TokenText,
) -> dict[str, Any]:
    """Write all latents of a group's autoencoder.

    Args:
        folder: Of the dashboard.
        group: Its number.
        report: Of its best autoencoder.
        ids: (sequences, context); of the sequences of the validation store.
        documents: (sequences, context); the document that each of these tokens is from.
        text: Of the tokenizer.

    Returns:
        What `write_pages` takes of the group.
    """
    for number, shard in enumerate(_shards(report, documents.ravel())):
        _put(folder, f"g{group}/{number}", shard)
    _put(folder, f"g{group}/contexts", report.top.places.ravel().tolist())
    _put(folder, f"g{group}/index", _index(report, ids.ravel(), text))
    return {
        "id": group,
        "layers": list(report.statistics.layers),
        "n_tokens": report.statistics.n_tokens.tolist(),
        "n_latents": len(report.statistics.maxima),
        "n_contexts": report.top.values.shape[1],
        "n_decoded": 0 if report.decoded is None else report.decoded.ids.shape[1],
        "shard": SHARD_LATENTS,
    }


def _index(report: LatentReport, ids: np.ndarray, text: TokenText) -> dict[str, Any]:
    """What the list shows and searches of all latents, column by column."""
    found = report.statistics
    strongest = report.top.places[:, 0].numpy()
    fires = np.where(strongest >= 0, ids[np.maximum(strongest, 0)], -1)
    decoded = np.empty((len(fires), 0), np.int64)
    if report.decoded is not None:
        decoded = report.decoded.ids.numpy()
    strings, places = _table(np.concatenate([fires[:, None], decoded], axis=1), text)
    return {
        "strings": strings,
        "fires": places[:, 0].tolist(),
        "decoded": places[:, 1:].ravel().tolist() if report.decoded is not None else None,
        "count": found.counts.sum(0).tolist(),
        "max": _rounded(found.maxima),
        "mean": _rounded(found.means),
        "spread": _rounded(found.layer_spread),
        "shares": (found.layer_shares.T * 100).round().int().ravel().tolist(),
    }


def _shards(report: LatentReport, documents: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """The details of all latents, some hundred at a time."""
    found, top = report.statistics, report.top
    rates, edges = found.firing_rates.T, found.upper_edges
    for start in range(0, len(found.maxima), SHARD_LATENTS):
        span = slice(start, start + SHARD_LATENTS)
        largest = found.maxima[span, None, None]
        levels = (top.windows[span] / largest * 1000).round().nan_to_num(nan=-1).int()
        columns = {
            "bins": found.histogram[span].tolist(),
            "top": _rounded(edges[span]),
            "rates": _rounded(rates[span]),
            "cosines": _rounded(report.nearest[0][span]),
            "nearest": report.nearest[1][span].tolist(),
            "contexts": _contexts(
                top.places[span], top.layers[span], top.values[span], levels, documents
            ),
        }
        if report.decoded is not None:
            columns["logits"] = _rounded(report.decoded.logits[span])
        yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _contexts(
    places: Tensor,
    layers: Tensor,
    values: Tensor,
    levels: Tensor,
    documents: np.ndarray,
) -> list[list[tuple[Any, ...]]]:
    """Of each latent its contexts, as `latent.js` reads them; empty slots are left out."""
    origin = documents[places.clamp(min=0).numpy()].tolist()
    columns = (places.tolist(), layers.tolist(), _rounded(values), origin, levels.tolist())
    return [
        [slot for slot in zip(*latent, strict=True) if slot[0] >= 0]
        for latent in zip(*columns, strict=True)
    ]


def _table(ids: np.ndarray, text: TokenText) -> tuple[list[str], np.ndarray]:
    """The text of the ids that occur, and for each id its place there; -1 stays -1."""
    known = np.unique(ids[ids >= 0])
    return text.of(known.tolist()), np.where(ids >= 0, np.searchsorted(known, ids), -1)


def _rounded(values: Tensor | np.ndarray) -> list[Any]:
    """Values to four significant digits: enough to look at, short to write."""
    x = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        digits = 3 - np.floor(np.log10(np.abs(x)))
    factor = 10.0 ** np.where(np.isfinite(digits), digits, 0)
    return (np.round(x * factor) / factor).tolist()


def _put(folder: Path, name: str, value: Mapping[str, Any] | Sequence[Any]) -> None:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    write_atomically(folder / "data" / f"{name}.js", f'strata.put("{name}",{text});\n')
