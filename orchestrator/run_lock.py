"""One process at a time works on a run directory; a lock that a dead one left is no lock."""

import errno
import fcntl
import json
import os
import socket
import struct
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import UserError

Holder = dict[str, Any]
"""`pid` and `host` of a process, both None if unknown."""

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
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(
                f"{folder} is where files can't be locked ({error.strerror}), and one process at a time may write a "
                "run; mount its file system with locks (NFS: without nolock; Lustre: with flock), or set run_dir to a "
                "folder elsewhere"
            ) from None
        file.seek(0)
        who = _named(file.read())
        file.close()
        raise UserError(
            f"{folder} is at work already, by {who}; one process at a time may write a run: wait "
            "for it, stop it, or set another run_dir"
        ) from None
    file.truncate(0)
    file.write(json.dumps(_this_process()))
    file.flush()
    os.fsync(file.fileno())  # NFS would keep it from other nodes for up to half a minute
    _held[path] = file


def holder(folder: Path) -> Holder | None:
    """Who holds the lock of `folder` now; None if nobody does.

    The lock is not touched: whoever takes it meanwhile gets it.
    """
    path = (folder / "lock").resolve()
    if path in _held:  # to open and close the file would give it up
        return _this_process()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        # struct flock of Linux: kind, from where, offset, length, and the answer's process.
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
        return None if kind == fcntl.F_UNLCK else _told(file.read().decode(errors="replace"))


def last_holder(folder: Path) -> Holder | None:
    """Who has held the lock of `folder` last, as far as can be seen from here; None if nobody has."""
    path = (folder / "lock").resolve()
    if path in _held:
        return _this_process()
    try:
        return _told(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


_FLOCK = "hhqqi4x"


def _this_process() -> Holder:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _told(text: str) -> Holder:
    try:
        told = json.loads(text)
        return {"pid": told["pid"], "host": told["host"]}
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return {"pid": None, "host": None}


def _named(text: str) -> str:
    told = _told(text)
    return f"process {told['pid']} on {told['host']}" if told["pid"] else "another process"
