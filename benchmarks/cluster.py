"""What more nodes bring to a harvest and a sweep: `make bench-cluster`.

Up to eight nodes of Ray on this machine, of one CPU each as far as Ray knows, and of a fraction of a core in
truth. GPU work is a sleep, so that orchestration is what is measured: Ray, the pool, commits of shards, Tune's
loop, its callbacks, and what is told to MLflow, all driven by one process. Sleeps are as short as eight nodes on two
cores allow: a shard of half a second and a report every 0.4 s, so the driver takes in 16 shards or 20 reports a second,
where shards and reports of a GPU take tens of seconds. Shorter ones would measure how two cores are shared.

A process' start is left out, as eight of them would start on two cores: clocks run from when all are there to the
last commit or result. `ratio` is the efficiency: the time of one node over that of n, by n (strong: the
same work) or not (weak: n times the work). `seconds` are those of n nodes, and those at an efficiency of 1.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from actors.language_model import describe
from actors.trial import Trial
from benchmarks.rows import Row, show, write
from benchmarks.sleeping import SleepingHarvester, SleepingTrial, met
from benchmarks.worker import ROOT
from orchestrator.config import RunConfig
from orchestrator.config_file import parse
from orchestrator.placement import Nodes, Placement
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory
from orchestrator.session import Session
from orchestrator.shared_storage import SharedStorage
from orchestrator.stages import sweep
from orchestrator.tracking.tracker import Tracker
from sae.config import SaeConfig
from sae.fit import FitConfig
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec

AT_LEAST = 0.95
SHARD_SECONDS, SHARDS = 0.5, 64
REPORT_SECONDS, TRIALS = 0.4, 16
"""Sleeps, and the work of a strong row; of weak ones an eighth for each node."""

Measure = Callable[[RunConfig, Nodes, int, int], float]
"""Seconds of a stage: of a run, on some nodes (and how many), for so much work."""


def main() -> int:
    """Measure, print, write; 1 if a row is below what is demanded."""
    parser = argparse.ArgumentParser(description="Scaling of the orchestration over nodes.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--only", choices=["harvest", "sweep"], help="by default both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cluster.json")
    given = parser.parse_args()
    stages: dict[str, tuple[Measure, int]] = {
        "harvest": (harvest_seconds, SHARDS),
        "sweep": (sweep_seconds, TRIALS),
    }
    rows: list[Row] = []
    with _cluster(max(given.nodes)) as address, tempfile.TemporaryDirectory() as folder:
        for stage in [given.only] if given.only else stages:
            seconds, work = stages[stage]
            rows += _rows(stage, _timed(stage, seconds, Path(folder), address), work, given.nodes)
    show(rows)
    about = {"shard_seconds": SHARD_SECONDS, "report_seconds": REPORT_SECONDS}
    write(given.out, rows, **about, shards=SHARDS, trials=TRIALS)
    return 0 if all(row.passes for row in rows) else 1


@contextmanager
def _cluster(n: int) -> Iterator[str]:
    """Its address; a head that computes nothing, and n nodes of one CPU."""
    size: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **size},
    )
    for _ in range(n):
        cluster.add_node(num_cpus=1, **size)
    cluster.connect()
    try:
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _timed(stage: str, seconds: Measure, folder: Path, address: str) -> Callable[[int, int], float]:
    """Seconds by number of nodes and work; what was measured once is not again."""

    @cache
    def measured(n: int, work: int) -> float:
        cfg = _configuration(folder / f"{stage}-{n}-{work}", address)
        nodes = Nodes(lambda text: print(text, flush=True))
        able = sorted(node for node, has in nodes.usable().items() if has.get("CPU"))
        nodes.left_out |= set(able[n:])
        took = seconds(cfg, nodes, n, work)
        print(f"  {stage}, {n} nodes, {work} to do: {took:.2f} s", flush=True)
        return took

    return measured


def _configuration(folder: Path, address: str) -> RunConfig:
    return parse(
        {
            "name": "cluster",
            "run_dir": str(folder / "run"),
            "model": {"name": str(ROOT / "examples/tiny_lm/model")},
            "corpus": {"source": "stdlib"},
            "harvest": {"tokens": 100_000},
            "sweep": {"d_sae": 64, "k": [8], "tokens": 6400},
            "compute": {"address": address, "wait_seconds": 120},
        },
        "the benchmark",
    )


def _store(run: RunDirectory, n_shards: int) -> ActivationStore:
    """A training store of one group and so many small shards."""
    return ActivationStore.create(
        run.train,
        StoreSpec(
            d_model=16,
            layers=(0,),
            groups=((0,),),
            split="train",
            n_population=n_shards,
            n_sequences=n_shards,
            rows_per_sequence=64,
            first_position=0,
            sequences_per_chunk=1,
            chunks_per_shard=1,
            seed=0,
            dtype="float16",
            scales=(1.0,),
        ),
    )


def _begin(folder: Path, n: int) -> Path:
    """Where n processes are to meet."""
    folder.mkdir(parents=True)
    (folder / "wanted").write_text(str(n))
    return folder


def harvest_seconds(cfg: RunConfig, nodes: Nodes, n: int, n_shards: int) -> float:
    """From when n processes are there to the last shard."""
    run = RunDirectory.claim(cfg)
    store = _store(run, n_shards)
    pool = Pool(Placement.of(cfg.compute, nodes), SharedStorage.of(run))
    arguments = (run.path / "train.zarr", SHARD_SECONDS)
    pool.start()
    meeting = _begin(run.path / "meeting", n)
    for _ in pool.work(SleepingHarvester, arguments, "begin", [(meeting,)] * n):
        pass
    start = time.perf_counter()
    jobs = [(shard,) for shard in store.missing()]
    for _ in pool.work(SleepingHarvester, arguments, "harvest", jobs, n, overlap=True):
        pass
    took = time.perf_counter() - start
    assert not store.missing()
    pool.free()
    return took


def sweep_seconds(cfg: RunConfig, nodes: Nodes, n: int, n_trials: int) -> float:
    """From when n trainers are there to the last result."""
    run, console = RunDirectory.claim(cfg), Console(file=StringIO())
    _store(run, 1)
    tracker = Tracker(cfg, run, console)
    session = Session(
        cfg=cfg,
        run=run,
        shape=describe(cfg.model),
        tracker=tracker,
        console=console,
        watchers=(),
    )
    meeting = _begin(run.trials, n)
    (meeting / "seconds").write_text(str(REPORT_SECONDS))
    trials = [_trial(run, number) for number in range(n_trials)]
    pool = Pool(Placement.of(cfg.compute, nodes), SharedStorage.of(run))
    with patch.object(sweep, "TuneTrial", SleepingTrial):
        sweep.train(session, trials, n_trials, 1, pool)
    tracker.finish("FINISHED")
    return max(trial.result_file.stat().st_mtime for trial in trials) - met(meeting)


def _trial(run: RunDirectory, number: int) -> Trial:
    name = f"g0-k8-{number}"
    return Trial(
        id=name,
        group=0,
        layers=(0,),
        n_steps=100,
        seed=0,
        sae=SaeConfig(d_model=16, d_sae=64, k=8, encoder="dense", selection="topk"),
        fit=FitConfig(batch_tokens=64),
        layer_scale={0: 1.0},
        window_chunks=1,
        checkpoint_seconds=60.0,
        train_store=run.train,
        validation_store=run.validation,
        row_filter=RowFilter(Hygiene(), (), {}),
        folder=run.trials / name,
    )


def _rows(
    stage: str, seconds: Callable[[int, int], float], work: int, counts: Sequence[int]
) -> list[Row]:
    rows = []
    share = work // max(counts)
    for kind in ("strong", "weak"):
        for n in counts:
            if n == 1:
                continue
            one = seconds(1, work) / n if kind == "strong" else seconds(1, share)
            many = seconds(n, work if kind == "strong" else share * n)
            rows.append(
                Row(
                    name=f"{stage}, {kind}, {n} nodes",
                    against="1 node",
                    ratio=one / many,
                    at_least=AT_LEAST,
                    aim=1.0,
                    values=[many, one],
                    versions={"ray": version("ray")},
                )
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
