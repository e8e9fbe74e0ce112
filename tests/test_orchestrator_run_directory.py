"""A run directory belongs to one configuration."""

import dataclasses
from pathlib import Path

import pytest

from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return config_file.parse(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"name": "a/b"},
            "corpus": {"source": "stdlib"},
            "harvest": {"tokens": 1000},
            "sweep": {"d_sae": 64, "k": [4]},
        },
        "test",
    )


def test_the_same_configuration_finds_its_directory_again(cfg: RunConfig):
    run = RunDirectory.claim(cfg)
    text = run.config.read_text()
    assert RunDirectory.claim(cfg) == run
    assert run.config.read_text() == text


def test_another_configuration_is_refused_with_the_difference(cfg: RunConfig):
    run = RunDirectory.claim(cfg)
    run.tokens.mkdir()
    text = run.config.read_text()
    other = dataclasses.replace(cfg, seed=7, sweep=dataclasses.replace(cfg.sweep, k=(4, 8)))
    with pytest.raises(UserError) as caught:
        RunDirectory.claim(other)
    assert "seed: 0 there, 7 now" in str(caught.value)
    assert "sweep.k: [4] there, [4, 8] now" in str(caught.value)
    assert run.config.read_text() == text


def test_a_directory_in_which_nothing_was_made_yet_takes_another_configuration(cfg: RunConfig):
    RunDirectory.claim(cfg)
    run = RunDirectory.claim(dataclasses.replace(cfg, seed=7))
    assert "seed: 7" in run.config.read_text()


def test_compute_and_tracking_may_change(cfg: RunConfig):
    RunDirectory.claim(cfg).tokens.mkdir()
    RunDirectory.claim(
        dataclasses.replace(
            cfg,
            compute=dataclasses.replace(cfg.compute, cpus=1),
            tracking=dataclasses.replace(cfg.tracking, uri="http://localhost:1"),
        )
    )


def test_a_folder_with_other_files_is_not_taken_over(cfg: RunConfig):
    cfg.run_dir.mkdir()
    (cfg.run_dir / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files but no run of strata"):
        RunDirectory.claim(cfg)
    assert [file.name for file in cfg.run_dir.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_named(cfg: RunConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        RunDirectory.claim(dataclasses.replace(cfg, run_dir=tmp_path / "file" / "run"))


def test_stage_seconds_add_up_over_calls(cfg: RunConfig):
    run = RunDirectory.claim(cfg)
    with run.timed("pack"):
        pass
    with pytest.raises(KeyError), run.timed("pack"):
        raise KeyError
    assert list(run.stage_seconds()) == ["pack"]


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path):
    (tmp_path / "groups.json").write_text("{")
    with pytest.raises(UserError, match=r"groups\.json is damaged .* delete it, and the same"):
        read_json(tmp_path / "groups.json")
