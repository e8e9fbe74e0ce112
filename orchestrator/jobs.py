"""A run as a job of a running cluster: sent, followed, left alone, found again (Ray's Jobs API).

Nothing of this machine's environment is sent: what a runtime environment holds, Ray writes into its logs.
"""

import asyncio
import hashlib
import json
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray._private import ray_constants
from ray._private.runtime_env import packaging
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from orchestrator import config_file
from orchestrator.errors import UserError
from orchestrator.redaction import redacted
from orchestrator.versions import check_same, versions

ANSWER_SECONDS = 10.0
"""That a cluster has for an answer."""

LOST_SECONDS = 60.0
"""Without any answer, after which a job is followed no longer."""

SILENCE_SECONDS = 15.0
"""Of a log, after which is asked whether the job is still there."""

SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", ".pgpass", ".my.cnf", ".mylogin.cnf"),
    *(".aws", ".azure", ".boto", ".s3cfg", "application_default_credentials.json"),
    *(".databrickscfg", ".docker", ".git-credentials", ".npmrc", ".pypirc", ".terraformrc"),
    *(".gnupg", ".kube", "kubeconfig", ".ray", ".ssh", ".vault-token"),
    *("id_dsa", "id_ecdsa", "id_ed25519", "id_rsa", "*.key", "*.p12", "*.pem", "*.pfx"),
)
"""Files and folders that mostly hold secrets; the launcher's files name them too."""

NEVER_SENT = ("/runs", *SECRET_FILES)
"""Beside what .gitignore names, and .git and environments, which Ray leaves out."""

for _module in (sdk, dashboard_sdk, packaging):
    logging.getLogger(_module.__name__).setLevel(logging.ERROR)  # after they have set it themselves

_NO_ANSWER = (aiohttp.ClientError, OSError, RuntimeError)
"""`TimeoutError` and all errors of `requests` are OSErrors; RuntimeError is what Ray says of a bad answer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run that is to be made on a cluster."""

    file: Path
    """Its configuration, in YAML."""

    overrides: tuple[str, ...]
    """As of `config_file.load`."""

    folder: Path | None
    """Sent with all that is in it, to be the working directory; None: the file alone is sent, and the code is
    what is installed there."""

    run_dir: str
    settings: str
    """A digest of all of them."""

    @classmethod
    def of(cls, config: Path, overrides: Sequence[str], folder: Path | None) -> "Request":
        """Of a YAML file, or a run directory.

        Raises:
            UserError: Naming what can't be read, or can't be on another machine.
        """
        cfg, file = config_file.read(config, overrides)
        for setting, path in (("run_dir", str(cfg.run_dir)), ("harvest.store", cfg.harvest.store)):
            if path is not None and "://" not in path and not path.startswith("/"):
                raise UserError(
                    f"{setting}: {path} is relative, and on a cluster there is nothing that it could be "
                    f"relative to; give the folder as its nodes see it, for instance --set {setting}=/shared/mine"
                )
        database = cfg.tracking.sqlite_file
        if database is not None and not database.is_absolute():
            raise UserError(
                f"tracking.uri: {cfg.tracking.uri} is relative, and on a cluster there is nothing that it could be relative to; "
                "give the file as its nodes see it, for instance --set tracking.uri=sqlite:////shared/mlflow.db"
            )
        if folder is not None and not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{file} lies outside {folder}, which is what is sent; give the command in a folder "
                "that holds it, or --image to send the file alone"
            )
        if folder is not None and not _is_sent(file.resolve(), folder.resolve()):
            raise UserError(
                f"{file} is not sent with {folder}: a .gitignore or .rayignore names it, or it lies in runs or is "
                f"of a kind that is never sent; copy it to where it is sent (`cp {shlex.quote(str(file))} run.yaml`) and submit that, or "
                "give --image to send the file alone"
            )
        return cls(
            file=file,
            overrides=tuple(overrides),
            folder=folder,
            run_dir=str(cfg.run_dir),
            settings=hashlib.sha256(config_file.dump(cfg).encode()).hexdigest()[:16],
        )


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Ask whether it is there.

        Args:
            address: Of its dashboard, which takes jobs: `http://HOST:8265`.

        Raises:
            UserError: If no cluster answers there within ANSWER_SECONDS, it wants a token, or it has another Ray.
        """
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise UserError(
                f"--address: {address!r} is not where a cluster takes jobs; that is its dashboard: give "
                "http://HOST:8265"
            )
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # which Ray would prefer to an argument
        with self._answering():
            self._client = _Client(self.address)
        there = {"ray": self._client.ray_version}
        check_same(versions(), there, f"the cluster at {self.address} has")

    def at_work(self, request: Request) -> str | None:
        """The job that makes this run now, None if there is none.

        Raises:
            UserError: If its settings are others, or the cluster gives no answer.
        """
        with self._answering():
            jobs = self._client.list_jobs()
        for job in jobs:
            told = job.metadata or {}
            if job.type is not JobType.SUBMISSION or job.status.is_terminal():
                continue
            if told.get("run_dir") == request.run_dir:
                assert job.submission_id is not None
                if told.get("settings") != request.settings:
                    raise UserError(
                        f"run_dir: {request.run_dir} is at work already, with other settings, as job "
                        f"{job.submission_id}; stop that with `{self.stopping(job.submission_id)}`, or set another "
                        "run_dir"
                    )
                return job.submission_id
        return None

    def submit(self, request: Request) -> str:
        """Send a run; returns the job's name.

        Raises:
            UserError: If it can't be sent.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder, file = request.folder, request.file
            if folder is None:
                folder = Path(scratch)
                file = Path(shutil.copy(file, folder / "run.yaml"))
            here = " ".join(f"{name}={found}" for name, found in versions().items())
            command = [
                *("python", "-m", "orchestrator", "run"),
                str(file.resolve().relative_to(folder.resolve())),
                *("--address", "auto", "--from-client", here),
                *(part for override in request.overrides for part in ("--set", override)),
            ]
            try:
                return self._client.submit_job(
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": str(folder), "excludes": list(NEVER_SENT)},
                    metadata={"run_dir": request.run_dir, "settings": request.settings},
                )
            except (*_NO_ANSWER, ValueError) as error:
                raise UserError(
                    f"{folder} could not be sent to {self.address} ({redacted(str(error))}); name what need not be "
                    "sent in .gitignore or .rayignore, or send the configuration alone, with --image"
                ) from None

    def follow(self, job: str, write: Callable[[str], Any]) -> JobDetails | None:
        """Write a job's log as it grows, until the job ends; None if the cluster was lost meanwhile.

        A connection that breaks is made again, and what was written is not written twice.
        """
        log, answered = _Log(self._client, job, write), time.monotonic()
        while time.monotonic() - max(answered, log.heard) < LOST_SECONDS:
            ended = False
            with suppress(*_NO_ANSWER):  # the next question tells
                ended = asyncio.run(log.show())
            try:
                details = self._client.get_job_info(job)
            except _NO_ANSWER:
                time.sleep(1)
                continue
            answered = time.monotonic()
            if details.status.is_terminal():
                with suppress(*_NO_ANSWER):
                    _ = ended or asyncio.run(log.show())
                return details
            time.sleep(1)
        return None

    def stopping(self, job: str) -> str:
        """The command that stops a job."""
        return f"ray job stop --address {self.address} {job}"

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say of a cluster that does not answer a question inside, or not to us, what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"--address: the cluster at {self.address} takes no jobs without its token; set "
                f"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds it ({error.message})"
            ) from None
        except json.JSONDecodeError as error:  # of the library's, too, which is an OSError
            raise self._no_dashboard(error) from None
        except _NO_ANSWER as error:
            raise UserError(
                f"--address: no Ray cluster answers at {self.address} within {ANSWER_SECONDS:.0f} s "
                f"({redacted(str(error))}); give the address of its dashboard, and make it reachable from here: "
                "`ray dashboard cluster.yaml`, or `kubectl port-forward service/NAME-head-svc 8265`, left running, "
                "bring it to http://127.0.0.1:8265"
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise self._no_dashboard(error) from None

    def _no_dashboard(self, error: Exception) -> UserError:
        return UserError(
            f"--address: what answers at {self.address} does not answer as Ray's dashboard does "
            f"({type(error).__name__}: {redacted(str(error))}); give the address of a Ray cluster's dashboard"
        )


class _Client(JobSubmissionClient):
    """Ray's own, which would wait for an answer for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **{"timeout": ANSWER_SECONDS, **kwargs})

    @property
    def ray_version(self) -> str:
        """Of the cluster, as it said when it was first asked."""
        assert self._server_ray_version is not None
        return self._server_ray_version


class _Log:
    """A job's log, and how much of it was written."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> None:
        self._client, self._job, self._write = client, job, write
        self._n_written = 0
        self.heard = time.monotonic()
        """When the cluster answered last."""

    async def show(self) -> bool:
        """Write what is new, until the job ends (True) or the log is to be asked for anew (False).

        Raises:
            Exception: One of `_NO_ANSWER`, if the cluster is cut off.
        """
        n_read = 0
        async with aclosing(self._client.tail_job_logs(self._job)) as parts:  # pyright: ignore
            while True:
                coming = asyncio.ensure_future(anext(parts))
                try:
                    if not await self._comes(coming):
                        return False
                    part = coming.result()
                except StopAsyncIteration:
                    return True
                finally:
                    coming.cancel()
                    await asyncio.wait({coming})
                self.heard = time.monotonic()
                n_read += len(part)
                if n_read > self._n_written:
                    self._write(part[self._n_written - n_read :])
                    self._n_written = n_read

    async def _comes(self, part: "asyncio.Future[str]") -> bool:
        """Whether a part comes; not if the job has ended, or for so long that the connection may be a dead one."""
        since = time.monotonic()
        while time.monotonic() - since < LOST_SECONDS:
            if (await asyncio.wait({part}, timeout=SILENCE_SECONDS))[0]:
                return True
            if self._client.get_job_info(self._job).status.is_terminal():
                break
            self.heard = time.monotonic()
        return False


def _is_sent(file: Path, folder: Path) -> bool:
    """Whether Ray packs a file when it packs a folder: it asks the same of every folder on the way.

    Raises:
        UserError: If a .gitignore or .rayignore there holds what Ray can't read.
    """
    never = [*ray_constants.get_runtime_env_default_excludes(), *NEVER_SENT]
    by_git = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    excluded = [packaging._get_excludes(folder, never)]
    for path in (p for p in reversed((file, *file.parents)) if p.is_relative_to(folder)):
        try:
            excluded += packaging.get_excludes_from_ignore_files(path, include_gitignore=by_git)
        except (OSError, ValueError, IndexError) as error:  # the last of a line such as a bare !
            raise UserError(
                f"{path}: Ray can't read the .gitignore or .rayignore there ({error}); correct it, or give --image "
                "to send the file alone"
            ) from None
        if any(excludes(path) for excludes in excluded):
            return False
    return True


def outcome(details: JobDetails) -> tuple[int, Sequence[str]]:
    """The exit status of a job that has ended, and what is left to be said of it."""
    if details.status == "SUCCEEDED":
        return 0, ()
    if details.status == "STOPPED":
        return 1, ("was stopped; the same command continues the run",)
    code = details.driver_exit_code
    if code is None:  # it never began, or its node is gone; the log has nothing of it
        why = redacted(details.message or "Ray does not say why").strip()
        return 1, (f"failed: {why}\nthe same command continues the run",)
    return (code if code > 0 else 1), (f"ended with exit status {code}; the reason stands above",)
