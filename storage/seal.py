"""A checksum inside a run's JSON files: what was damaged or edited by hand is told, and not believed."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

KEY = "crc32"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a checksum of all the rest."""
    # With the keys, and in the order, that a reader of the file will find.
    bare = {key: value for key, value in json.loads(json.dumps(data)).items() if key != KEY}
    return {**bare, KEY: _checksum(bare)}


def opened(data: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its checksum; of one that has none, all of it.

    Raises:
        ValueError: If it is not what was sealed, or empty.
    """
    if not data:
        raise ValueError("it holds nothing")
    bare = {key: value for key, value in data.items() if key != KEY}
    if data.get(KEY) not in (None, _checksum(bare)):
        raise ValueError("its checksum does not match: it was damaged, or edited")
    return bare


def _checksum(bare: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(bare).encode()):08x}"
