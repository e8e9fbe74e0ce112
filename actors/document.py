"""What a corpus is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text; contexts are cut from documents, splits never share one."""

    name: str
    """Where it comes from, for messages: a module, a file, a line of a file."""

    text: str
