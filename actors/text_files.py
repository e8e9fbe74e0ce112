"""Documents from local files: plain text, JSON lines, parquet. Every error names file and line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

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
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                has = f"keys {', '.join(record)}" if isinstance(record, dict) else "no object"
                if isinstance(record, dict) and text_key in record:
                    has = f"a {type(record[text_key]).__name__} there"
                raise InputError(
                    f"{where} has no text under the key '{text_key}' (it has {has}); mend the "
                    "line or set corpus.text_key"
                )
            if any("\ud800" <= character <= "\udfff" for character in record[text_key]):
                raise InputError(
                    f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; "
                    "mend or remove the line"
                )
            yield Document(name=where, text=record[text_key])


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    """A document per row, read a batch of rows at a time."""
    import pyarrow as pa  # takes a third of a second, and most corpora need none of it
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{path} is not a parquet file ({error}); write it again, or remove it from "
            "corpus.paths"
        ) from error
    with file:
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
