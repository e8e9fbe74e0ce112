"""What a sweep costs beside its trials: Ray Tune, actors and MLflow against a plain loop.

Both train the same autoencoders, two processes at a time, one thread each, and judge and write them; their
weights must be the same, bit for bit. The plain side counts from the start of its processes, ours from when
Tune is called, its processes' start included. Ray and MLflow start once a run, whatever its length: they are in
the row of the whole command, which nothing is demanded of.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.rows import Row
from benchmarks.sweep_runs import Sweep
from benchmarks.worker import ROOT
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.stages.group import load_groups
from orchestrator.stores import window_chunks
from sae.fit import FitConfig
from storage.activations import ActivationStore

AT_LEAST = 1 / 1.1
TRACKING_SHARE = 0.01
TRIAL_SECONDS = 60.0
PROCESSES = 2

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the sweep: what differs from the demo's configuration."""

    stores: Settings = field(default_factory=lambda: {"group": {"n_groups": 2}})
    """Of the sections up to the training store."""

    sweep: Settings = field(
        default_factory=lambda: {
            "sweep": {
                "k": [32],
                "encoders": ["dense", {"h": 128, "m": 2, "n": 4}],
                "tokens": 4_800_000,
            }
        }
    )
    pairs: int = 3
    trial_seconds: float = TRIAL_SECONDS
    """That a trial must last, or the figure is of something else."""


def measure(size: Size, folder: Path) -> list[Row]:
    """Wall-clock seconds of the sweep, and of its command, against those of the plain loop."""
    base = Sweep.of(folder / "stores", size.stores)
    base.do("harvest")
    shared = {"compute": {"cpus": PROCESSES, "cpus_per_actor": 1}}
    times: list[tuple[float, float, float]] = []
    trials: list[dict[str, Any]] = []
    seconds: list[float] = []
    shares: list[tuple[float, float]] = []
    for turn in range(size.pairs):
        here = folder / f"pair{turn}"
        sweep = Sweep.of(here, {**size.stores, **size.sweep, **shared})
        sweep = sweep.with_stores_of(base.run_dir)
        # There and back, so that neither side always follows the other.
        plain = _in_plain_loop(trials, here / "plain") if turn % 2 else None
        command = sweep.do("sweep")
        trials = _trials(sweep)
        plain = plain or _in_plain_loop(trials, here / "plain")
        _check_same(sweep.run_dir / "trials", here / "plain", trials)
        stage = read_json(sweep.run_dir / "stage_seconds.json")["sweep"]
        trained = [result["seconds"] for result in sweep.results]
        seconds += trained
        told = read_json(sweep.run_dir / "mlflow.json")["metrics"]
        shares.append((told["tracking_cpu_seconds"][0], TRACKING_SHARE * sum(trained)))
        times.append((stage, command, plain))
        print(f"  {turn + 1}/{size.pairs} sweep {stage:.1f} s, command {command:.1f} s, ", end="")
        print(f"plain loop {plain:.1f} s", flush=True)
        shutil.rmtree(here)
    return _rows(times, seconds, shares, len(trials), size)


def _rows(
    times: Sequence[tuple[float, float, float]],
    seconds: Sequence[float],
    shares: Sequence[tuple[float, float]],
    n: int,
    size: Size,
) -> list[Row]:
    versions = {name: version(name) for name in ("torch", "ray", "mlflow")}
    stages, commands, plains = zip(*times, strict=True)
    made = [
        Row(
            name=f"{name} of {n} trials, {PROCESSES} at a time",
            against="plain loop",
            ratio=statistics.median(b / a for a, b in zip(ours, plains, strict=True)),
            at_least=at_least,
            aim=None,
            values=[statistics.median(ours), statistics.median(plains)],
            versions=versions,
        )
        for name, ours, at_least in (
            ("sweep", stages, AT_LEAST),
            ("command, Ray's start included,", commands, None),
        )
    ]
    shortest = min(seconds)
    told, allowed = (statistics.median(some) for some in zip(*shares, strict=True))
    return [
        *made,
        Row(
            name="shortest trial, training alone",
            against="what is asked",
            ratio=shortest / size.trial_seconds,
            at_least=1.0,
            aim=None,
            values=[shortest, size.trial_seconds],
            versions=versions,
        ),
        Row(
            name="CPU seconds of telling MLflow",
            against="1 % of training",
            ratio=allowed / told,
            at_least=1.0,
            aim=None,
            values=[told, allowed],
            versions=versions,
        ),
    ]


def _trials(sweep: Sweep) -> list[dict[str, Any]]:
    """What `benchmarks.plain_trials` needs to know of each trial of a finished sweep."""
    cfg = config_file.load(sweep.config)
    run = RunDirectory.of(cfg)
    rows = load_groups(run).row_filter.to_json()
    trials = []
    for result in sweep.results:
        header = read_json(run.trials / result["trial"] / "sae" / "sae.json")
        trials.append(
            {
                "id": result["trial"],
                "group": result["group"],
                "layers": result["layers"],
                "sae": header["config"],
                "layer_scale": header["layer_scale"],
                "fit": {setting.name: result[setting.name] for setting in fields(FitConfig)},
                "n_steps": result["tokens"] // result["batch_tokens"],
                "seed": cfg.seed,
                "window_chunks": window_chunks(cfg, ActivationStore.open(run.train).spec),
                "row_filter": rows,
            }
        )
    return trials


def _in_plain_loop(trials: Sequence[Mapping[str, Any]], folder: Path) -> float:
    """Seconds that the processes take for all trials, each the next one when it is free."""
    waiting: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
    stores = folder.parent / "run"
    places = {
        "train_store": str(stores / "train.zarr"),
        "validation_store": str(stores / "validation.zarr"),
    }
    for trial in trials:
        waiting.put({**trial, **places, "folder": str(folder / trial["id"])})
    start = time.perf_counter()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for done in [pool.submit(_serve, waiting) for _ in range(PROCESSES)]:
            done.result()
    return time.perf_counter() - start


def _serve(waiting: "SimpleQueue[Mapping[str, Any]]") -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.plain_trials", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as Ray gives an actor of one CPU
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            trial = waiting.get_nowait()
        except Empty:
            break
        process.stdin.write(json.dumps(trial) + "\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise RuntimeError(f"the plain loop ended in {trial['id']}; see what it printed above")
    process.stdin.close()
    process.wait()


def _check_same(ours: Path, plain: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    for trial in trials:
        a = load_file(ours / trial["id"] / "sae" / "sae.safetensors")
        b = load_file(plain / trial["id"] / "sae.safetensors")
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            raise RuntimeError(
                f"the sweep and the plain loop trained {trial['id']} to other weights, so their times "
                "are of different work; both must use one build of torch and one thread"
            )
