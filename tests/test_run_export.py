"""`strata export` and `strata evaluate --sae` on a finished run: what they write, and what they refuse."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from orchestrator.__main__ import main
from sae import load
from sae.formats import FORMATS


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory) -> Path:
    """A copy of the finished run."""
    there = finished[0].parent / "runs" / "small"
    here = tmp_path_factory.mktemp("export") / "small"
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("lock", "train.zarr"))
    config = yaml.safe_load((here / "config.yaml").read_text())
    (here / "config.yaml").write_text(yaml.safe_dump({**config, "run_dir": str(here)}))
    return here


def strata(*arguments: str | Path, capsys) -> tuple[int, str]:
    status = main(list(map(str, arguments)))
    told = capsys.readouterr()
    return status, told.out + told.err


def trial_of(run: Path, encoder: str) -> tuple[str, list[int]]:
    for file in sorted(run.glob("trials/*/result.json")):
        result = json.loads(file.read_text())
        if result["encoder"] == encoder:
            return result["trial"], result["layers"]
    raise AssertionError(f"no {encoder} trial in {run}")


def test_the_best_of_each_group_is_written_layer_by_layer_and_compared(run, capsys):
    status, told = strata("export", run, "--to", "safetensors", capsys=capsys)
    assert status == 0, told
    summary = json.loads((run / "summary.json").read_text())
    folders = sorted(run.glob("exports/safetensors/*/layer-*"))
    wanted = {(g["best"]["trial"], layer) for g in summary["groups"] for layer in g["layers"]}
    assert {(f.parent.name, int(f.name[6:])) for f in folders} == wanted
    for folder in folders:
        layer = int(folder.name[6:])
        original, _ = load(run / "trials" / folder.parent.name / "sae")
        alone, _ = load(folder)
        x, ids = 3 * torch.randn(64, original.d_model), torch.full((64,), layer)
        torch.testing.assert_close(
            alone.reconstruct(x, ids).x_hat, original.reconstruct(x, ids).x_hat
        )
        parity = json.loads((folder / "parity.json").read_text())
        assert parity["formula"]["wrong"] == 0
        assert parity["formula"]["reconstruction_delta"] <= 1e-4
        card = (folder / "README.md").read_text()
        assert f"`blocks.{layer}.hook_resid_post`" in card
        assert f"`gpt_neox.layers.{layer}`" in card
        assert "{{" not in card
    assert not list(run.glob("exports/*/.partial"))


def test_an_export_is_judged_as_the_autoencoder_it_came_from(run, capsys):
    trial, layers = trial_of(run, "dense")
    status, told = strata("export", run, "--to", "sae_lens", "--trial", trial, capsys=capsys)
    assert status == 0, told
    folder = run / "exports" / "sae_lens" / trial / f"layer-{layers[0]}"
    status, told = strata("evaluate", run, "--sae", folder, capsys=capsys)
    assert status == 0, told
    (file,) = run.glob("evaluations/foreign/*.json")
    found = json.loads(file.read_text())
    own, _ = load(run / "trials" / trial / "sae")
    from actors.fidelity import reconstruction_quality
    from orchestrator import config_file
    from orchestrator.run_directory import RunDirectory
    from orchestrator.stages.group import load_groups

    directory = RunDirectory.of(config_file.load(run, []))
    row_filter = load_groups(directory).row_filter
    quality = reconstruction_quality(own, directory.validation, [layers[0]], row_filter)
    assert found["layer"] == layers[0]
    assert found["fvu"] == pytest.approx(quality.layers[layers[0]].fvu, rel=1e-4)
    assert found["l0"] == pytest.approx(quality.layers[layers[0]].l0, rel=1e-4)
    assert 0 < found["ce_recovered"] <= 1.1


def test_substitutes_are_written_with_what_they_cost(run, capsys):
    trial, layers = trial_of(run, "kron")
    options = ("--to", "sparsify", "--trial", trial, "--distil", "--as-topk")
    status, told = strata("export", run, *options, capsys=capsys)
    assert status == 0, told
    folder = run / "exports" / "sparsify" / trial / f"layer-{layers[0]}"
    card = (folder / "README.md").read_text()
    assert "This is not the trained function" in card
    assert "| trained | exported | difference |" in card
    assert FORMATS["sparsify"].read(folder, layers[0]).cfg.selection == "topk"


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(run, capsys):
    kron, _ = trial_of(run, "kron")
    dense, _ = trial_of(run, "dense")
    for options, words in (
        (("--to", "dictionary_learning", "--trial", kron), "give --distil"),
        (("--to", "sparsify", "--trial", dense), "it holds TopK alone"),
        (("--to", "sae_lens", "--trial", dense, "--distil"), "dense already"),
        (("--to", "sae_lens", "--trial", "g9"), "no finished trial of that name"),
        (("--to", "sae_lens", "--python", "/nowhere/python"), "can't be run"),
        (("--to", "sae_lens", "--trial", dense, "--python", "/bin/true"), "without an answer"),
    ):
        status, told = strata("export", run, *options, capsys=capsys)
        assert (status, words in told, "Traceback" in told) == (2, True, False), told
    assert not (run / "exports" / "dictionary_learning").exists()


def test_a_gate_that_fails_leaves_nothing(run, capsys, monkeypatch):
    dense, _ = trial_of(run, "dense")
    write = FORMATS["dictionary_learning"].write

    def wrong(folder, sae, about):
        with torch.no_grad():
            sae.encoder.b_enc.add_(0.01)
        write(folder, sae, about)

    monkeypatch.setattr(FORMATS["dictionary_learning"], "write", wrong)
    options = ("--to", "dictionary_learning", "--trial", dense)
    status, told = strata("export", run, *options, capsys=capsys)
    assert status == 2, told
    assert "is not the autoencoder that was trained" in told
    assert not list((run / "exports" / "dictionary_learning").glob("**/*.pt"))
    assert not list((run / "exports").glob("*/.partial"))


def test_an_autoencoder_of_another_model_is_refused(run, tmp_path, capsys):
    trial, layers = trial_of(run, "dense")
    sae, _ = load(run / "trials" / trial / "sae")
    from sae.formats.folding import folded
    from tests.test_sae_formats import ABOUT, autoencoder

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    FORMATS["sae_lens"].write(narrow, folded(autoencoder(), 3), ABOUT)
    other = tmp_path / "other"
    other.mkdir()
    FORMATS["sae_lens"].write(other, folded(sae, layers[0]), replace(ABOUT, model="owner/other"))
    silent = tmp_path / "silent"
    silent.mkdir()
    FORMATS["dictionary_learning"].write(silent, folded(sae, layers[0]), ABOUT)
    config = json.loads((silent / "config.json").read_text())
    del config["trainer"]["layer"], config["trainer"]["lm_name"]
    (silent / "config.json").write_text(json.dumps(config))
    damaged = tmp_path / "damaged"
    shutil.copytree(silent, damaged)
    (damaged / "ae.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    layer = ("--layer", str(layers[0]))
    infinite = tmp_path / "infinite"
    broken = folded(sae, layers[0])
    broken.w_dec.data[0, 0] = math.nan
    FORMATS["safetensors"].write(infinite, broken, ABOUT)
    for folder, options, words in (
        (narrow, (), "reads activations of width 16"),
        (other, (), "trained on owner/other"),
        (silent, (), "do not say which layer"),
        (silent, ("--layer", "99"), "the run's validation rows are of layers"),
        (damaged, layer, "nothing of it ran"),
        (infinite, layer, "numbers that are not finite (w_dec)"),
        (tmp_path, (), "and no autoencoder"),
    ):
        status, told = strata("evaluate", run, "--sae", folder, *options, capsys=capsys)
        assert (status, words in told, "Traceback" in told) == (2, True, False), told


def with_its_own_model(run: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a run and of its model: the two folders."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    model, copy = folder / "model", folder / "run"
    shutil.copytree(config["model"]["name"], model)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("lock", "exports"))
    config["run_dir"], config["model"]["name"] = str(copy), str(model)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy, model


def test_a_tokenizer_that_is_not_the_runs_is_refused(run, tmp_path, capsys):
    copy, model = with_its_own_model(run, tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, told = strata("export", copy, "--to", "safetensors", capsys=capsys)
    assert status == 2
    assert "has the fingerprint" in told


def test_weights_that_are_not_the_runs_are_refused(run, tmp_path, capsys):
    copy, model = with_its_own_model(run, tmp_path)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] + 1e-3}, file, {"format": "pt"})
    exported = strata("export", copy, "--to", "safetensors", capsys=capsys)
    (copy / "summary.json").rename(tmp_path / "summary.json")  # a finished run only says so
    resumed = strata("run", copy, capsys=capsys)
    # Groups and trials are of the former ones.
    elsewhere = f"harvest.store={tmp_path / 'elsewhere'}"
    moved = strata("run", copy, "--set", elsewhere, capsys=capsys)
    for status, told in (exported, resumed, moved):
        assert (status, "other weights" in told, "Traceback" in told) == (2, True, False), told
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "summary.json").rename(copy / "summary.json")
    back = ("--set", "harvest.store=null")
    assert strata("export", copy, "--to", "safetensors", *back, capsys=capsys)[0] == 0
