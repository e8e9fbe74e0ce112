"""Fixtures that every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

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


def pytest_itemcollected(item: pytest.Item) -> None:
    """With several workers (`make test`), one of them does all that look at the finished run: it is made once."""
    if "finished" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.xdist_group("finished"))


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing interrupted: its configuration, and what it printed."""
    from tests.runs import strata, write_config

    config = write_config(tmp_path_factory.mktemp("finished"))
    status, output = strata("run", config)
    assert status == 0, output
    return config, output
