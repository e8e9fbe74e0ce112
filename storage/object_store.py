"""Places in an object store: S3, Google Cloud Storage, Azure Blob Storage, through obstore.

Credentials come from the environment as the providers define it, are read by obstore alone, and stay
there: a location has none, and of an error only its kind, the HTTP status and the server's error code
are told, since servers repeat parts of a request in their answers.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url
from zarr.abc.store import ByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from storage.bulk_file import Parts
from storage.errors import StoreError
from storage.files import FileRecord
from storage.places import Place, inside, leads_out

SCHEMES = ("s3", "gs", "az")

REQUEST_SECONDS = 60.0
"""The longest a single request may take, its body included."""

PATIENCE_SECONDS = 120.0
"""How long a request is repeated that fails for a reason that may pass."""

PART_BYTES = 16 * 2**20
"""Larger objects go up in parts of this size and appear when the last one is there."""

PARTS_AT_ONCE = 4

T = TypeVar("T")

_ATTEMPTS = 5
_BROKEN_OFF = "kind: Interrupted"
_NO_BLOCKS = "InvalidBlockList"  # where S3 and Google say 404
_REFUSALS = (PermissionDeniedError, UnauthenticatedError)
_METADATA_SERVER = "169.254.169.254"  # asked for credentials when the environment has none


class ObjectPlace(Place):
    """A prefix in a bucket (Azure: a container).

    One `put` of an object is atomic everywhere, in parts or not: readers see the former object or
    the new one. A writer that was killed may leave parts that no one sees; a bucket's rule for
    incomplete multipart uploads removes them.
    """

    def __init__(
        self,
        location: str,
        request_seconds: float = REQUEST_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Nothing is asked of the server yet.

        Raises:
            StoreError: If the URL is not one of a bucket.
        """
        self.location = _checked(location)
        self._seconds = request_seconds, patience_seconds

    def __truediv__(self, name: str) -> "ObjectPlace":
        return ObjectPlace(f"{self.location}/{inside(name)}", *self._seconds)

    def __reduce__(self) -> tuple[type, tuple[str, float, float]]:
        return ObjectPlace, (self.location, *self._seconds)

    @property
    def hasty(self) -> "ObjectPlace":
        """The same place, for the first question to a server: at most half a minute."""
        return ObjectPlace(self.location, request_seconds=10.0, patience_seconds=20.0)

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        return self._ask("read", name, lambda: bytes(obstore.get(self._bucket, name).bytes()))

    def compose(self, name: str, parts: Parts) -> FileRecord:
        """Write an object, which appears when all of it is there."""
        # A part lasts until the next; requests may be repeated.
        data = [bytes(part) for part in parts(lambda n_bytes: np.empty(n_bytes, np.uint8))]
        record = FileRecord.of(data)
        self._ask("write", name, lambda: self._put(name, data, record.n_bytes), writes=True)
        return record

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if there is none."""
        try:
            return self._ask("look for", name, lambda: obstore.head(self._bucket, name)["size"])
        except FileNotFoundError:
            return None

    def record(self, name: str) -> FileRecord:
        """Length and checksum of an object as it is now."""
        return FileRecord.of([self.read(name)])

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects below this place."""
        listed = self._ask("list", prefix, lambda: obstore.list(self._bucket, prefix).collect())
        return sorted(item["path"] for item in listed)

    def delete(self, name: str) -> None:
        """Remove an object, if there is one."""
        try:
            self._ask("delete", name, lambda: obstore.delete(self._bucket, name))
        except FileNotFoundError:
            return

    def zarr_store(self) -> Store:
        """The same objects for zarr."""
        return _Reader(self._bucket)

    @contextmanager
    def answering(self, name: str) -> Iterator[None]:
        """For what zarr reads of a name."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._fault("read", name, error) from None

    @cached_property
    def _bucket(self) -> obstore.store.ObjectStore:
        request, patience = (timedelta(seconds=seconds) for seconds in self._seconds)
        try:
            return from_url(
                self.location,
                client_options={
                    "timeout": request,
                    "connect_timeout": min(request, timedelta(seconds=10)),
                    "allow_http": os.environ.get(self._own_server, "").startswith("http://"),
                },
                retry_config={
                    "max_retries": 1000,  # the time decides
                    "retry_timeout": patience,
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=100),
                        "max_backoff": timedelta(seconds=5),
                        "base": 2,
                    },
                },
            )
        except (BaseError, ValueError):
            raise StoreError(
                f"can't open {self.location}: the environment lacks a setting for it, or has one that "
                f"can't be used; {self._credentials}, and {self._own_server} for a server of your own"
            ) from None

    def _put(self, name: str, data: list[Any], n_bytes: int) -> None:
        if n_bytes <= PART_BYTES:
            obstore.put(self._bucket, name, b"".join(data), use_multipart=False)
        else:
            obstore.put(
                *(self._bucket, name, iter(data)),
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    def _ask(self, what: str, name: str, request: Callable[[], T], writes: bool = False) -> T:
        """The answer to a request.

        obstore repeats what fails. Two things are left to be repeated here, as no request is harmed
        by that: an answer that breaks off, and, of what `writes`, parts of an object that were put
        together, whose answer was lost, and of which a repeated request found none left.
        """
        inside(name)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request()
            except (BaseError, OSError) as error:
                gone, text = isinstance(error, FileNotFoundError), str(error)
                no_parts = writes and (gone or _NO_BLOCKS in text)
                if attempt < _ATTEMPTS and (no_parts or _BROKEN_OFF in text):
                    continue
                if gone and not writes:
                    # Without the server's text, which may repeat what it was sent.
                    raise FileNotFoundError(
                        errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{name}"
                    ) from None
                raise self._fault(what, name, error) from None
        raise AssertionError("unreachable")

    def _fault(self, what: str, name: str, error: Exception) -> StoreError:
        """An error in words that repeat nothing of what the server or the library said."""
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>([A-Za-z]+)</Code>", text)
        told = " ".join(match[1] for match in (status, code) if match)
        request, patience = self._seconds
        if _METADATA_SERVER in text:
            is_, do = "the environment has no credentials for it", self._credentials
        elif "NoSuchBucket" in text or "ContainerNotFound" in text:
            is_, do = f"there is no such bucket ({told})", "create it, or correct the URL"
        elif isinstance(error, FileNotFoundError):
            is_, do = (
                "it is gone",
                "`strata verify` names all damage, and `strata harvest` mends it",
            )
        elif isinstance(error, _REFUSALS) or told.startswith(("401", "403")):
            is_ = f"the server refuses these credentials ({told or 'no permission'})"
            do = f"allow them to list, read, write and delete there, or give others: {self._credentials}"
        elif "BareRedirect" in text:
            is_, do = "the bucket is in another region", "set AWS_REGION to the bucket's"
        elif "kind: Timeout" in text or "kind: Connect" in text or "kind: Request" in text:
            is_ = f"the server did not answer within {patience:g} s of trying, {request:g} s a request"
            do = f"check the network, and {self._own_server} if the server is your own; then run again"
        else:
            is_ = f"the server answers {told or type(error).__name__}"
            do = "run again when it is well, or correct the URL"
        return StoreError(f"can't {what} {self.location}/{name}: {is_}; {do}")

    @property
    def _credentials(self) -> str:
        return _CREDENTIALS[urlsplit(self.location).scheme]

    @property
    def _own_server(self) -> str:
        return _OWN_SERVERS[urlsplit(self.location).scheme]


class _Reader(ObjectStore[obstore.store.ObjectStore]):
    """zarr's reader, for which a chunk that is gone is an error and not a chunk of zeros.

    The index of a shard, which zarr reads again for each of its chunks, is asked for once.
    """

    def __init__(self, store: obstore.store.ObjectStore, *, read_only: bool = True) -> None:
        super().__init__(store, read_only=read_only)
        self._indices: dict[str, Buffer] = {}

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of an object."""
        if not isinstance(byte_range, SuffixByteRequest):
            return await self._asked(key, prototype, byte_range)
        if key not in self._indices:
            index = await self._asked(key, prototype, byte_range)
            if index is None:
                return None
            self._indices[key] = index
        return self._indices[key]

    async def _asked(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        """The same, asked for again where an answer breaks off."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                data = await super().get(key, prototype, byte_range)
            except BaseError as error:
                if attempt < _ATTEMPTS and _BROKEN_OFF in str(error):
                    continue
                raise
            if data is None and "/c/" in key:
                raise FileNotFoundError(key)
            return data
        raise AssertionError("unreachable")


_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the machine an identity",
}

_OWN_SERVERS = {
    "s3": "AWS_ENDPOINT_URL",
    "gs": "GOOGLE_BASE_URL",
    "az": "AZURE_STORAGE_ENDPOINT",
}


def _checked(location: str) -> str:
    """The URL of a bucket without a slash at its end; a refused one is not repeated."""
    url = urlsplit(location)
    if url.scheme not in SCHEMES:
        raise StoreError(
            f"a store at {url.scheme}:// is of no known kind; give a path, or a URL that begins "
            f"with {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        )
    if "@" in url.netloc or url.query or url.fragment:
        raise StoreError(
            f"the {url.scheme}:// URL of a store holds more than a bucket and a prefix; leave out "
            "everything else: credentials come from the environment"
        )
    if not url.netloc:
        raise StoreError(
            f"{location} names no bucket; give {url.scheme}://BUCKET or {url.scheme}://BUCKET/PREFIX"
        )
    if leads_out(url.path.strip("/")):
        raise StoreError(
            f"{location!r} leads out of its bucket, and a prefix has only names in it; leave out the '..'"
        )
    return location.rstrip("/")
