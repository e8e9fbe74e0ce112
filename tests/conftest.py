"""Fixtures that every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# However busy the machine is: time is never what a test asserts.
hypothesis.settings.register_profile("strata", deadline=None)
hypothesis.settings.load_profile("strata")

# Before Ray or MLflow are imported anywhere: tests speak to nothing outside this machine.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that no worker is left with one when the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models, data and published results beside the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("needs ../shared, which is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and on one thread."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> tuple[Path, str]:
    """A run that nothing interrupted: its configuration, and what it printed.

    Made once, by whichever of pytest's workers needs it first; no test may change it.
    """
    from tests.runs import strata, write_config

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    config, printed = folder / "run.yaml", folder / "printed.txt"
    with FileLock(f"{folder}.lock"):
        if not printed.is_file():
            status, output = strata("run", write_config(folder), timeout=900)
            assert status == 0, output
            printed.write_text(output)
    return config, printed.read_text()
