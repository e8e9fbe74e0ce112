"""Where a store lies: a folder on a disk, or a prefix in a bucket.

A place holds files by name (`train.zarr/commits/000003.json`), and every one of them is whole or not
there, whatever moment the process that wrote it dies at. That is all the commit protocol of
docs/store_format.md asks for.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zarr.abc.store import Store
from zarr.storage import LocalStore

from storage.bulk_file import Bytes, Parts
from storage.errors import StoreError
from storage.files import FileRecord, compose_file, read_parts, sync


def is_broken_url(location: str) -> bool:
    """Whether it begins as a URL does, but without both slashes: as a path it would make a folder `s3:`."""
    return re.match(r"[a-z0-9]+:/(?!/)|(s3|gs|az):(?!//)", location) is not None


def leads_out(name: str) -> bool:
    """Whether a name, such as one that a file holds, is of something outside its folder."""
    return name.startswith("/") or ".." in name.split("/") or "\0" in name


def inside(name: str) -> str:
    """The name, if it is one of something inside a folder.

    Raises:
        StoreError: If it leads out of it.
    """
    if leads_out(name):
        raise StoreError(
            f"{name!r} leads out of the folder that it is a name in, and only what is below may be named "
            "there; the file that holds it was edited or damaged: restore it"
        )
    return name


class Place(ABC):
    """A folder of whole files. Equal, hashed, printed and pickled by its location alone."""

    location: str
    """A path, or a URL such as `s3://bucket/prefix`; it never holds credentials."""

    @property
    def folder(self) -> Path | None:
        """Of a place on a disk; None elsewhere. What can be memory-mapped is found there."""
        return None

    @abstractmethod
    def __truediv__(self, name: str) -> "Place":
        """The place of that name inside this one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: If there is none of that name.
            StoreError: If an object store does not give it.
        """

    def write(self, name: str, parts: Iterable[Bytes]) -> FileRecord:
        """Write `parts` one after the other as one file, atomically and durably.

        An older file of that name is replaced. A name has one writer at a time. Each part is used before
        the next is asked for.

        Raises:
            StoreError: If the disk or the object store does not take it.
        """
        return self.compose(name, lambda room: parts)

    @abstractmethod
    def compose(self, name: str, parts: Parts) -> FileRecord:
        """`write`, of parts that are made in the memory from which they are written.

        Raises:
            StoreError: As `write`.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none.

        Raises:
            StoreError: If an object store does not say.
        """

    @abstractmethod
    def record(self, name: str) -> FileRecord:
        """Length and checksum of a file as it is now, read whole.

        Raises:
            FileNotFoundError: If there is none of that name.
            OSError: If a disk does not give it.
            StoreError: If an object store does not give it.
        """

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Names of all files below this place, or below a folder of it, sorted.

        Raises:
            StoreError: If an object store does not say.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            StoreError: If an object store does not do it.
        """

    @abstractmethod
    def zarr_store(self) -> Store:
        """The same files for zarr, to be read only, and inside `answering`."""

    @contextmanager
    def answering(self, name: str) -> Iterator[None]:
        """For what zarr reads of a name: errors are told as the other methods here tell them.

        Raises:
            StoreError: If an object store does not give what is asked for.
        """
        yield

    @property
    def hasty(self) -> "Place":
        """The same place, but a server that does not answer is given up soon."""
        return self

    @property
    def name(self) -> str:
        """The last part of its location."""
        return self.location.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.location!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.location == self.location

    def __hash__(self) -> int:
        return hash(self.location)


class LocalPlace(Place):
    """A folder on a disk that this machine sees."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist before something is written."""
        self._folder = folder
        self.location = str(folder)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    def __truediv__(self, name: str) -> "LocalPlace":
        return LocalPlace(self.folder / inside(name))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LocalPlace, (self.folder,)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return (self.folder / inside(name)).read_bytes()

    def compose(self, name: str, parts: Parts) -> FileRecord:
        """Write under another name, sync to the disk, and rename."""
        return compose_file(self.folder / inside(name), parts)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""
        path = self.folder / inside(name)
        return path.stat().st_size if path.is_file() else None

    def record(self, name: str) -> FileRecord:
        """Length and checksum of a file as it is now."""
        return FileRecord.of(read_parts(self.folder / inside(name)))

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files below this place."""
        files = (path for path in (self.folder / inside(prefix)).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def delete(self, name: str) -> None:
        """Remove a file, if there is one, durably."""
        path = self.folder / inside(name)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync(path.parent)

    def zarr_store(self) -> Store:
        """The same files for zarr."""
        return LocalStore(self.folder, read_only=True)


Location = Place | Path | str
"""What names a place: itself, a path, or a URL."""


def place(location: Location) -> Place:
    """The place that a path or a URL names.

    Raises:
        StoreError: If it is no path, or a URL of a kind that is not known, or not one of a bucket.
    """
    if isinstance(location, Place):
        return location
    if isinstance(location, str) and (is_broken_url(location) or not location or "\0" in location):
        raise StoreError(
            f"{location!r} is no folder and no URL of a bucket; give a folder, or s3://, gs:// or "
            "az:// with a bucket and a prefix"
        )
    if isinstance(location, str) and "://" in location:
        from storage.object_store import ObjectPlace  # a run on disks need not load it

        return ObjectPlace(location)
    return LocalPlace(Path(location))
