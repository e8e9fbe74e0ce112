"""Documents from local files: plain text, JSON lines, parquet. Every error names file and line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.document import Document
from actors.errors import InputError


def _read_text(path: Path, text_key: str) -> Iterator[Document]:
    """The whole file as one document; `text_key` does not apply."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from error
    if text.strip():
        yield Document(name=str(path), text=text)


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    """A document per line; blank lines are passed over."""
    for where, record in _json_records(path):
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            has = f"keys {', '.join(record)}" if isinstance(record, dict) else "no object"
            if isinstance(record, dict) and text_key in record:
                has = f"a {type(record[text_key]).__name__} there"
            raise InputError(
                f"{where} has no text under the key '{text_key}' (it has {has}); mend the "
                "line or set corpus.text_key"
            )
        yield Document(name=where, text=_whole(record[text_key], where))


def read_conversations(path: Path) -> Iterator[Document]:
    """A conversation per line of a `.jsonl` file: a list of messages under the key `messages`.

    Raises:
        InputError: If the file is of another kind, or a line holds no conversation.
    """
    if path.suffix != ".jsonl":
        raise InputError(
            f"{path} is no .jsonl file, and with corpus.chat_template conversations are read from "
            "such files alone; convert it, or leave chat_template out"
        )
    for where, record in _json_records(path):
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InputError(
                f"{where} holds no conversation; with corpus.chat_template a line is "
                '{"messages": [{"role": "user", "content": "..."}, ...]}: mend the line, or leave '
                "chat_template out"
            )
        for message in messages:
            _whole(message["content"], where)
        yield Document(name=where, messages=messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from error
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where} is not JSON ({error}); a .jsonl file has one object per line: mend "
                    "or remove the line"
                ) from error
            yield where, record


def _whole(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; "
            "mend or remove the line"
        )
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    """A document per row, read a batch of rows at a time."""
    import pyarrow as pa  # takes a third of a second, and most corpora need none of it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _parquet_rows(file, path, text_key)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} can't be read as a parquet file ({error}); write it again, or remove it from "
            "corpus.paths"
        ) from error


def _parquet_rows(file: Any, path: Path, text_key: str) -> Iterator[Document]:
    if text_key not in file.schema_arrow.names:
        raise InputError(
            f"{path} has no column '{text_key}' (it has {', '.join(file.schema_arrow.names)}); "
            "set corpus.text_key"
        )
    row = 0
    for batch in file.iter_batches(columns=[text_key]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise InputError(
                    f"{path}, row {row}: column '{text_key}' holds {text!r}, not a text; mend "
                    "the row or set corpus.text_key"
                )
            yield Document(name=f"{path}, row {row}", text=text)
            row += 1


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    byte = error.object[error.start]
    return InputError(
        f"{path}:{line} is not UTF-8 (byte 0x{byte:02x}); corpora are UTF-8 text: convert the "
        "file (`iconv -f latin1 -t utf-8`) or remove it from corpus.paths"
    )


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
"""A reader for every kind of file, by suffix: (path, text_key) to documents."""
