"""Does it find what is there, and do the papers' claims hold: `make bench-quality`.

Seeds are fixed: the same machine and torch give the same figures. Tables are printed and written;
`claims` are what was demanded, each with its value and its bound.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.activations import PILOTS
from benchmarks.pilots import PilotTables
from benchmarks.synthetic import plain_table, toy_table
from benchmarks.worker import ROOT

BLOCKS = (2, 8)
ENCODER_KS = (16,)
PRODUCT_K = 8


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure and what it must be."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is within its bounds; one without bounds is stated, not demanded."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


def synthetic_claims(plain: list[dict[str, Any]], toys: list[dict[str, Any]]) -> list[Claim]:
    """Dictionaries are found; and the comparison that KronSAE makes, which is stated only."""
    claims = [
        Claim(
            name=f"MCC of {row['autoencoder']}, uncorrelated directions",
            value=row["mcc"],
            at_least=0.9 if row["autoencoder"] in ("TopK", "BatchTopK") else None,
        )
        for row in plain
    ]
    for block in BLOCKS:
        rows = {row["autoencoder"]: row for row in toys if row["block"] == block}
        for key in ("rv_matched", "rv_aligned", "correlations"):
            best = max(row[key] for name, row in rows.items() if name.startswith("Kron"))
            claims.append(
                Claim(
                    name=f"{key}, blocks of {block}: best Kron less TopK (KronSAE: above 0)",
                    value=best - rows["TopK"][key],
                )
            )
    return claims


def pilot_claims(
    selections: list[dict[str, Any]], products: list[dict[str, Any]], encoders: list[dict[str, Any]]
) -> list[Claim]:
    """BatchTopK against TopK, its threshold, mAND, and the price of Kronecker encoders."""
    claims = []
    for row in selections:
        label = f"{row['pilot']}, {row['scaling']}, k {row['k']}"
        demanded = row["scaling"] == "token_standardize"
        claims.append(
            Claim(
                name=f"FVU, BatchTopK / TopK: {label}",
                value=row["fvu_batch_topk"] / row["fvu_topk"],
                at_most=1.0 if demanded else None,
            )
        )
        claims += [
            Claim(
                name=f"{figure}, threshold off batch selection by: {label}{where}",
                value=abs(
                    row[f"{prefix}{figure}_threshold"] / row[f"{prefix}{figure}_batch_topk"] - 1
                ),
                at_most=bound,
            )
            for prefix, where, bound in (("seen_", "", 0.02), ("", ", held out", None))
            for figure in ("l0", "fvu")
        ]
    claims += [
        Claim(
            name=f"FVU, mAND / product: {row['pilot']}, k {row['k']}",
            value=row["fvu_mand"] / row["fvu_relu_product"],
            at_most=1.0,
        )
        for row in products
    ]
    dense = {(r["pilot"], r["k"]): r["fvu"] for r in encoders if r["encoder"] == "dense"}
    claims += [
        Claim(
            name=f"FVU, {row['encoder']} / dense: {row['pilot']}, k {row['k']}",
            value=row["fvu"] / dense[row["pilot"], row["k"]],
        )
        for row in encoders
        if row["encoder"] != "dense"
    ]
    return claims


def pilot_tables(number: int, n_tokens: int, n_steps: int) -> dict[str, list[dict[str, Any]]]:
    """All tables of a pilot of `PILOTS`."""
    tables = PilotTables(PILOTS[number], n_tokens, n_steps)
    return {
        "selections": tables.selections(),
        "encoders": [row for k in ENCODER_KS for row in tables.encoders(k)],
        "products": [tables.activations(PRODUCT_K)],
    }


def plain_tables(n_steps: int) -> dict[str, list[dict[str, Any]]]:
    """The table of uncorrelated directions."""
    return {"synthetic_uncorrelated": plain_table(n_steps)}


def toy_tables(n_steps: int, block: int, n_seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The table of directions that correlate in blocks of `block`."""
    return {"synthetic_correlated": toy_table(n_steps, block, n_seeds)}


def main() -> int:
    """Run, print, write; 1 if a demanded claim fails."""
    parser = argparse.ArgumentParser(description="Quality of the SAE core.")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of every fit")
    parser.add_argument("--tokens", type=int, default=400_000, help="activations of a pilot")
    parser.add_argument("--seeds", type=int, default=2, help="of the correlated data")
    parser.add_argument("--only", choices=["synthetic", "pilots"])
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quality.json")
    options = parser.parse_args()
    jobs: list[tuple[Any, ...]] = []
    if options.only != "synthetic":
        for number, pilot in enumerate(PILOTS):
            if pilot.present:
                jobs.append((pilot_tables, number, options.tokens, options.steps))
            else:
                print(f"{pilot.name}: not here, left out", flush=True)
    if options.only != "pilots":
        jobs.append((plain_tables, options.steps))
        jobs += [(toy_tables, options.steps, block, options.seeds) for block in BLOCKS]
    tables: dict[str, list[dict[str, Any]]] = {}
    # One thread each, so that figures do not depend on the number of cores.
    workers = ProcessPoolExecutor(
        options.workers, get_context("spawn"), torch.set_num_threads, (1,)
    )
    with workers:
        for done in [workers.submit(*job) for job in jobs]:
            for name, rows in done.result().items():
                tables.setdefault(name, []).extend(rows)
    claims: list[Claim] = []
    if options.only != "pilots":
        claims += synthetic_claims(tables["synthetic_uncorrelated"], tables["synthetic_correlated"])
    if options.only != "synthetic":
        claims += pilot_claims(*(tables[name] for name in ("selections", "products", "encoders")))
    print()
    for claim in claims:
        bounds = [
            f"{word} {bound}"
            for word, bound in [("at least", claim.at_least), ("at most", claim.at_most)]
            if bound is not None
        ]
        verdict = "" if claim.holds else "  FAILS"
        print(f"{claim.name:76} {claim.value:8.4f}  {', '.join(bounds) or 'stated'}{verdict}")
    record = {
        "settings": {key: getattr(options, key) for key in ("steps", "tokens", "seeds")},
        "torch": torch.__version__,
        "claims": [asdict(claim) for claim in claims],
        "tables": tables,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
