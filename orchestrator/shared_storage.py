"""The run directory on a cluster: every node has to see the same one.

No path can tell: `/data` may be a mount on one node and a disk on the next. So it is looked up. The
driver's lock says who drives the run, and that is what has to be read at the same path elsewhere: on
every node before it is relied on (`orchestrator.admission`), and in every process that is started.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from orchestrator import run_lock
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory
from orchestrator.versions import check_same, versions
from storage.places import Place, place


@dataclass(frozen=True, kw_only=True)
class SharedStorage:
    """What every process of a run must find: its files, and its version of Strata."""

    folder: Path
    """The run directory."""

    driver: run_lock.Holder
    """Who holds its lock."""

    store: Place | None
    """Where activations lie, if that is elsewhere."""

    config: bytes
    """The configuration in both."""

    strata: dict[str, str]
    """The driver's version of it."""

    @classmethod
    def of(cls, run: RunDirectory) -> "SharedStorage":
        """Of a run that this process drives."""
        driver = run_lock.holder(run.path)
        assert driver is not None, "the run directory is claimed before others are asked for it"
        return cls(
            folder=run.path,
            driver=driver,
            store=None if run.store == place(run.path) else run.store,
            config=run.config.read_bytes(),
            strata=_strata(),
        )

    def check(self) -> None:
        """See whether this process finds it all.

        Raises:
            UserError: If not.
            StoreError: If the store gives no answer.
        """
        node = socket.gethostname()
        if run_lock.last_holder(self.folder) != self.driver:
            raise UserError(_not_shared("run_dir", str(self.folder), node, self.driver["host"]))
        if not os.access(self.folder, os.W_OK):
            raise UserError(
                f"run_dir: {self.folder} can't be written on {node}; every node writes there: mount "
                "it for writing, for the user that Ray runs as"
            )
        if self.store is not None:
            try:
                found = self.store.hasty.read("config.yaml")
            except FileNotFoundError:
                found = None
            if found is None:
                raise UserError(
                    _not_shared("harvest.store", str(self.store), node, self.driver["host"])
                )
            if found != self.config:
                raise UserError(
                    f"harvest.store: {self.store}, as seen on node {node}, belongs to another run than that of "
                    f"{self.folder}: either two runs write there, or nodes do not see the same; give each run a "
                    "harvest.store of its own, on storage that all nodes share"
                )
        check_same(_strata(), self.strata, f"on {self.driver['host']}, which drives the run,")


def _strata() -> dict[str, str]:
    """Ray itself sees to the others."""
    return {name: found for name, found in versions().items() if name == "strata"}


def _not_shared(setting: str, path: str, node: str, driver: str | None) -> str:
    return (
        f"{setting}: {path} on node {node} is not what it is on {driver}, which drives the run; every "
        "node has to see the same folder: put it where all nodes mount shared storage (NFS, EFS, "
        "Filestore, a volume), and activations in a bucket if you like (harvest.store); then set "
        f"{setting} to that"
    )
