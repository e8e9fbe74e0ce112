"""Specifications of stores as JSON has them: the keys, and of what kind each value is."""

from collections.abc import Mapping
from types import UnionType
from typing import Any

from storage.errors import StoreError

_EDITED = "its file was edited or damaged, so harvest again into another folder"


def check_kinds(specification: Mapping[str, Any], kinds: Mapping[str, type | UnionType]) -> None:
    """Refuse keys and kinds of values that no specification has.

    Raises:
        StoreError: If a key is missing or unknown, or a value of another kind.
    """
    if set(specification) != set(kinds):
        raise StoreError(
            f"the specification has the keys {sorted(specification)}, and must have {sorted(kinds)}; "
            f"{_EDITED}"
        )
    for name, kind in kinds.items():
        value = specification[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise StoreError(
                f"the specification has {name} = {value!r}, which is of another kind than it should be; "
                f"{_EDITED}"
            )
