"""What the command line says when a user is wrong: what is, what was allowed, what to do; exit 2."""

import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.__main__ import VERBS, main
from tests.runs import ROOT, strata, write_config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that must be refused."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2, captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def test_help_answers_without_loading_torch():
    code = (
        "import sys\nfrom orchestrator.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for verb in (*VERBS, "demo", "runs", "ui"):
        assert verb in result.stdout


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    text = refusal(capsys, "run", tmp_path / "no.yaml")
    assert "no.yaml does not exist; strata takes a YAML file or a run directory" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("harvest.tokns=3", "harvest.tokns: is not a setting; did you mean tokens?"),
        ("harvest.tokens=lots", "harvest.tokens: 'lots' should be a valid integer"),
        ("sweep.k=[8,257]", "sweep.k[1]: 257 exceeds d_sae = 256; lower k or widen the dictionary"),
        ("sweep.encoders=[{h: 8, m: 4, n: 4}]", "h*m*n = 8*4*4 = 128 is not d_sae = 256"),
        ("compute.gpus_per_actor=1.5", "compute.gpus_per_actor: 1.5"),
        ("harvest.context=9999", "harvest.context: 9999 is beyond the 256 positions"),
        ("hygiene.drop_first_positions=256", "drops every position of a context of 256"),
        ("group.n_groups=8", "group.n_groups: 8 groups need as many layers"),
    ],
)
def test_a_setting_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, expected: str
):
    text = refusal(capsys, "plan", write_config(tmp_path), "--set", override)
    assert expected in text
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_the_disk_has_no_room_for(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    text = refusal(capsys, "run", write_config(tmp_path), "--set", "harvest.tokens=1e12")
    assert "the plan needs" in text
    assert "TB" in text
    assert "lower harvest.tokens" in text
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_fits_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["plan", str(write_config(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert "60,180 x 2 groups" in text
    assert "per harvester" in text


def test_a_model_folder_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        source = ROOT / "examples" / "tiny_lm" / "model" / name
        (folder / name).write_bytes(source.read_bytes())
    text = refusal(capsys, "run", write_config(tmp_path, model={"name": str(folder)}))
    assert str(folder) in text
    assert "weights" in text


def test_a_model_that_the_hub_cannot_be_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    start = time.monotonic()
    text = refusal(capsys, "run", write_config(tmp_path, model={"name": "nobody/no-such-model"}))
    assert "nobody/no-such-model" in text
    assert "folder" in text
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"caf\xe9 au lait", "UTF-8"), (b"one short text", "tokens")],
    ids=["not-utf8", "too-small"],
)
def test_a_text_file_that_gives_no_corpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, expected: str
):
    text_file = tmp_path / "text.txt"
    text_file.write_bytes(content)
    corpus = {"source": "files", "paths": [str(text_file)]}
    text = refusal(capsys, "run", write_config(tmp_path, corpus=corpus))
    assert expected in text
    assert expected == "tokens" or str(text_file) in text


def test_a_tracking_server_that_does_not_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = write_config(tmp_path)
    text = refusal(capsys, "run", config, "--set", "tracking.uri=http://127.0.0.1:9")
    assert "tracking.uri: http://127.0.0.1:9 does not answer" in text
    assert "Connection refused" in text
    assert "leave tracking.uri out to use a local file" in text


def test_a_tracking_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = write_config(tmp_path)
    text = refusal(capsys, "run", config, "--set", "tracking.uri=sqlite:////proc/x.db")
    assert "tracking.uri: /proc/x.db can't be written" in text


class NoAccess(BaseHTTPRequestHandler):
    """Refuses every request as a server with access control does, or a proxy before it."""

    status, body = 401, b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("http://somebody:secret@127.0.0.1:9", "it holds a password, a token"),
        ("postgresql://somebody:secret@127.0.0.1:9/x", "it holds a password, a token"),
        ("sqlite://", "sqlite:// names no file"),
        ("mysql://127.0.0.1:9/x", "does not answer (No module named 'MySQLdb')"),
    ],
)
def test_a_tracking_uri_that_can_not_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, uri: str, told: str
):
    config = write_config(tmp_path)
    text = refusal(capsys, "run", config, "--set", f"tracking.uri={uri}")
    assert "tracking.uri: " in text
    assert told in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, "You are not authenticated", "refuses access"),
        (403, "Permission denied", "refuses access"),
        (401, '{"detail": "Not authenticated"}', "answers with an error"),
    ],
)
def test_a_tracking_server_that_refuses_the_credentials(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    status: int,
    body: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    config = write_config(tmp_path)
    handler = type("Handler", (NoAccess,), {"status": status, "body": body.encode()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        text = refusal(capsys, "run", config, "--set", f"tracking.uri={uri}")
        listed = refusal(capsys, "runs", write_config(tmp_path, tracking={"uri": uri}))
        server.shutdown()
    assert f"tracking.uri: http://127.0.0.1:{server.server_port} {expected}" in text
    for message in (text, listed):
        assert str(status) in message or body in message.replace("'", '"')
        assert "MLFLOW_TRACKING_USERNAME" in message
        assert "secret" not in message
    assert "Nothing was started" in text
    assert not (tmp_path / "runs" / "small" / "tokens.zarr").exists()


@pytest.mark.ray
@pytest.mark.parametrize("query", ["params.k > 3", "fvu =", "metrics.fvu < 1 or metrics.l0 < 3"])
def test_a_filter_that_mlflow_does_not_take(
    capsys: pytest.CaptureFixture[str], finished: tuple[Path, str], query: str
):
    text = refusal(capsys, "runs", finished[0], "--trials", "--filter", query)
    assert f"--filter: {query!r} is no search that MLflow takes" in text
    assert "params.k = '16' and metrics.final_fvu < 0.1" in text


def test_a_cluster_that_does_not_answer(tmp_path: Path):
    status, output = strata("run", write_config(tmp_path, compute={"address": "127.0.0.1:9"}))
    assert status == 2, output
    assert "compute.address: no Ray cluster at 127.0.0.1:9" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("verb", ["runs", "ui"])
def test_a_store_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str):
    text = refusal(capsys, verb, write_config(tmp_path))
    assert "mlflow.db does not exist, so there are no runs here yet" in text


@pytest.mark.parametrize("verb", ["runs", "ui"])
def test_an_address_without_a_scheme_is_refused_by_who_asks_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
):
    text = refusal(capsys, verb, write_config(tmp_path, tracking={"uri": "localhost:5000"}))
    assert "write http://localhost:5000 or https://localhost:5000" in text


def test_a_port_that_is_in_use(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = write_config(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = refusal(capsys, "ui", config, "--port", str(port))
    assert f"port {port} is in use; give another with --port" in text


def test_a_report_of_a_run_that_is_not_finished(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "holds no finished run" in refusal(capsys, "report", write_config(tmp_path))


def test_a_python_without_the_libraries_says_so():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "orchestrator", "status", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert " has no rich, which Strata needs; install" in done.stderr
    assert "Traceback" not in done.stderr
