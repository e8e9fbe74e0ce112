"""A real S3 server on this machine (moto's), and a way to it that loses, refuses and delays requests."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
SECRET = "planted-secret-4f1c"
"""The secret key of the test's environment, which must turn up nowhere."""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "planted-key-id-9b2e",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
}
FAULTS = ("pass", "drop request", "drop answer", "cut answer", "500", "503", "slow")


@contextmanager
def object_server() -> Iterator[str]:
    """Its endpoint; it has one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}", headers={"Host": f"{host}:{port}"})
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make `s3://` mean the server at `endpoint`, here and in child processes."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


@contextmanager
def disturbed(endpoint: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Another endpoint of the same server, where half of the requests meet a fault.

    Every twelve requests meet each fault once, in an order that the seed decides. The list says what
    was done so far.
    """
    done: list[str] = []
    plan = _plan(random.Random(seed))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            with lock:
                fault = next(plan)
                done.append(fault)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault == "drop request":
                self._hang_up()
                return
            if fault in ("500", "503"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "slow":
                time.sleep(0.2)
            status, headers, answer = _forwarded(
                endpoint, self.command, self.path, self.headers, body
            )
            if fault == "drop answer":
                self._hang_up()
                return
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if fault == "cut answer" and answer:
                self.wfile.write(answer[: len(answer) // 2])
                self._hang_up()
            else:
                self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

        def _hang_up(self) -> None:
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _served(Handler) as proxy:
        yield proxy, done


@contextmanager
def counted(endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """Another endpoint of the same server, and the bytes of every body that was fetched through it."""
    fetched: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, answer = _forwarded(
                endpoint, self.command, self.path, self.headers, body
            )
            if self.command == "GET":
                fetched.append(len(answer))
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _served(Handler) as proxy:
        yield proxy, fetched


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


@contextmanager
def refusing_server(status: int) -> Iterator[str]:
    """An endpoint that answers everything with `status`, and repeats the key it was given."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = (
                f"<Error><Code>Refused</Code><Sent>{self.headers['Authorization']}</Sent></Error>"
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


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
