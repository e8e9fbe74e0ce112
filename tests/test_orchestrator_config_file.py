"""The door: what a YAML file may hold, and what it says when it holds something else."""

from pathlib import Path

import pytest
import yaml

from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from sae.config import KronShape

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "run_dir": "runs/x",
    "model": {"name": "EleutherAI/pythia-14m"},
    "corpus": {"source": "stdlib"},
    "harvest": {"tokens": 1000},
    "sweep": {"d_sae": 64, "k": [4]},
}


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return config_file.load(file, overrides)


def changed(**sections: object) -> str:
    return yaml.safe_dump({**SMALL, **sections})


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_example_loads(path: Path):
    if "shared" in path.read_text() and not (ROOT.parent / "shared").is_dir():
        pytest.skip("needs ../shared, which is not beside this checkout")
    cfg = config_file.load(path)
    assert cfg.sweep.encoders[0] == "dense"
    assert cfg.run_dir.is_absolute()


def test_a_dumped_configuration_loads_as_itself(tmp_path: Path):
    encoders = ["dense", {"h": 4, "m": 4, "n": 4}]
    cfg = load(tmp_path, changed(sweep={"d_sae": 64, "k": [4, 8], "encoders": encoders}))
    assert cfg.sweep.encoders == ("dense", KronShape(h=4, m=4, n=4))
    assert load(tmp_path, config_file.dump(cfg)) == cfg


def test_every_fault_is_reported_at_once_with_its_path(tmp_path: Path):
    encoders = ["dense", {"h": 8, "m": 4, "n": 4}]
    text = complaint(
        tmp_path,
        changed(
            harvest={"tokns": 5, "tokens": "many", "dtype": "int3"},
            sweep={"d_sae": 64, "k": [4, 65], "encoders": encoders, "winer": 1},
            group={"threshold": 0},
        ),
    )
    assert "faults" in text
    for expected in (
        "harvest.tokns: is not a setting; did you mean tokens?",
        "harvest.tokens: 'many'",
        "harvest.dtype: 'int3'",
        "sweep.k[1]: 65 exceeds d_sae = 64; lower k or widen the dictionary",
        "sweep.encoders[1]: h*m*n = 8*4*4 = 128 is not d_sae = 64; with this m and n, h must be 4",
        "sweep.winer: is not a setting; did you mean winner?",
        "group.threshold: 0.0 is no AMAD",
    ):
        assert expected in text, text
    assert "Traceback" not in text


def test_a_fault_does_not_cause_others_that_only_follow_from_it(tmp_path: Path):
    text = complaint(tmp_path, changed(sweep={"d_sae": "wide", "k": [4], "encoders": ["dense"]}))
    assert text.count("\n") == 1, text
    assert "sweep.d_sae: 'wide'" in text


@pytest.mark.parametrize(
    ("section", "expected", "count"),
    [
        ({"harvest": {"tokens": True}}, "harvest.tokens: True is not a number", 1),
        ({"harvest": {"tokens": "60000"}}, "harvest.tokens: '60000' is not a number", 1),
        ({"hygiene": {"drop_special_tokens": "yes"}}, "'yes' is not true or false", 1),
        ({"harvest": 5}, "harvest: 5 is not a section", 1),
        ({"harvest": {"tokens": 10**15}}, "less than or equal to 1000000000000", 1),
        (
            {"harvest": {"tokens": 1, "context": 131_072}},
            "harvest.context: 131072 should be less than or equal to 65536",
            1,
        ),
        (
            {"harvest": {"tokens": 1, "shard_mib": float("inf")}},
            "harvest.shard_mib: inf should be less than or equal to 1048576",
            1,
        ),
        ({"seed": 2**64}, "seed: 18446744073709551616 should be less than", 1),
        ({"seed": -(2**63) - 1}, "seed: -9223372036854775809 should be greater than", 1),
        *(
            ({"harvest": {"tokens": 1, "store": store}}, f"harvest.store: {store!r} {fault}", 1)
            for store, fault in {
                "": "is no folder and no URL of a bucket",
                "s3:/bucket": "is no folder and no URL of a bucket",
                "s3:bucket/a": "is no folder and no URL of a bucket",
                "gs://bucket\0/x": "is no folder and no URL of a bucket",
                "s3://bucket/../c": "leads out of its bucket",
            }.items()
        ),
        ({"sweep": {"d_sae": 64, "k": 4}}, "sweep.k: 4 is not a list; write [4]", 1),
        ({"sweep": {"d_sae": 64, "k": [-1, 0]}}, "sweep.k[0]: -1", 2),
        (
            {"sweep": {"d_sae": 64, "k": [4], "encoders": [{"h": 4, "m": 4, "n": 4, "z": 1}]}},
            "sweep.encoders[0].z: is not a setting; known here: activation, h, kron, m, n",
            1,
        ),
        (
            {"corpus": {"source": "stdlib", "paths": ["a"]}},
            "corpus.paths: does not go with this `source`",
            1,
        ),
        (
            {"model": {"name": "a/b", "hook_points": "layers.0"}},
            "model.hook_points: 'layers.0' names no module for each layer",
            1,
        ),
        ({"model": {"name": "a/b", "site": "mlps"}}, "model.site: 'mlps' should be", 1),
        ({"model": {"name": "a/b", "device_map": {"": 0}}}, "model.device_map: {'': 0}", 1),
        ({"train": {"batch_tokens": 0, "lr": -1, "betas": [1.5, 0]}}, "train.betas: (1.5, 0.0)", 3),
    ],
)
def test_a_fault_is_told_in_the_words_of_the_file(
    tmp_path: Path, section: dict[str, object], expected: str, count: int
):
    text = complaint(tmp_path, changed(**section))
    assert expected in text, text
    assert text.count("\n") == count, text


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"sweep": {"d_sae": 64, "k": ["a", 8, 300]}}, "sweep.k[2]: 300 exceeds d_sae = 64"),
        (
            {"sweep": {"d_sae": 64, "k": [4], "encoders": ["dens", {"h": 3, "m": 2, "n": 4}]}},
            "sweep.encoders[1]: h*m*n = 3*2*4 = 24 is not d_sae = 64",
        ),
        ({"harvest": {"tokens": -1, "shard_mib": 0.1}}, "harvest.shard_mib: 0.1 is less than"),
        (
            {"harvest": {"tokens": -1, "disk_budget": "two"}},
            "harvest.disk_budget: 'two' is no size",
        ),
    ],
)
def test_one_fault_does_not_hide_another_of_its_section(
    tmp_path: Path, section: dict[str, object], expected: str
):
    text = complaint(tmp_path, changed(**section))
    assert expected in text, text
    assert text.count("\n") == 2, text


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"compute": {"address": "u:planted@127.0.0.1:1"}}, "compute.address: holds more than"),
        (
            {"corpus": {"source": "files", "paths": ["s3://key:planted@bucket/x"]}},
            "corpus.paths: one of them is a URL",
        ),
        ({"run_dir": "http://u:planted@host/x"}, "run_dir: host/x is no folder"),
    ],
)
def test_an_address_that_may_hold_a_password_is_refused_and_not_repeated(
    tmp_path: Path, section: dict[str, object], expected: str
):
    text = complaint(tmp_path, changed(**section))
    assert expected in text
    assert "planted" not in text


def test_merge_keys_are_understood(tmp_path: Path):
    text = changed().replace("harvest:\n", "x-shared: &x {dtype: float32}\nharvest:\n  <<: *x\n")
    assert "x-shared: is not a setting" in complaint(tmp_path, text)
    cfg = load(tmp_path, changed(sweep={"d_sae": 64, "k": [4]}) + "train: {<<: {lr: 0.5}}\n")
    assert cfg.train.lr == 0.5


def test_missing_settings_are_named(tmp_path: Path):
    text = complaint(tmp_path, "model: {name: a/b}\n")
    for name in ("run_dir", "corpus", "harvest", "sweep"):
        assert f"{name}: is missing" in text


def test_an_unknown_corpus_names_the_known_ones(tmp_path: Path):
    text = complaint(tmp_path, changed(corpus={"source": "internet"}))
    assert "corpus" in text
    assert "stdlib, files or hub" in text


def test_a_repeated_key_is_refused(tmp_path: Path):
    text = complaint(tmp_path, changed() + "sweep: {d_sae: 8, k: [1]}\n")
    assert "'sweep' is given twice" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "holds no settings"), ("[1, 2]", "holds no settings"), ("a: [", "not readable as YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str):
    assert expected in complaint(tmp_path, text)


def test_a_run_that_was_moved_is_where_it_is_now(tmp_path: Path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.yaml").write_text(changed())
    assert config_file.load(run).run_dir == run
    assert config_file.load(run / "config.yaml").run_dir != run


def test_a_missing_file_is_named_with_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"no\.yaml does not exist.*examples/demo\.yaml"):
        config_file.load(tmp_path / "no.yaml")


def test_a_group_is_overridden_by_its_number_however_the_file_spells_it(tmp_path: Path):
    for name in (0, "0", "00"):
        text = changed(sweep={"d_sae": 64, "k": [4], "groups": {name: {"k": [8]}}})
        cfg = load(tmp_path, text, "sweep.groups.0.k=[16]")
        assert list(cfg.sweep.groups) == [0]
        assert cfg.sweep.of_group(0)[0].ends[0][0] == 16
        dumped = config_file.dump(cfg)
        assert load(tmp_path, dumped, "sweep.groups.0.k=[32]").sweep.of_group(0)[0].ends[0][0] == 32


def test_overrides_are_yaml_and_win(tmp_path: Path):
    cfg = load(tmp_path, changed(), "sweep.k=[16,32]", "train.lr=1e-3", "harvest.tokens=1e6")
    assert cfg.sweep.k == (16, 32)
    assert cfg.train.lr == 1e-3
    assert cfg.harvest.tokens == 1_000_000


@pytest.mark.parametrize("override", ["sweep.k", "=3", "run_dir.x=3", "sweep.k=[1"])
def test_an_override_that_is_no_setting_is_refused(tmp_path: Path, override: str):
    assert override in complaint(tmp_path, changed(), override)


def test_input_paths_are_relative_to_the_file_and_outputs_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "a.txt").write_text("text")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cfg = load(
        tmp_path / "conf",
        changed(
            model={"name": "model"},
            corpus={"source": "files", "paths": ["*.txt"]},
            tracking={"uri": "sqlite:///ours.db"},
        ),
    )
    assert cfg.tracking.uri == f"sqlite:///{tmp_path}/elsewhere/ours.db"
    assert cfg.model.name == str(tmp_path / "conf" / "model")
    assert cfg.corpus.source == "files"
    assert cfg.corpus.paths == (str(tmp_path / "conf" / "*.txt"),)
    assert cfg.run_dir == tmp_path / "elsewhere" / "runs" / "x"


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "x" * 300])
def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path, path: str):
    assert "a path in it can't be" in complaint(tmp_path, changed(model={"name": path}))


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_name(tmp_path: Path):
    assert "there is no folder ./nowhere" in complaint(
        tmp_path, changed(model={"name": "./nowhere"})
    )
