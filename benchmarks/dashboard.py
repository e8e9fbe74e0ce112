"""The dashboard of a wide autoencoder in headless Chromium: `make bench-dashboard`.

A random autoencoder over the embedded model's validation store, described by `strata dashboard` itself. Measured
from the start of the page's navigation until its list is drawn, by the browser's own clock. `ratio` above 1
is better for ours.
"""

import argparse
import json
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.chromium import chromium, wait_for
from benchmarks.rows import Row, show, write
from benchmarks.sweep_runs import Sweep
from benchmarks.worker import ROOT
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory, write_json
from orchestrator.stages.group import load_groups
from sae import KronShape, SaeConfig, SparseAutoencoder, checkpoint

ASKED_SECONDS = 2.0
STORES = {"harvest": {"tokens": 60_000, "pilot_tokens": 6_000}, "group": {"n_groups": 1}}

# Notes when the page says that it is drawn, two frames later, when it can be seen.
_CLOCK = """
new MutationObserver(() => {
  const ready = document.body?.dataset.ready;
  if (ready && ready !== window.ready_) {
    window.ready_ = ready;
    requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn_ = performance.now(); }));
  }
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


def main() -> int:
    """Make the dashboard, measure, print, write; 1 if the page takes longer than is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-sae", type=int, default=65_536, help="a multiple of 8")
    parser.add_argument("--loads", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/dashboard.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page, seconds = described(Path(folder), options.d_sae)
        sizes = {file.name: file.stat().st_size for file in page.parent.glob("data/g0/*.js")}
        rows = measure(page, Path(folder) / "profile", options.d_sae, options.loads)
    show(rows)
    about = {
        "d_sae": options.d_sae,
        "loads": options.loads,
        "making_seconds": round(seconds, 1),
        "index_bytes": sizes["index.js"],
        "group_bytes": sum(sizes.values()),
    }
    write(options.out, rows, **about)
    return 0 if all(row.passes for row in rows) else 1


def described(folder: Path, d_sae: int) -> tuple[Path, float]:
    """The page of a run whose one autoencoder is random, and the seconds that `strata dashboard` took."""
    sweep = Sweep.of(folder / "wide", STORES)
    sweep.do("harvest")
    run = RunDirectory.of(config_file.load(sweep.config))
    groups = load_groups(run)
    [layers] = groups.partition
    norms = groups.report.mean_norm
    shape = KronShape(h=d_sae // 8, m=2, n=4)
    cfg = SaeConfig(d_model=128, d_sae=d_sae, k=32, encoder=shape)
    scale = {layer: cfg.d_model**0.5 / norms[layer] for layer in layers}
    checkpoint.save(run.trials / "random" / "sae", SparseAutoencoder(cfg, scale))
    group = {"id": 0, "layers": list(layers), "best": {"trial": "random"}}
    write_json(run.summary, {"groups": [group]})
    return run.dashboard / "index.html", sweep.do("dashboard")


def measure(page: Path, profile: Path, d_sae: int, loads: int) -> list[Row]:
    """Rows of loading the list, searching it and opening a latent."""
    seconds: dict[str, list[float]] = {"list": [], "search": [], "latent": []}
    with chromium(profile) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _CLOCK})
        for _ in range(loads):
            driver.get("about:blank")
            driver.get(page.as_uri())
            wait_for(lambda: driver.execute_script("return window.drawn_"), "the list")
            seconds["list"].append(driver.execute_script("return window.drawn_") / 1000)
            for name, script in (("search", _SEARCH), ("latent", _OPEN)):
                seconds[name].append(_timed(driver, script))
        versions = {"chromium": driver.capabilities["browserVersion"]}
    versions["selenium"] = version("selenium")
    names = {
        "list": (f"list of {d_sae:,} latents, from nothing", 1.0),
        "search": ("first search in all contexts", None),
        "latent": ("a latent opened", None),
    }
    return [
        Row(
            name=name,
            against=f"{ASKED_SECONDS:g} s that are asked",
            ratio=ASKED_SECONDS / statistics.median(seconds[key]),
            at_least=at_least,
            aim=None,
            values=[statistics.median(seconds[key]), ASKED_SECONDS],
            versions=versions,
        )
        for key, (name, at_least) in names.items()
    ]


_SEARCH = """
document.getElementById("query").value = "return";
await strata.updateList();
if (strata.list.order.length === 0) throw new Error("nothing was found");
"""
_OPEN = """
const before = document.body.dataset.ready;
document.querySelector("#rows a").click();
while (document.body.dataset.ready === before) await new Promise(requestAnimationFrame);
"""


def _timed(driver: Any, script: str) -> float:
    """Seconds of a script that works in the page, by the page's clock."""
    whole = f"""
    const done = arguments[arguments.length - 1], start = performance.now();
    (async () => {{ {script} }})().then(
      () => requestAnimationFrame(() => done(JSON.stringify([performance.now() - start, ""]))),
      (error) => done(JSON.stringify([0, String(error)])));
    """
    milliseconds, fault = json.loads(driver.execute_async_script(whole))
    if fault:
        raise RuntimeError(f"the page failed: {fault}")
    return milliseconds / 1000


if __name__ == "__main__":
    sys.exit(main())
