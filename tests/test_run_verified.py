"""Damage in a finished run: `strata verify` names it, `strata harvest` mends it byte for byte."""

import shutil
from pathlib import Path

import pytest

from orchestrator.__main__ import main
from orchestrator.run_directory import write_json
from tests.runs import strata, write_config
from tests.stores import files_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STORES = ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.timeout(900)
def test_a_finished_run_is_verified_and_only_what_is_damaged_is_written_again(
    tmp_path: Path, finished: tuple[Path, str]
):
    shutil.copytree(finished[0].parent / "runs", tmp_path / "runs")
    run, config = tmp_path / "runs" / "small", write_config(tmp_path)
    whole = {store: files_of(run / store) for store in STORES}
    status, output = strata("verify", config)
    assert status == 0, output
    assert "are as they were written" in output

    flip(run / "tokens.zarr/train/ids/c/0/0")
    flip(run / "pilot.zarr/layers/2/x/c/0/0")
    flip(run / "train.zarr/commits/000001.json")
    (run / "train.zarr/groups/0/x/c/0/0").unlink()
    (run / "train.zarr/commits/000003.json").unlink()
    flip(run / "validation.zarr/zarr.json")
    kept = run / "train.zarr/groups/0/x/c/2/0"
    stamp = kept.stat().st_mtime_ns

    status, output = strata("verify", config)
    assert status == 2
    for named in (
        "is damaged in 6 places",
        "tokens.zarr: train/ids, shard 0, chunk",
        "pilot.zarr: layers/2/x, shard 0, chunk",
        "train.zarr: commits/000001.json",
        "train.zarr: commits/000003.json: it is not there any more",
        "train.zarr: groups/0/x, shard 0: it can't be read",
        "validation.zarr: zarr.json",
        "Its shards were not looked at",
        "`strata harvest",
        "3 shards of train.zarr",
    ):
        assert named in output, output

    status, output = strata("harvest", config)
    assert status == 0, output
    assert {store: files_of(run / store) for store in STORES} == whole
    assert kept.stat().st_mtime_ns == stamp
    status, output = strata("verify", config)
    assert status == 0, output


def test_shards_that_no_trial_came_to_under_a_disk_budget_are_no_damage(
    tmp_path: Path, finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "small"
    shutil.copytree(finished[0].parent / "runs" / "small", run)
    last = max((run / "train.zarr" / "commits").glob("*.json"))
    last.unlink()
    assert main(["verify", str(run)]) == 2
    assert f"commits/{last.name}: it is not there any more" in capsys.readouterr().err
    (run / "ring").mkdir()  # where trials said which shards they need
    assert main(["verify", str(run)]) == 0


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_stores_and_tokens_that_were_exchanged_are_refused(
    tmp_path: Path, finished: tuple[Path, str]
):
    shutil.copytree(finished[0].parent / "runs", tmp_path / "runs")
    run, config = tmp_path / "runs" / "small", write_config(tmp_path)
    (run / "summary.json").unlink()  # as long as it is there nothing is left to do
    (run / "pilot.zarr").rename(run / "held")
    (run / "validation.zarr").rename(run / "pilot.zarr")
    (run / "held").rename(run / "validation.zarr")
    status, output = strata("harvest", config)
    assert status == 2
    assert "is there with another specification (split" in output

    (run / "pilot.zarr").rename(run / "held")
    (run / "validation.zarr").rename(run / "pilot.zarr")
    (run / "held").rename(run / "validation.zarr")
    note = run / "tokens.json"
    write_json(note, {"fingerprint": "of another text"})
    status, output = strata("harvest", config)
    assert status == 2
    assert "holds other tokens than those whose activations this run has stored" in output
