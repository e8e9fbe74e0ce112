"""Sweeps whose actors train several trials each, on the embedded model."""

from functools import partial
from pathlib import Path

import pytest

from tests.object_server import BUCKET, counted, object_server, use
from tests.runs import SMALL_RUN, harvested, kill_when, start, strata, write_config
from tests.test_run_given_up import results, there, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TOGETHER = {"cpus": 2, "trials_per_actor": 2}


@pytest.mark.crash
def test_trials_that_train_together_end_as_those_that_did_not(
    tmp_path: Path, finished: tuple[Path, str]
):
    config = harvested(finished[0], tmp_path, compute=TOGETHER)
    status, output = strata("sweep", config)
    assert status == 0, output
    assert "trials waited for data for" in output
    run, other = (folder / "runs" / "small" for folder in (tmp_path, finished[0].parent))
    assert weights(run) == weights(other)
    untimed = [
        {
            name: {k: v for k, v in result.items() if k not in ("seconds", "data_wait_fraction")}
            for name, result in results(which).items()
        }
        for which in (run, other)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_killed_and_continued_in_other_company_they_end_the_same_under_asha(
    tmp_path: Path, finished: tuple[Path, str]
):
    sweep = {
        **SMALL_RUN["sweep"],
        "tokens": 60_000,
        "encoders": ["dense", {"kron": {"m": [4], "n": [4]}}],
        "k": [4, 8],
        "vary": {"train": {"lr": [3e-4, 1e-3]}},
        "stop": {"method": "asha", "grace": 0.2, "reduction": 2},
    }
    ends = []
    for name, sizes in (("alone", [1]), ("together", [3, 8, 3])):
        for size in sizes:
            folder = tmp_path / name
            compute = {"cpus": 2, "trials_per_actor": size}
            run = folder / "runs" / "small"
            if not run.exists():
                config = harvested(finished[0], folder, sweep=sweep, compute=compute)
            else:
                config = write_config(folder, sweep=sweep, compute=compute)
            if size != sizes[-1]:
                file = "fit.safetensors" if size == 3 else "stopped.json"
                kill_when(start("sweep", config), partial(there, run, file))
        status, output = strata("sweep", config)
        assert status == 0, output
        ends.append(({n: r["stopped_at"] for n, r in results(run).items()}, weights(run)))
    assert ends[0] == ends[1]
    assert None in ends[0][0].values()
    assert len(set(ends[0][0].values())) > 1


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_a_sweep_on_a_bucket_fetches_its_store_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In all, with a validation store of a fiftieth of the training store: each trial reads that for itself."""
    sweep = {
        **SMALL_RUN["sweep"],
        "tokens": 200_000,
        "window_chunks": 256,  # two of them hold the store: trials two by two are never far apart
        "encoders": ["dense"],
        "vary": {"train": {"lr": [1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 2e-3]}},
    }
    with object_server() as endpoint, counted(endpoint) as (proxy, fetched):
        use(monkeypatch, proxy)
        store = f"s3://{BUCKET}/run"
        sizes = {"tokens": 200_000, "validation_tokens": 500, "chunk_mib": 0.125}
        harvest = {**SMALL_RUN["harvest"], **sizes, "store": store}
        group = {"n_groups": 1}
        by_trials = []
        for n in (1, 6):
            some = {**sweep, "vary": {"train": {"lr": sweep["vary"]["train"]["lr"][:n]}}}
            folder = tmp_path / str(n)
            harvest["store"] = f"{store}-{n}"
            config = write_config(folder, harvest=harvest, group=group, sweep=some)
            status, output = strata("harvest", config)
            assert status == 0, output
            before = sum(fetched)
            status, output = strata("sweep", config)
            assert status == 0, output
            by_trials.append(sum(fetched) - before)
    assert by_trials[1] <= 1.2 * by_trials[0], by_trials
