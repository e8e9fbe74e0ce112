"""What `strata verify` says of damage that it can't keep for the harvest."""

from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory
from orchestrator.stages.verify import verify
from storage.places import place
from tests.models import random_tokens


def test_damage_is_told_also_where_it_can_not_be_noted(tmp_path: Path):
    run = RunDirectory(tmp_path, place(tmp_path))
    random_tokens(tmp_path / "tokens.zarr", 2)
    (tmp_path / "tokens.zarr/train/ids/c/0/0").unlink()
    run.damage.mkdir()  # a file can't take its place, as on a disk that is full or read-only
    with pytest.raises(UserError) as told:
        verify(run, Console(quiet=True))
    assert "tokens.zarr: train/ids, shard 0: it can't be read" in str(told.value)
    assert "the harvest does not know of it yet" in str(told.value)
    assert f"{run.damage} can't be written" in str(told.value)
