"""Processes that form a torch.distributed group over gloo, and do what tests ask of all of them."""

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_SECONDS = 240


class RankProcesses:
    """`n` real processes; a job is a function that every one of them calls."""

    def __init__(self, n: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(n)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=_serve, args=(theirs, rank, n, folder / f"group{n}"), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def __call__(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned; the first rank's error, if one failed."""
        for end in self._ends:
            end.send((job, args))
        answers = []
        for end in self._ends:
            assert end.poll(START_SECONDS), "a rank does not answer"
            answers.append(pickle.loads(end.recv()))
        for failed, answer in answers:
            if failed:
                raise AssertionError(f"a rank failed:\n{answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Let them end."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(30)


def _serve(end: Connection, rank: int, n: int, meeting: Path) -> None:
    import traceback

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n)
    while True:
        try:
            job, args = end.recv()
        except EOFError:
            break
        try:
            answer = False, job(*args)
        except Exception:  # noqa: BLE001 - it is told to the test
            answer = True, traceback.format_exc()
        end.send(pickle.dumps(answer))
    dist.destroy_process_group()
