"""The process of one rank: it joins the others of its trial, and trains with them."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] (it is documented)

from actors.bundle import Bundle
from actors.trial import Trial
from orchestrator.errors import UserError
from orchestrator.node_error import blaming_this_node
from orchestrator.shared_storage import SharedStorage
from orchestrator.sweeps.rank_grid import RankGrid
from sae.parallel import ParallelRanks
from storage.chunk_source import ChunkSource
from storage.errors import StoreError


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a process that trains is given."""

    storage: SharedStorage
    """What it must find."""

    device: str

    n_threads: int
    """Of the CPU."""

    shared: ChunkSource | None
    """Who is asked first for parts of the store that are not read in place."""

    grid: RankGrid
    """It is one of these ranks."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far the trial of a rank is."""

    step: int
    is_over: bool

    reports: dict[str, dict[str, Any]]
    """Of `Bundle.advance`."""


class RankProcess:
    """A rank. All are asked the same, in the same order; the first one's answers count."""

    def __init__(self, workplace: Workplace) -> None:
        """Do nothing yet: what a constructor raises, Ray tells as text alone."""
        self._workplace = workplace
        self._store: TCPStore | None = None
        self._ranks: ParallelRanks | None = None
        self._bundle: Bundle | None = None

    def listen(self) -> tuple[str, int]:
        """Open the place where the ranks meet: host and port, on the one address that Ray knows."""
        host = ray.util.get_node_ip_address()
        opened = socket.create_server((host, 0))  # torch itself would listen on all interfaces
        port = opened.getsockname()[1]
        self._store = TCPStore(
            *(host, port, self._workplace.grid.n_ranks),
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=opened.detach(),
        )
        return host, port

    def join(self, number: int, host: str, port: int) -> None:
        """Become one of the ranks; returns when all have.

        Raises:
            NodeError: If this process does not find the run's files.
        """
        work = self._workplace
        with blaming_this_node(UserError, StoreError):
            work.storage.check()
        # Both libraries look for an interface by the host's name, which may be none that others reach.
        interface = _interface_of(ray.util.get_node_ip_address())
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if interface:
                os.environ.setdefault(variable, interface)
        on_gpu = torch.device(work.device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(0)  # the only one that Ray lets it see
        store = self._store or TCPStore(host, port, work.grid.n_ranks)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=number, world_size=work.grid.n_ranks
        )
        self._ranks = ParallelRanks(work.grid.latents)

    def begin(self, trials: Sequence[Trial]) -> Standing:
        """Begin or continue trials, of which there is one."""
        assert self._ranks is not None, "it has joined"
        self._bundle = None  # never two in memory
        work = self._workplace
        with blaming_this_node(StoreError, OSError):
            self._bundle = Bundle(trials, work.device, work.n_threads, work.shared, self._ranks)
        return self._standing({})

    def advance(self, n_steps: int) -> Standing:
        """`Bundle.advance`.

        Raises:
            Exception: What stopped the training.
        """
        assert self._bundle is not None, "it has begun"
        with blaming_this_node(StoreError, OSError):
            reports = self._bundle.advance(n_steps)
            for failure in self._bundle.failures.values():
                raise failure
        return self._standing(reports)

    def pause(self) -> None:
        """`Bundle.pause`."""
        assert self._bundle is not None, "it has begun"
        with blaming_this_node(StoreError, OSError):
            self._bundle.pause()

    def _standing(self, reports: dict[str, dict[str, Any]]) -> Standing:
        assert self._bundle is not None
        return Standing(step=self._bundle.step, is_over=self._bundle.is_over, reports=reports)


def _interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None
