"""Files of a run that name what lies outside it, and models that bring code: refused, and nothing is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import InputError
from actors.language_model import describe
from actors.model_source import ModelSource
from orchestrator import config_file
from orchestrator.__main__ import main
from orchestrator.config import TrackingConfig
from orchestrator.errors import UserError
from orchestrator.progress_file import ProgressFile
from orchestrator.redaction import is_secret, redacted
from orchestrator.run_directory import RunDirectory, read_json, read_summary, write_json
from orchestrator.stages.group_file import load_groups
from orchestrator.stages.verify import take_back
from orchestrator.sweeps.suggestions import Suggestions
from orchestrator.verbs import _console
from storage.activations import ActivationStore
from storage.commits import CommitLog
from storage.errors import StoreError
from storage.places import place
from storage.root import read_root
from storage.verify import Verification
from tests.runs import ROOT, SMALL_RUN, write_config
from tests.stores import filled_store, small_spec

OUTSIDE = ("../outside", "a/../../outside", "/etc/passwd", "..", "a/..", "nul\0l")


@pytest.fixture
def run(finished: tuple[Path, str], tmp_path: Path) -> RunDirectory:
    """What a finished run knows of itself, to be spoilt: a copy without its stores."""
    there = finished[0].parent / "runs" / "small"
    stores = shutil.ignore_patterns("*.zarr", "lock")
    copied = tmp_path / "runs" / "small"
    shutil.copytree(there, copied, ignore=stores)
    return RunDirectory.of(config_file.load(copied))


def edited(file: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    write_json(file, data)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("location", ["folder", "s3://bucket/prefix"])
def test_no_name_leads_out_of_a_place(tmp_path: Path, location: str, name: str):
    (tmp_path / "outside").write_text("kept")
    where = place(location if "://" in location else tmp_path / location)
    for use in (
        where.__truediv__,
        where.read,
        where.size,
        where.record,
        where.names,
        where.delete,
        lambda name: where.write(name, [b"spoilt"]),
    ):
        with pytest.raises(StoreError, match="leads out of the folder that it is a name in"):
            use(name)
    assert (tmp_path / "outside").read_text() == "kept"


def test_a_root_that_vouches_for_files_elsewhere_is_damage(tmp_path: Path):
    store = filled_store(tmp_path / "store", small_spec())
    root = read_root(store.place, "activation")
    secret = place(tmp_path).write("secret", [b"of another"])
    root.files["../../secret"] = secret
    store.place.write("zarr.json", [root.to_bytes()])
    with pytest.raises(StoreError, match="it names files outside the store"):
        ActivationStore.open(store.place)
    verification = Verification(store.place, "activation")
    [damage] = verification.damages
    assert "it names files outside the store" in damage.what
    assert verification.n_bytes == 0


def test_a_specification_whose_layers_are_names_is_refused(tmp_path: Path):
    spec = small_spec().to_json()
    spec["layers"][0] = "../../outside"
    with pytest.raises(StoreError, match="layers are numbers"):
        type(small_spec()).from_json(spec)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("d_model", "128"), ("layers", None), ("groups", [1, 2]), ("sequences_per_chunk", 4.5)),
        *(("scales", [None]), ("seed", True), ("codec", 3)),
    ],
)
def test_a_specification_of_other_kinds_is_refused(key: str, value: object):
    with pytest.raises(StoreError, match="its file was edited or damaged"):
        type(small_spec()).from_json({**small_spec().to_json(), key: value})


def test_a_commit_record_of_other_files_is_damage_and_they_are_not_read(tmp_path: Path):
    store = filled_store(tmp_path / "store", small_spec())
    commits = CommitLog(store.place, store.spec.digest)
    record = commits.record(0)
    record.files["../../outside"] = next(iter(record.files.values()))
    commits.write(record)
    verification = Verification(store.place, "activation")
    assert [d.what for d in verification.damages] == ["it names other files than the shard has"]
    assert not list(verification.run(1)) or not (tmp_path / "outside").exists()


@pytest.mark.parametrize("group", ["../../outside", "/tmp/outside", 1.5, None])
def test_groups_that_are_no_numbers_are_refused(run: RunDirectory, group: object):
    edited(run.groups, lambda data: data["groups"][0].update(id=group))
    with pytest.raises(UserError, match=r"groups\.json is not what the grouping wrote"):
        load_groups(run)


def test_groups_are_read_as_the_grouping_wrote_them_and_not_otherwise(run: RunDirectory):
    def shortened(data: dict[str, Any]) -> None:
        norms = data["row_filter"]["median_norms"]
        norms["1"] = norms["1"] / 10

    load_groups(run)
    data = json.loads(run.groups.read_text())
    shortened(data)
    run.groups.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"groups\.json .*its checksum does not match.*edited"):
        load_groups(run)


@pytest.mark.parametrize("text", ["{", "3", '{"train.zarr": 3}', '{"train.zarr": [{"file": 1}]}'])
def test_a_note_of_damage_that_can_not_be_read_is_asked_for_again(run: RunDirectory, text: str):
    run.damage.write_text(text)
    with pytest.raises(UserError, match=r"damage\.json .* run `strata verify .*` again"):
        take_back(run, Console(quiet=True))
    assert run.damage.is_file()


@pytest.mark.parametrize("trial", ["../../outside", "/tmp/outside", "..", "", ".", 3])
@pytest.mark.parametrize("verb", ["export", "dashboard", "report", "progressive"])
def test_trials_of_a_summary_name_folders_here(run: RunDirectory, trial: object, verb: str):
    edited(run.summary, lambda data: data["groups"][0]["best"].update(trial=trial))
    with pytest.raises(UserError, match=r"summary\.json is damaged \(it names trials, groups or"):
        read_summary(run)
    source = ROOT / "orchestrator" / ("pages" if verb == "report" else "stages") / f"{verb}.py"
    assert "read_summary(run)" in source.read_text()


def test_damage_that_lies_elsewhere_is_not_taken_back(run: RunDirectory, tmp_path: Path):
    other = filled_store(tmp_path / "other", small_spec())
    folder = other.place.folder
    assert folder is not None
    inside = folder.relative_to(tmp_path).as_posix()
    row = {"file": "x", "shard": 0, "chunks": [], "what": "hostile"}
    write_json(run.damage, {f"../../{inside}": [row]})
    with pytest.raises(StoreError, match="leads out of the folder"):
        take_back(run, _console())
    assert 0 in CommitLog(other.place, other.spec.digest)


def test_suggestions_that_are_none_are_refused_in_words(tmp_path: Path):
    sweep = {
        **SMALL_RUN["sweep"],
        "encoders": ["dense"],
        "search": {"method": "optuna", "trials": 2},
        "vary": {"train": {"lr": {"min": 1e-4, "max": 1e-2}}},
    }
    cfg = config_file.load(write_config(tmp_path, sweep=sweep))
    file = tmp_path / "suggested.json"
    for kept in (
        {"group": 0, "k": 8, "params": {"train.lr": "../../outside"}},
        {"group": "../../outside", "k": 8, "params": {}},
    ):
        write_json(file, [kept])
        with pytest.raises(UserError, match="is not what was suggested for this sweep"):
            Suggestions(cfg, [0, 1], 128, lambda found: pytest.fail(found.id), file, lambda: 1)


@pytest.mark.parametrize("trial", ["../../outside", "../trials", "/tmp", ".", ""])
def test_a_trial_is_named_and_no_path(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], trial: str
):
    assert main(["export", str(run.path), "--to", "safetensors", "--trial", trial]) == 2
    assert "has no finished trial of that name" in capsys.readouterr().err
    assert not run.exports.exists()


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path):
    target, link = tmp_path / "target", tmp_path / "run" / "progress.json"
    target.write_text("kept")
    link.parent.mkdir()
    link.symlink_to(target)
    write_json(link, {"new": True})
    assert target.read_text() == "kept"
    assert read_json(link) == {"new": True}
    assert not link.is_symlink()


def linked_out(folder: Path, outside: Path) -> None:
    """Put a link to another folder, which holds what would be overwritten, in the place of one."""
    outside.mkdir()
    (outside / "index.html").write_text("kept")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(outside)


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        *((["report"], "report"), (["dashboard"], "dashboard"), (["progressive"], "progressive")),
        *((["export", "--to", "safetensors"], "exports"), (["run"], "train.zarr")),
        *((["run"], "trials/linked"), (["run"], "baselines/trials")),
    ],
)
def test_a_link_in_the_place_of_a_folder_is_refused(
    run: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: list[str],
    place: str,
):
    linked_out(run.path / place, tmp_path / "outside")
    assert main([verb[0], str(run.path), *verb[1:]]) == 2
    said = capsys.readouterr().err
    assert f"{run.path / place} is a link that leads out of {run.path}" in said
    assert "delete the link" in said
    assert [file.name for file in (tmp_path / "outside").iterdir()] == ["index.html"]
    assert (tmp_path / "outside" / "index.html").read_text() == "kept"


def test_a_link_in_the_place_of_the_lock_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "outside").write_text("kept")
    (run.path / "lock").symlink_to(tmp_path / "outside")
    assert main(["report", str(run.path)]) == 2
    assert f"{run.path / 'lock'} is a link" in capsys.readouterr().err
    assert (tmp_path / "outside").read_text() == "kept"


def test_a_link_in_the_place_of_the_lock_of_a_store_elsewhere_is_refused(tmp_path: Path):
    cfg = config_file.load(
        write_config(tmp_path, harvest={**SMALL_RUN["harvest"], "store": str(tmp_path / "store")})
    )
    (tmp_path / "store").mkdir()
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "store" / "lock").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="lock is a link"):
        RunDirectory.claim(cfg)
    assert (tmp_path / "outside").read_text() == "kept"


def test_a_link_to_the_run_directory_or_within_it_is_taken(run: RunDirectory, tmp_path: Path):
    (run.path / "report").rename(run.path / "pages")
    (run.path / "report").symlink_to("pages")
    (tmp_path / "mine").symlink_to(run.path)
    (run.path / "pages" / "index.html").unlink()
    assert main(["report", str(tmp_path / "mine")]) == 0
    assert (run.path / "pages" / "index.html").is_file()


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(tmp_path: Path):
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig"}})
    )
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(InputError, match="can't be loaded"):
        describe(ModelSource(name=str(folder)))
    assert not ran.exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://somebody:hunter2hunter2@host/x",
        "https://hunter2hunter2@host/x",
        "postgresql://somebody@host/x?password=hunter2hunter2",
        "postgresql://host/x?sslmode=require&sslpassword=hunter2hunter2",
        "postgresql://host/x?pass%77ord=hunter2hunter2",
        "postgresql://host/x?sslmode=require%26password%3Dhunter2hunter2",
        "postgresql://somebody:hunter2/hunter2@host/x",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhunter2hunter2",
        *(
            "mssql+pyodbc://host/x?driver=x;PWD=hunter2hunter2",
            "mssql+pyodbc://DSN=x;PWD=hunter2hunter2/",
        ),
        "sqlite+pysqlcipher://:hunter2hunter2@/x.db",
        *(f"https://host/x?{key}=hunter2hunter2" for key in ("pwd", "sig", "auth", "credential")),
        *("https://host/x?hunter2hunter2", "https://host/x#token=hunter2hunter2"),
        *("databricks://hunter2hunter2@host", "https://me:hunter2\N{FULLWIDTH COMMERCIAL AT}host"),
    ],
)
def test_a_tracking_address_with_a_secret_is_refused_and_not_repeated(tmp_path: Path, uri: str):
    with pytest.raises(
        UserError, match="uri: it holds a password, a token, a fragment or a"
    ) as error:
        config_file.load(write_config(tmp_path, tracking={"uri": uri}))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.0.0.1:5000/mlflow", "databricks", "databricks://profile", "mlruns"),
        *(
            "sqlite:////home/me@work/mlflow.db",
            "file:///home/me@work/mlruns",
            "/home/me@work/mlruns",
        ),
        *("postgresql://me@host/x?sslmode=require", "postgresql:///x?host=/cloudsql/a:region:b"),
        "postgresql:///x?host=/var/run/postgresql&sslmode=verify-full&sslrootcert=/etc/ssl/ca.pem",
        "mysql+pymysql://host/x?charset=utf8mb4&read_default_file=~/.my.cnf",
        "mssql+pyodbc://host/x?driver=ODBC+Driver+18+for+SQL+Server&TrustServerCertificate=yes",
    ],
)
def test_a_tracking_address_without_a_secret_is_taken(uri: str):
    assert TrackingConfig(uri=uri).uri == uri


def test_the_error_that_ended_a_call_is_kept_without_secrets(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "planted-account-key")
    with pytest.raises(RuntimeError), ProgressFile.kept(run):
        raise RuntimeError("refused: planted-account-key at https://me:mine@host")
    text = run.progress.read_text()
    assert "planted" not in text
    assert "mine" not in text
    assert json.loads(text)["error"] == "refused: *** at https://***@host"


def test_a_secret_is_hidden_as_a_url_spells_it_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVICE_TOKEN", "planted/4711+")
    assert redacted("GET /?key=planted%2F4711%2B: planted/4711+") == "GET /?key=***: ***"


def test_a_password_is_hidden_as_a_request_has_it_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted")
    assert redacted("I got Basic bWU6cGxhbnRlZA==") == "I got Basic ***"


@pytest.mark.parametrize(
    "name",
    [
        *("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "APIKEY", "SECRETKEY", "HF_TOKEN", "AUTHTOKEN"),
        *("DATABASE_URL", "AZURE_STORAGE_CONNECTION_STRING", "SENTRY_DSN", "RUNNER_DATABASE_URL"),
        *("GITHUB_PAT", "SERVICE_JWT"),
    ],
)
def test_a_variable_of_this_name_is_secret(name: str):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("PWD", "OLDPWD", "PATH", "PATTERN", "KEYBOARD", "PASSENGER_APP_ENV", "MONKEY", "BYPASS"),
        *("TOKENIZERS_PARALLELISM", "COMPASS", "CONNECTION_TIMEOUT", "URL", "MLFLOW_TRACKING_URI"),
        "RAY_AUTH_TOKEN_PATH",
    ],
)
def test_a_variable_of_this_name_is_not_secret(name: str):
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://planted@host/x", "https://***@host/x"),
        ("'https://me:plan@ted@host/x'", "'https://***@host/x'"),
        ("postgresql://me:plan?ted#'x@host", "postgresql://***@host"),
        ("at https://host/@scope and me@host", "at https://host/@scope and me@host"),
    ],
)
def test_what_stands_before_the_host_of_an_address_is_hidden(text: str, told: str):
    assert redacted(text) == told


def test_secrets_of_the_environment_and_of_addresses_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret+of=aws")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-password")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "planted-nothing")
    monkeypatch.setenv("SOME_TOKEN", "1")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:mine@host/x?password=planted-too")
    told = redacted(
        "at http://me:mine@host/1 with planted/secret+of=aws, planted-password and planted-nothing, "
        "at postgresql://me:mine@host/x?password=planted-too"
    )
    assert told == "at http://***@host/1 with ***, *** and planted-nothing, at ***"
