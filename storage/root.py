"""The root's `zarr.json`: what makes a folder a store, and vouches for all its other metadata.

Its attributes hold the format's version, the specification, the length and checksum of files that
are written once with the store, and a checksum over these three.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c

from storage.errors import StoreError, VersionError
from storage.files import FileRecord
from storage.places import Place, leads_out

FORMAT_VERSIONS = (2, 3)
"""All that are read; 3 has `source` in its specification, and 2 has not. One is added when a program that knows only the
former would misread a store."""

NAME = "zarr.json"


@dataclass(frozen=True, kw_only=True)
class Root:
    """What a root says."""

    spec: dict[str, Any]
    """The specification, as JSON values."""

    files: dict[str, FileRecord]
    """Files written once with the store, by their path inside it."""

    def to_bytes(self) -> bytes:
        """The file that says so."""
        return group_metadata({**self._body, "crc32c": self.crc32c})

    @property
    def version(self) -> int:
        """Of the format, by which it is written."""
        return 3 if "source" in self.spec else 2

    @property
    def crc32c(self) -> str:
        """Checksum of all that it says."""
        return _checksum(self._body)

    @property
    def _body(self) -> dict[str, Any]:
        return {
            "strata_format": self.version,
            "spec": self.spec,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a Zarr group."""
    metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(metadata, indent=2).encode()


def write_root(place: Place, root: Root) -> None:
    """Make the place a store, when everything else of it is written."""
    place.write(NAME, [root.to_bytes()])


def read_root(place: Place, kind: str) -> Root:
    """What the root of the store at a place says.

    Args:
        place: Of the store.
        kind: `activation` or `token`, for the message.

    Raises:
        VersionError: If another version of the format stands there.
        StoreError: If there is no store, or it is damaged.
    """
    try:
        attributes = json.loads(place.read(NAME))["attributes"]
        version = attributes["strata_format"]
        body = {key: attributes.get(key) for key in ("strata_format", "spec", "files")}
        vouched = [
            known
            for known in FORMAT_VERSIONS
            if attributes.get("crc32c") == _checksum({**body, "strata_format": known})
        ]
        if version not in vouched and (vouched or version in FORMAT_VERSIONS):
            raise ValueError("its checksum does not match")
        if vouched:
            files = {name: FileRecord.from_json(record) for name, record in body["files"].items()}
            if not isinstance(body["spec"], dict):
                raise ValueError("its specification is no object")
            if any(map(leads_out, files)):
                raise ValueError("it names files outside the store")
            root = Root(spec=body["spec"], files=files)
            if root.version != version:
                raise ValueError(f"its specification is one of version {root.version}")
            return root
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"there is no {kind} store at {place}; `strata harvest` makes it"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise StoreError(
            f"{place} is not {'an' if kind[0] in 'aeiou' else 'a'} {kind} store ({error!r} in its "
            f"{NAME}); if it was one, `strata verify` and then `strata harvest` mend it, else give "
            "the folder of one"
        ) from error
    raise VersionError(
        f"{place} has format version {version}, and this Strata reads {FORMAT_VERSIONS[0]} to "
        f"{FORMAT_VERSIONS[-1]}; "
        "use the Strata that wrote it, or harvest again into another run directory"
    )


def check_file(place: Place, root: Root, name: str) -> None:
    """Compare a file with what the root says of it.

    Raises:
        StoreError: If it is gone or another.
    """
    try:
        sound = place.record(name) == root.files[name]
    except OSError:
        sound = False
    if not sound:
        raise StoreError(
            f"{place}/{name} is gone or damaged; `strata verify` names all damage of a run, and "
            "`strata harvest` then writes again what is damaged"
        )


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"
