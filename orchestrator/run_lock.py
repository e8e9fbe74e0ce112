"""One process at a time works on a run directory; a lock that a dead one left is no lock."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from orchestrator.errors import UserError

_held: dict[Path, IO[str]] = {}


def hold(folder: Path) -> None:
    """Keep every other process from working on `folder`, for as long as this one lives.

    The lock is the system's, on the file `lock`: it ends with the process, however that ends. It
    belongs to the process and not to the file handle, so that children do not inherit it.

    Raises:
        UserError: If another process has it.
        OSError: If the folder can't be written.
    """
    path = (folder / "lock").resolve()
    if path in _held:
        return
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise UserError(
            f"{folder} is at work already, by {holder}; one process at a time may write a run: wait "
            "for it, stop it, or set another run_dir"
        ) from None
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    _held[path] = file


def _holder(text: str) -> str:
    try:
        told = json.loads(text)
        return f"process {told['pid']} on {told['host']}"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
