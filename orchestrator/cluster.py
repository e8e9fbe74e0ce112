"""Ray: connecting."""

import logging
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError, ObjectStoreFullError, OutOfDiskError

from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
from orchestrator.redaction import redacted

CONNECT_SECONDS = 10.0
MOST_SILENT = 4
"""Times in a row that the head is looked for in vain before that is told."""

_LOOK_SECONDS = 5.0

STARTS = 3
"""Times that Ray is started on this machine; a busy one can miss the 30 s that Ray gives itself."""

OBJECT_STORE_BYTES = 256 * 2**20
"""For receipts and configurations. Activations are in it only where trials share what they read."""


@contextmanager
def connected(cfg: ComputeConfig, shared_bytes: int = 0) -> Iterator[None]:
    """A Ray cluster for the time inside: a private one, or the one at `cfg.address`.

    Args:
        cfg: Which one, and what actors ask for.
        shared_bytes: Room for activations in a private one's object store.

    Raises:
        UserError: If no cluster answers at the address, or the object store is full.
    """
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        if cfg.address:
            address = _looked_up(cfg.address)
            _check_answers(address)
            _join(address)
        else:
            _start(cfg.cpus, OBJECT_STORE_BYTES + shared_bytes)
        # Ray has put a handler in its place that prints a stack of addresses.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with _watching_the_head():
            yield
    except AuthenticationError as error:
        if cfg.address:
            raise _needs_token(cfg.address, error) from None
        raise UserError(
            f"Ray can't start on this machine as its environment asks ({error}); correct RAY_AUTH_TOKEN_PATH, or "
            "unset RAY_AUTH_MODE: a private Ray makes a token of its own"
        ) from None
    except SystemExit:  # what Ray makes of SIGTERM while it starts
        raise KeyboardInterrupt from None
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise UserError(
            "the cluster's object store is full, and so is the disk that Ray moves its objects to; a run puts little "
            "there, so others have filled it: end what else works on the cluster (`ray status`, `ray job list`), or "
            f"start nodes with more (`ray start --object-store-memory`) ({str(error).strip().splitlines()[0]})"
        ) from None
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _watching_the_head() -> Iterator[None]:
    """Say so if it is gone: Ray then ends the process from within, without a word that a user understands."""
    address, over = ray.get_runtime_context().gcs_address, Event()
    host, port = services.parse_address(address)  # pyright: ignore

    def watch() -> None:
        n_silent = 0
        while not over.wait(_LOOK_SECONDS):
            try:
                socket.create_connection((host, int(port)), timeout=_LOOK_SECONDS).close()
                n_silent = 0
            except OSError as error:
                n_silent += 1
                if n_silent == MOST_SILENT and not over.is_set():
                    sys.stderr.write(
                        f"strata: the head of Ray, at {address}, can't be reached any more ({error}). Unless it comes "
                        "back Ray will end this command; then the same command goes on where this one stopped\n"
                    )

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _join(address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        ray.shutdown()
        if "ersion mismatch" in str(error):
            raise UserError(
                f"compute.address: the cluster at {address} has another Ray or Python than this process, and "
                f"all take the same: install the versions of one side on the other. {error}"
            ) from None
        if isinstance(error.__cause__, RuntimeError):  # the cluster answered, but has no files here
            raise UserError(
                f"compute.address: this machine is no node of the cluster at {address}, and a run is driven "
                "from one: give the command on a node (`ray attach`), or send the run there with `strata "
                "submit`"
            ) from None
        raise UserError(_no_cluster(address, error)) from None


def _start(cpus: int | None, object_store_bytes: int) -> None:
    for attempt in range(STARTS):
        try:
            with _on_loopback():
                ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        except Exception as error:  # Ray has no class of its own for it
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if attempt == STARTS - 1:
                raise UserError(
                    f"Ray did not start within 30 s, {STARTS} times over; it starts in seconds on a "
                    "machine with a core and 2 GiB of memory to spare: end other work, then give "
                    "the same command"
                ) from None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that is started inside listen on this machine alone.

    On Linux its servers listen on all interfaces, and whoever reaches them may run code; `ray.init` turns
    an address of 127.0.0.1 back into the machine's own. This is what Ray does itself on other systems.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _refuse_client(address: str) -> None:
    if "://" in address:
        raise UserError(
            f"compute.address: {redacted(address)} is a way to a cluster from outside, and a run is driven from one of "
            "its nodes: `strata submit --address http://HOST:8265` sends it there; on a node give auto, or "
            "HOST:PORT"
        )


def _looked_up(address: str) -> str:
    """What `auto` means on this machine, as Ray looks it up; another address as it is."""
    if address == "auto":
        try:
            address = services.get_ray_address_from_environment(address, None)
        except ConnectionError as error:
            raise UserError(_no_cluster(address, error)) from None
    if address == "local":  # Ray would start one of its own, which listens beyond this machine
        raise UserError(
            "compute.address: auto takes what RAY_ADDRESS names, and that is local, which is no cluster; unset "
            "RAY_ADDRESS, or leave the address out to use this machine alone"
        )
    _refuse_client(address)
    return address


def _check_answers(address: str) -> None:
    """Ask the port itself first, then whether it is Ray's: Ray would go on trying for minutes."""
    try:
        if not re.fullmatch(r".+:\d+", address):
            raise ValueError
        # Where Ray will look for it: of 127.0.0.1 it makes the machine's own address.
        there = services.canonicalize_bootstrap_address(address) or address
        host, port = services.parse_address(there)  # pyright: ignore[reportPrivateImportUsage]
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except ValueError:
        raise UserError(_no_cluster(address, "it is no HOST:PORT")) from None
    except OSError as error:
        raise UserError(_no_cluster(address, error)) from None
    channel: Any = init_grpc_channel(there, ray_constants.GLOBAL_GRPC_OPTIONS)
    try:
        question = gcs_service_pb2.GetClusterIdRequest()  # pyright: ignore[reportAttributeAccessIssue]
        ask = NodeInfoGcsServiceStub(channel).GetClusterId
        ask(question, timeout=CONNECT_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise _needs_token(address, details) from None
        silence = f"what listens there does not answer as Ray does within {CONNECT_SECONDS:.0f} s"
        raise UserError(_no_cluster(address, f"{silence}: {code.name}")) from None
    finally:
        channel.close()


def _needs_token(address: str, error: object) -> UserError:
    return UserError(
        f"compute.address: the cluster at {address} takes no driver without its token ({error}); set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds it"
    )


def _no_cluster(address: str, error: object) -> str:
    return (
        f"compute.address: no Ray cluster at {address} ({error}); start one with "
        "`ray start --head`, or leave the address out to use this machine alone"
    )
