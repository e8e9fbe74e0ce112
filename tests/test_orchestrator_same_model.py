"""A model of the Hub whose branch moves on while a run is under way: the run keeps to its commit."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoConfig

from actors.language_model import describe
from actors.model_source import ModelSource
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.stages.same_model import note_weights, pinned
from tests.runs import write_config

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine has of a model on the Hub: two commits, of 3 and of 4 layers; main is the first."""
    there = tmp_path / "hub" / "models--owner--tiny"
    for commit, n_layers in ((FIRST, 3), (SECOND, 4)):
        config = AutoConfig.for_model("gpt2", n_layer=n_layers, n_embd=8, n_head=2, vocab_size=16)
        config.save_pretrained(there / "snapshots" / commit)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(there.parent))
    return there


def test_a_run_keeps_to_the_commit_that_it_began_with(hub: Path, tmp_path: Path):
    cfg = config_file.load(write_config(tmp_path))
    cfg = replace(cfg, model=ModelSource(name="owner/tiny"))
    run = RunDirectory.claim(cfg)
    note_weights(cfg, run)
    assert read_json(run.model)["weights"] == FIRST

    (hub / "refs" / "main").write_text(SECOND)
    assert describe(cfg.model).n_layers == 4
    assert describe(pinned(cfg, run).model).n_layers == 3
    run.pilot.write("zarr.json", [b"{}"])  # from now on other weights would be refused
    note_weights(cfg, run)
    assert read_json(run.model)["weights"] == FIRST


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_run_that_did_not_note_the_commit_goes_on(
    hub: Path, tmp_path: Path, revision: str | None
):
    cfg = config_file.load(write_config(tmp_path))
    cfg = replace(cfg, model=ModelSource(name="owner/tiny", revision=revision))
    run = RunDirectory.claim(cfg)
    write_json(run.model, {"name": "owner/tiny", "weights": revision})  # by an older version
    run.pilot.write("zarr.json", [b"{}"])
    note_weights(cfg, run)
    assert read_json(run.model)["weights"] == revision, "stores are known by it"


def test_a_folder_is_what_it_is(tmp_path: Path):
    cfg = config_file.load(write_config(tmp_path))
    run = RunDirectory.claim(cfg)
    note_weights(cfg, run)
    assert pinned(cfg, run) == cfg
