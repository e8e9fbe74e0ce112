"""A run directory belongs to one configuration."""

import dataclasses
import errno
import fcntl
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json
from orchestrator.sweeps.sweep_config import StopConfig
from storage.errors import StoreError
from storage.object_store import ObjectPlace
from tests.object_server import use


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
    run.tokens.write("zarr.json", [b"{}"])
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
    RunDirectory.claim(cfg).tokens.write("zarr.json", [b"{}"])
    RunDirectory.claim(
        dataclasses.replace(
            cfg,
            compute=dataclasses.replace(cfg.compute, cpus=1),
            tracking=dataclasses.replace(cfg.tracking, uri="http://localhost:1"),
        )
    )


def test_what_was_sent_with_a_job_may_be_unpacked_elsewhere_the_next_time(cfg: RunConfig):
    def sent(session: str, package: str, name: str) -> RunConfig:
        folder = f"/tmp/{session}/runtime_resources/working_dir_files/_ray_pkg_{package}"
        return dataclasses.replace(
            cfg, model=dataclasses.replace(cfg.model, name=f"{folder}/{name}")
        )

    RunDirectory.claim(sent("one", "0deb0ea9", "models/a")).tokens.write("zarr.json", [b"{}"])
    run = RunDirectory.claim(sent("two", "1f", "models/a"))
    assert "/tmp/two/" in run.config.read_text()
    with pytest.raises(UserError, match=r"model\.name: 'models/a' there, 'models/b' now"):
        RunDirectory.claim(sent("two", "1f", "models/b"))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"site": "mlp"}, "model.site: 'residual' there, 'mlp' now"),
        ({"hook_points": "h.{layer}"}, "model.hook_points: None there, 'h.{layer}' now"),
    ],
)
def test_hook_points_belong_to_the_run(cfg: RunConfig, setting: dict[str, str], named: str):
    RunDirectory.claim(cfg).tokens.write("zarr.json", [b"{}"])
    with pytest.raises(UserError) as caught:
        RunDirectory.claim(
            dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **setting))
        )
    assert named in str(caught.value)


def test_the_devices_a_model_is_spread_over_may_change(cfg: RunConfig):
    RunDirectory.claim(cfg).tokens.write("zarr.json", [b"{}"])
    model = dataclasses.replace(cfg.model, device_map="auto")
    RunDirectory.claim(dataclasses.replace(cfg, model=model))


def test_a_configuration_written_before_a_setting_was_there_is_the_same(cfg: RunConfig):
    run = RunDirectory.claim(cfg)
    run.tokens.write("zarr.json", [b"{}"])
    old = yaml.safe_load(run.config.read_text())
    del old["hygiene"], old["sweep"]["stop"], old["sweep"]["search"], old["model"]["site"]
    run.config.write_text(yaml.safe_dump(old))
    RunDirectory.claim(cfg)
    assert "stop:" in run.config.read_text()

    run.config.write_text(yaml.safe_dump(old))
    stopping = dataclasses.replace(cfg.sweep, stop=StopConfig(method="asha"))
    with pytest.raises(UserError, match=r"sweep\.stop\.method: 'none' there, 'asha' now"):
        RunDirectory.claim(dataclasses.replace(cfg, sweep=stopping))

    run.config.write_text(yaml.safe_dump({**old, "a_setting_of_old": 1}))
    with pytest.raises(UserError, match=r"a_setting_of_old: 1 there, None now"):
        RunDirectory.claim(cfg)


def test_a_folder_with_other_files_is_not_taken_over(cfg: RunConfig):
    cfg.run_dir.mkdir()
    (cfg.run_dir / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files but no run of strata"):
        RunDirectory.claim(cfg)
    assert [file.name for file in cfg.run_dir.iterdir()] == ["thesis.tex"]


def test_a_store_that_does_not_answer_is_given_up_soon_at_every_try(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    hasty = property(lambda self: ObjectPlace(self.location, 0.5, 0.5))
    monkeypatch.setattr(ObjectPlace, "hasty", hasty)
    elsewhere = dataclasses.replace(cfg.harvest, store="s3://bucket/x")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        use(monkeypatch, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for seed in (0, 0, 1):
            with pytest.raises(StoreError, match=r"did not answer within 0\.5 s of trying"):
                RunDirectory.claim(dataclasses.replace(cfg, harvest=elsewhere, seed=seed))


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
    with pytest.raises(UserError, match=r"groups\.json is damaged .* delete it: `strata run`"):
        read_json(tmp_path / "groups.json")
    (tmp_path / "groups.json").write_text("[]")
    with pytest.raises(UserError, match=r"groups\.json is damaged \(it holds no dict\)"):
        read_json(tmp_path / "groups.json")
    assert read_json(tmp_path / "groups.json", list) == []


def test_what_a_kill_has_left_of_the_first_write_hinders_nobody(cfg: RunConfig):
    cfg.run_dir.mkdir()
    (cfg.run_dir / f"config.yaml.{'0a' * 16}.partial").write_text("na")
    assert RunDirectory.claim(cfg).config.is_file()
    assert len(list(cfg.run_dir.glob("*.partial"))) == 0


def test_a_store_elsewhere_has_one_process_too_whatever_its_run_directory(
    cfg: RunConfig, tmp_path: Path
):
    store = tmp_path / "store"
    store.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    harvest = dataclasses.replace(cfg.harvest, store=str(store))
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"store is at work already, by process {child.pid}"):
            RunDirectory.claim(dataclasses.replace(cfg, harvest=harvest))
    finally:
        child.kill()
        child.communicate()


HOLDER = """
import sys, time
from pathlib import Path
from orchestrator import run_lock
run_lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_directory_has_one_process_and_a_dead_one_holds_nothing(cfg: RunConfig):
    cfg.run_dir.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, cfg.run_dir],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is at work already, by process {child.pid} on ."):
            RunDirectory.claim(cfg)
        assert [file.name for file in cfg.run_dir.iterdir()] == ["lock"]
    finally:
        child.kill()
        child.communicate()
    assert RunDirectory.claim(cfg).config.is_file()


def test_where_files_can_not_be_locked_nobody_else_is_blamed(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(UserError, match=r"can't be locked \(No locks available\).*NFS: without no"):
        RunDirectory.claim(cfg)


def test_while_tokens_are_packed_again_the_configuration_may_not_change(cfg: RunConfig):
    run = RunDirectory.claim(cfg)
    run.pilot.write("zarr.json", [b"{}"])
    with pytest.raises(UserError, match="seed: 0 there, 7 now"):
        RunDirectory.claim(dataclasses.replace(cfg, seed=7))
