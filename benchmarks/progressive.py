"""Do the findings on progressive coding hold on the embedded model: `make bench-progressive`.

The demo's own run, but for its encoders: all dense, each both plain and Matryoshka. Compared are the
means over the layers of a group; of every comparison the worst of all groups and k is shown. `ratio`
above 1 is for the finding. Seeds are fixed: the same machine and torch give the same figures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from actors.progressive_coder import ProgressiveCoder
from benchmarks.rows import Row, show, write
from benchmarks.sweep_runs import Sweep
from benchmarks.worker import ROOT
from orchestrator import config_file
from orchestrator.pages.figures.progressive import mean_curves
from orchestrator.run_directory import RunDirectory
from orchestrator.stages.group import load_groups

D_SAE = 1024
PREFIXES = (32, 64, 128, 256, 512, D_SAE)
CORES = 2
NAMES = {
    "energy": "pruned by E[act^2]",
    "random": "pruned at random",
    "nested": "of a Matryoshka",
}
SMALL = {
    "harvest": {"tokens": 60_000, "pilot_tokens": 6_000, "validation_tokens": 3_000},
    "group": {"n_groups": 1},
    "train": {"batch_tokens": 512},
}

Reports = Sequence[Mapping[str, Any]]
"""Of one autoencoder, a `ProgressiveReport` for each layer."""


@dataclass(frozen=True)
class Contest:
    """Two autoencoders of one group and k, which differ in their prefixes alone."""

    name: str
    plain: Reports
    matryoshka: Reports

    def losses(self, by: str, size: int) -> dict[str, float]:
        """What is lost at a size, mean over the layers; lower is better.

        Args:
            by: `nested` of the Matryoshka autoencoder, else an order that the plain one is pruned in.
            size: Latents left.
        """
        reports = self.matryoshka if by == "nested" else self.plain
        [point] = [point for point in mean_curves(reports)[by] if point["size"] == size]
        return {
            "FVU": point["fvu"],
            "CE lost": point["ce"] - reports[0]["ce_clean"],
            "1 - RSA": 1 - point["rsa"],
        }


def trained(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Sweep:
    """The demo's sweep with plain and Matryoshka autoencoders in it."""
    sweep = {"encoders": ["dense"], "vary": {"prefixes": [[], list(PREFIXES)]}}
    sections = {**changes, "sweep": {**sweep, **changes.get("sweep", {})}}
    run = Sweep.of(folder, {**sections, "compute": {"cpus": CORES}})
    run.do("sweep")
    return run


def read(run_dir: Path, result: Mapping[str, Any], n_sequences: int) -> list[dict[str, Any]]:
    """A trial at all sizes on each layer of its group."""
    cfg = config_file.load(run_dir)
    run = RunDirectory.of(cfg)
    coder = ProgressiveCoder(
        *(cfg.model, run.tokens, run.pilot, run.validation, load_groups(run).row_filter),
        *(n_sequences, cfg.harvest.batch_tokens),
    )
    layers, folder = tuple(result["layers"]), run.trials / result["trial"] / "sae"
    reports = [asdict(coder.read(folder, layers, layer)) for layer in layers]
    print(f"  {result['trial']} read", flush=True)
    return reports


def contests(results: Sequence[Mapping[str, Any]], reports: Sequence[Reports]) -> list[Contest]:
    """The trials of every group and k against each other."""

    def key(pair: tuple[Mapping[str, Any], Reports]) -> tuple[int, int, bool]:
        return pair[0]["group"], pair[0]["k"], bool(pair[0]["prefixes"])

    found = []
    both = sorted(zip(results, reports, strict=True), key=key)
    for (group, k), members in groupby(both, key=lambda pair: key(pair)[:2]):
        (_, plain), (_, matryoshka) = members
        found.append(Contest(f"group {group}, k {k}", plain, matryoshka))
    return found


def rows(found: Sequence[Contest]) -> list[Row]:
    """A row for each finding, measure and size."""
    made = [
        _worst(found, measure, size, *sides, demanded=measure != "1 - RSA")
        for sides in (("energy", "random"), ("nested", "energy"))
        for measure in ("FVU", "CE lost", "1 - RSA")
        for size in PREFIXES[:-1]
    ]
    price = _worst(found, "FVU", D_SAE, "nested", "energy", demanded=False)
    return [*made, price, *_laws(found)]


def _worst(
    found: Sequence[Contest], measure: str, size: int, ours: str, theirs: str, *, demanded: bool
) -> Row:
    """The contest in which the finding is furthest from holding."""

    def losses(contest: Contest) -> list[float]:
        return [contest.losses(by, size)[measure] for by in (ours, theirs)]

    def ratio(contest: Contest) -> float:
        mine, other = losses(contest)
        return other / mine

    worst = min(found, key=ratio)
    return Row(
        name=f"{measure}, {size} latents {NAMES[ours]} ({worst.name})",
        against=NAMES[theirs],
        ratio=ratio(worst),
        at_least=1.0 if demanded else None,
        aim=None,
        values=losses(worst),
        versions={"torch": version("torch")},
        unit="nat" if measure == "CE lost" else "",
    )


def _laws(found: Sequence[Contest]) -> Iterator[Row]:
    """r^2 of the power laws of the plain autoencoders, against an exponential's; stated."""
    for kind in ("energy", "frequency", "spectrum"):
        laws = {c.name: c.plain[0]["power_laws"][kind] for c in found}
        name = min(laws, key=lambda name: laws[name]["r_squared"])
        r_squared = [laws[name][key] for key in ("r_squared", "exponential_r_squared")]
        yield Row(
            name=f"r^2 of a power law of rank: {kind} ({name})",
            against="r^2 of an exponential",
            ratio=r_squared[0] / r_squared[1],
            at_least=None,
            aim=None,
            values=r_squared,
            versions={"torch": version("torch")},
            unit="",
        )


def main() -> int:
    """Train, read, print, write; 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="that each autoencoder is trained on")
    parser.add_argument("--sequences", type=int, default=16, help="that cross-entropy is over")
    parser.add_argument(
        "--small", action="store_true", help="a size of no meaning, to see that this works"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/progressive.json")
    options = parser.parse_args()
    changes: dict[str, dict[str, Any]] = {**SMALL} if options.small else {}
    changes["sweep"] = {"tokens": 60_000, "k": [8]} if options.small else {}
    if options.tokens:
        changes["sweep"]["tokens"] = options.tokens
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder) / "run", changes)
        results = run.results
        workers = ProcessPoolExecutor(CORES, get_context("spawn"), torch.set_num_threads, (1,))
        with workers:
            jobs = [
                workers.submit(read, run.run_dir, result, options.sequences) for result in results
            ]
            found = contests(results, [job.result() for job in jobs])
    made = rows(found)
    show(made)
    write(
        options.out,
        made,
        full_size=not options.small,
        sequences=options.sequences,
        contests=[
            {
                "name": contest.name,
                "plain": mean_curves(contest.plain),
                "matryoshka": mean_curves(contest.matryoshka),
                "power_laws": _without_curve(contest.plain[0]["power_laws"]),
            }
            for contest in found
        ],
    )
    return 0 if all(row.passes for row in made) else 1


def _without_curve(laws: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        kind: {key: value for key, value in law.items() if key not in ("ranks", "values")}
        for kind, law in laws.items()
    }


if __name__ == "__main__":
    sys.exit(main())
