"""Refuses links that writing would follow out of a run directory: in the place of a folder, or of its lock."""

import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import UserError


def refuse_lock(run: Path) -> None:
    """The lock, which is opened for writing before anything else is looked at.

    Raises:
        UserError: If it is a link.
    """
    if (run / "lock").is_symlink():
        raise _leads_out(run / "lock", run)


def refuse_folders(run: Path) -> None:
    """All folders; links in the place of files are replaced, and never followed.

    Raises:
        UserError: If one is a link that leads out of the run directory, which may be a link itself.
    """
    for path in _links(run):
        if path.is_dir() and not path.resolve().is_relative_to(run.resolve()):
            raise _leads_out(path, run)


def _leads_out(link: Path, run: Path) -> UserError:
    return UserError(
        f"{link} is a link that leads out of {run}, and a run writes there alone; delete the link, "
        "or put what it leads to in its place (tokens and activations may lie elsewhere: harvest.store)"
    )


def _links(folder: Path, depth: int = 0) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir() and not (depth and folder.name == "c"):  # it has one for each shard
                yield from _links(Path(entry.path), depth + 1)
