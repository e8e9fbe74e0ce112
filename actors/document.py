"""What a corpus is made of."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; contexts are cut from documents, splits never share one."""

    name: str
    """Where it comes from, for messages: a module, a file, a line of a file."""

    text: str = ""

    messages: Sequence[dict[str, str]] = ()
    """Of a conversation, instead of a text: each with `role` and `content`."""
