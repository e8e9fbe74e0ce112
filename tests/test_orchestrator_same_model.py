"""A run keeps to the model that it began with: a commit of the Hub, or a folder's files as they were."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoConfig

from actors.language_model import describe
from actors.model_source import ModelSource
from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.stages.same_model import note_model, pinned
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
    note_model(cfg, run)
    assert read_json(run.model)["weights"] == FIRST

    (hub / "refs" / "main").write_text(SECOND)
    assert describe(cfg.model).n_layers == 4
    assert describe(pinned(cfg, run).model).n_layers == 3
    run.pilot.write("zarr.json", [b"{}"])  # from now on other weights would be refused
    note_model(cfg, run)
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
    note_model(cfg, run)
    assert read_json(run.model)["weights"] == revision, "stores are known by it"


@pytest.fixture
def in_a_folder(tmp_path: Path) -> tuple[RunConfig, RunDirectory]:
    """A run of a model whose folder is the test's own, which has noted it and stored something."""
    folder = tmp_path / "model"
    AutoConfig.for_model("gpt2", n_layer=2, n_embd=8, n_head=2, vocab_size=16).save_pretrained(
        folder
    )
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 99)
    cfg = config_file.load(write_config(tmp_path))
    cfg = replace(cfg, model=ModelSource(name=str(folder)))
    run = RunDirectory.claim(cfg)
    note_model(cfg, run)
    run.pilot.write("zarr.json", [b"{}"])
    return cfg, run


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **changes}))


def test_a_folder_is_what_it_is(in_a_folder: tuple[RunConfig, RunDirectory]):
    cfg, run = in_a_folder
    assert pinned(cfg, run) == cfg
    edit(Path(cfg.model.name) / "config.json", transformers_version="99", _name_or_path="elsewhere")
    note_model(cfg, run)  # who saved it is no matter


@pytest.mark.parametrize("damage", ["weights", "config.json"])
def test_a_folder_of_another_model_is_refused(
    in_a_folder: tuple[RunConfig, RunDirectory], damage: str
):
    cfg, run = in_a_folder
    folder = Path(cfg.model.name)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(bytes(range(256))[::-1] * 99)
    else:
        edit(folder / "config.json", activation_function="relu")
    with pytest.raises(UserError, match=f"(other|another) {damage} than this run was made with"):
        note_model(cfg, run)


def test_a_run_that_did_not_note_the_configuration_goes_on(
    in_a_folder: tuple[RunConfig, RunDirectory],
):
    cfg, run = in_a_folder
    older = {**read_json(run.model), "weights": read_json(run.model)["weights"].partition("-")[0]}
    write_json(run.model, older)
    note_model(cfg, run)
    assert read_json(run.model) == older, "stores are known by it"
    (Path(cfg.model.name) / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="other weights"):
        note_model(cfg, run)
