"""Files that are either whole or not there, whatever moment the process dies at."""

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from storage.bulk_file import BulkFile, Bytes, Parts
from storage.errors import StoreError

_PART_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must look like to be the one that was written."""

    n_bytes: int
    """Its length."""

    xxh3: str
    """XXH3 of all its bytes, in 64 bits, as hexadecimal digits.

    Not their crc32c: chunks stand before their own, and whatever they hold, both together have the same.
    """

    @classmethod
    def of(cls, parts: Iterable[Bytes]) -> "FileRecord":
        """Of a file that is these parts, one after the other."""
        n_bytes, digest = 0, xxhash.xxh3_64()
        for part in parts:
            n_bytes += len(part)
            digest.update(part)  # pyright: ignore[reportArgumentType] (a buffer, from 3.12 on)
        return cls(n_bytes=n_bytes, xxh3=digest.hexdigest())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FileRecord":
        """The record, of its JSON values.

        Raises:
            KeyError or TypeError: If they are those of none.
        """
        if not isinstance(data["n_bytes"], int):
            raise TypeError(f"{data['n_bytes']!r} is no number of bytes")
        return cls(**data)


def write_file(path: Path, parts: Iterable[Bytes]) -> FileRecord:
    """Write `parts` one after the other as the file `path`, atomically and durably.

    The bytes go to a name of this call's own beside the file, reach the disk, and only then take
    the file's name; an older file of that name is replaced. What calls that were killed have left
    under their own names is removed first: a path has one writer at a time.

    Raises:
        StoreError: If the disk is full, or the place can't be written. Nothing of it is left.
    """
    return compose_file(path, lambda room: parts)


def compose_file(path: Path, parts: Parts) -> FileRecord:
    """`write_file`, of parts that are made in the memory from which they are written.

    Raises:
        StoreError: As `write_file`.
    """
    with writing(path):
        return _write(path, parts)


def _write(path: Path, parts: Parts) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{path.name}.*.partial"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with closing(BulkFile(partial)) as file:
            record = FileRecord.of(file.written(parts(file.room)))
            file.sync()
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return record


def is_partial(name: str) -> bool:
    """Whether a file of this name is what a call that was killed has left of another."""
    return re.search(r"\.[0-9a-f]{32}\.partial$", name) is not None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the user what to do when the system refuses to write.

    Raises:
        StoreError: In place of any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}); nothing of it was kept, and what "
            "was finished before is whole: make room or give the right to write there, and the same "
            "command continues"
        ) from error


def read_parts(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a few MiB at a time."""
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            yield part


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; none if there is no such file yet.

    Raises:
        StoreError: If a line holds something else.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged (line {number} holds no JSON object); delete it: what was noted there "
                "on the way is lost with it"
            ) from error
    return rows


def is_cached(path: Path, offset: int) -> bool:
    """Whether the system has a byte of a file in memory; False where it does not say."""
    if not hasattr(os, "RWF_NOWAIT"):  # Linux alone
        return False
    try:
        with path.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not in memory, or a file system or a file that can't be asked
        return False


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
