"""Object stores on this machine, and ways to them that lose, refuse, delay or count requests.

S3 is moto's server. Google's is the same one behind a proxy that takes the requests Google takes: no
server of Google's interface for XML, uploads in parts included, was found. Azure's is Microsoft's
own Azurite, which checks the signature of every request.
"""

import base64
import hashlib
import hmac
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("s3", "gs", "az")
BUCKET = "bucket"
SECRET = "planted-secret-4f1c"
"""The secret of the test's environment, which must turn up nowhere; Azure's is in base 64."""

ENVIRONMENTS = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "planted-key-id-9b2e",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    },
    "gs": {"GOOGLE_BEARER_TOKEN": SECRET},
    "az": {
        "AZURE_STORAGE_ACCOUNT_NAME": "planted3d7a",
        "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(SECRET.encode()).decode(),
    },
}
FAULTS = ("pass", "drop request", "drop answer", "cut answer", "500", "503", "slow")


@contextmanager
def object_server(scheme: str = "s3") -> Iterator[str]:
    """Its endpoint; it has one bucket."""
    if scheme == "az":
        with _azurite() as endpoint:
            yield endpoint
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        # All servers of a process hold the same buckets.
        assert _forwarded(endpoint, "POST", "/moto-api/reset", {}, b"")[0] == 200
        assert _forwarded(endpoint, "PUT", f"/{BUCKET}", {}, b"")[0] == 200
        if scheme == "s3":
            yield endpoint
        else:
            with _served(_google(endpoint)) as proxy:
                yield proxy
    finally:
        server.stop()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, scheme: str = "s3") -> None:
    """Make the URLs of `scheme` mean the server at `endpoint`, here and in child processes."""
    own = {
        "s3": {"AWS_ENDPOINT_URL": endpoint},
        "gs": {"GOOGLE_BASE_URL": endpoint},
        "az": {"AZURE_STORAGE_ENDPOINT": f"{endpoint}/{_ACCOUNT}"},
    }
    for name, value in {**ENVIRONMENTS[scheme], **own[scheme]}.items():
        monkeypatch.setenv(name, value)


class _Handler(BaseHTTPRequestHandler):
    """Takes any request whole, says nothing to the terminal."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer's body would wait for its header's receipt

    def handle_request(self) -> None:
        self.meet(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def meet(self, body: bytes) -> None:
        """Answer a request that has this body."""
        raise NotImplementedError

    def respond(
        self,
        status: int,
        headers: list[tuple[str, str]],
        answer: bytes = b"",
        n_bytes: int | None = None,
    ) -> None:
        """Send an answer, or the first `n_bytes` of it and hang up."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer[:n_bytes])
        self.close_connection = n_bytes is not None

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def disturbed(endpoint: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Another endpoint of the same server, where half of the requests meet a fault.

    Every twelve requests meet each fault once, in an order that the seed decides. The list says what
    was done so far.
    """
    done: list[str] = []
    plan = _plan(random.Random(seed))
    lock = threading.Lock()

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            with lock:
                fault = next(plan)
                done.append(fault)
            if fault == "drop request":
                self.close_connection = True
                return
            if fault in ("500", "503"):
                self.respond(int(fault), [("Content-Length", "0")])
                return
            if fault == "slow":
                time.sleep(0.2)
            status, headers, answer = _forwarded(
                endpoint, self.command, self.path, self.headers, body
            )
            if fault == "drop answer":
                self.close_connection = True
                return
            cut = len(answer) // 2 if fault == "cut answer" and answer else None
            self.respond(status, headers, answer, cut)

    with _served(Handler) as proxy:
        yield proxy, done


@contextmanager
def forgetful(endpoint: str) -> Iterator[tuple[str, list[str]]]:
    """Another endpoint of the same server, which loses the first answer to "put the parts together".

    The list says what was asked for then.
    """
    lost: list[str] = []

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            answer = _forwarded(endpoint, self.command, self.path, self.headers, body)
            completes = self.command == "POST" and "uploadId=" in self.path
            if not lost and (completes or "comp=blocklist" in self.path):
                lost.append(self.path)
                self.close_connection = True
            else:
                self.respond(*answer)

    with _served(Handler) as proxy:
        yield proxy, lost


@contextmanager
def counted(endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """Another endpoint of the same server, and the bytes of every body that was asked for through it."""
    fetched: list[int] = []

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            status, headers, answer = _forwarded(
                endpoint, self.command, self.path, self.headers, body
            )
            if self.command in ("GET", "HEAD"):
                fetched.append(len(answer))
            self.respond(status, headers, answer)

    with _served(Handler) as proxy:
        yield proxy, fetched


@contextmanager
def refusable(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """Another endpoint of the same server, which refuses everything once the event is set."""
    refuses = threading.Event()

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            if refuses.is_set():
                self.respond(403, [("Content-Length", "0")])
            else:
                asked = (self.command, self.path, self.headers, body)
                self.respond(*_forwarded(endpoint, *asked))

    with _served(Handler) as proxy:
        yield proxy, refuses


@contextmanager
def refusing_server(status: int) -> Iterator[str]:
    """An endpoint that answers everything with `status`, and repeats the key it was given."""

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            sent = self.headers["Authorization"]
            answer = f"<Error><Code>Refused</Code><Sent>{sent}</Sent></Error>".encode()
            self.respond(status, [("Content-Length", str(len(answer)))], answer)

    with _served(Handler) as endpoint:
        yield endpoint


def _google(endpoint: str) -> type[BaseHTTPRequestHandler]:
    """Takes requests as Google Cloud Storage does, and has an S3 server answer them.

    Google's has a token instead of a signature, and an object's whole name in one part of the path.
    """

    class Handler(_Handler):
        def meet(self, body: bytes) -> None:
            if self.headers["Authorization"] != f"Bearer {SECRET}":
                self.respond(401, [("Content-Length", "0")])
                return
            path = self.path.replace("%2F", "/")
            headers = {**dict(self.headers), "authorization": _ANY_SIGNATURE}
            self.respond(*_forwarded(endpoint, self.command, path, headers, body))

    return Handler


@contextmanager
def _azurite() -> Iterator[str]:
    places = [str(ROOT / ".azurite" / "node_modules" / ".bin"), os.environ.get("PATH", "")]
    program = shutil.which("azurite-blob", path=os.pathsep.join(places))
    if program is None:
        pytest.skip("needs Azurite: npm install --prefix .azurite azurite")
    command = [program, "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry"]
    account = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{ENVIRONMENTS['az']['AZURE_STORAGE_ACCOUNT_KEY']}"}
    with subprocess.Popen(
        [*command, "--silent"], env={**os.environ, **account}, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            said = next(line for line in server.stdout if "successfully listens on" in line)
            endpoint = said.split()[-1]
            path = f"/{_ACCOUNT}/{BUCKET}"
            made = _forwarded(
                endpoint, "PUT", f"{path}?restype=container", _azure_signature(path), b""
            )
            assert made[0] == 201, made
            yield endpoint
        finally:
            server.terminate()


def _azure_signature(path: str) -> dict[str, str]:
    """Headers that make a container at `path`: Azure's "Shared Key" over an empty PUT."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = [
        "PUT",
        *[""] * 11,
        *(f"{name}:{value}" for name, value in headers.items()),
        f"/{_ACCOUNT}{path}",
        "restype:container",
    ]
    digest = hmac.digest(SECRET.encode(), "\n".join(signed).encode(), hashlib.sha256)
    return {
        **headers,
        "Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()


def _plan(draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample([*FAULTS[1:], *["pass"] * len(FAULTS[1:])], 2 * len(FAULTS[1:]))


def _forwarded(
    endpoint: str, method: str, path: str, headers: object, body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body of the server's own answer."""
    connection = HTTPConnection(endpoint.removeprefix("http://"), timeout=60)
    passed = {name: value for name, value in dict(headers).items() if name.lower() != "connection"}
    connection.request(method, path, body=body, headers=passed)
    answer: HTTPResponse = connection.getresponse()
    content = answer.read()
    given = [(n, v) for n, v in answer.getheaders() if n.lower() not in _HOP_BY_HOP]
    if method != "HEAD":
        given.append(("Content-Length", str(len(content))))
    else:
        given += [(n, v) for n, v in answer.getheaders() if n.lower() == "content-length"]
    connection.close()
    return answer.status, given, content


_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}
_ACCOUNT = ENVIRONMENTS["az"]["AZURE_STORAGE_ACCOUNT_NAME"]
_ANY_SIGNATURE = "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request"
