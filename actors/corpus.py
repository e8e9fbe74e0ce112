"""Corpora: where documents come from. The same corpus always gives the same documents in order."""

import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

from actors.document import Document
from actors.errors import InputError
from actors.text_files import READERS, read_conversations

_NOT_TEXT_TO_LEARN = {"test", "tests", "idle_test", "lib2to3"}
"""Folders of the standard library that are left out: test data, and a grammar kept twice."""


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus:
    """The running interpreter's standard library, a document per module: nothing to download.

    About 12 MB of Python and English; the same for everybody with the same Python release.
    """

    source: Literal["stdlib"] = "stdlib"

    def documents(self) -> Iterator[Document]:
        """Modules that can be imported by name, sorted by dotted name, without test folders.

        Raises:
            InputError: If this interpreter carries no sources of its standard library.
        """
        root = Path(sysconfig.get_path("stdlib"))
        modules = dict(sorted(_modules(root)))
        if "os" not in modules:
            raise InputError(
                f"the standard library at {root} has no Python sources (a frozen or zipped "
                "interpreter?); use a CPython installed with its sources, or give text files"
            )
        for name, path in modules.items():
            with tokenize.open(path) as file:  # honours the module's own coding line
                yield Document(name=name, text=file.read())


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module below `root`; site-packages has no dotted name."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if all(part.isidentifier() for part in parts) and not _NOT_TEXT_TO_LEARN & set(parts):
            yield ".".join(parts), path


@dataclass(frozen=True, kw_only=True)
class FilesCorpus:
    """Local files: `.txt` is one document; a line of `.jsonl` or a row of `.parquet` is one."""

    source: Literal["files"] = "files"

    paths: tuple[str, ...]
    """Files or glob patterns (`**` for any depth), read in the order given, a pattern's sorted."""

    text_key: str = "text"
    """Key of a JSON object, or column of a parquet file, that holds the text."""

    chat_template: bool = False
    """Whether the lines of `.jsonl` files are conversations (`messages`), for the tokenizer's template."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.paths:
            raise ValueError("paths is empty; name at least one file or glob pattern")
        if any("://" in path for path in self.paths):  # not repeated, as it may hold a password
            raise ValueError(
                "paths: one of them is a URL, and texts are read from files; copy them to a folder that every node "
                "sees, or give a dataset of the Hub (source: hub)"
            )

    def documents(self) -> Iterator[Document]:
        """All documents, file after file.

        Raises:
            InputError: If a file is missing, empty, of another kind, not UTF-8 or lacks the text
                key; the message names the file and the line or row.
        """
        for path in self._files():
            is_empty = True
            documents = (
                read_conversations(path)
                if self.chat_template
                else READERS[path.suffix](path, self.text_key)
            )
            for document in documents:
                is_empty = False
                yield document
            if is_empty:
                raise InputError(f"{path} is empty; remove it from corpus.paths or fill it")

    def _files(self) -> list[Path]:
        files: dict[Path, None] = {}  # in order, each once
        for pattern in self.paths:
            found = [Path(name) for name in sorted(glob(pattern, recursive=True))]
            found = [path for path in found if path.is_file()]
            if not found:
                raise InputError(
                    f"corpus.paths: no file matches {pattern}; correct the path, and quote "
                    "patterns in YAML"
                )
            files |= dict.fromkeys(found)
        strange = [str(path) for path in files if path.suffix not in READERS]
        if strange:
            raise InputError(
                f"corpus.paths: can't tell what {', '.join(strange[:3])} holds; files end in "
                f"{', '.join(READERS)}: rename or convert, or give a narrower pattern"
            )
        return list(files)


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A data set on the Hub, streamed: only what is read is downloaded."""

    source: Literal["hub"] = "hub"

    dataset: str
    """Its id, such as `monology/pile-uncopyrighted`."""

    config: str | None = None
    """Name of one of its configurations, where it has several."""

    split: str = "train"
    """Split of the data set to read; Strata's own splits are made from it."""

    revision: str | None = None
    """Branch, tag or commit; give a commit for runs that can be repeated."""

    text_key: str = "text"
    """Column that holds the text."""

    def documents(self) -> Iterator[Document]:
        """A document per row, in the data set's order.

        Raises:
            InputError: If the Hub can't be reached, or has no such data set, split or column.
        """
        import datasets  # takes over a second, and other corpora need none of it

        self._check_hub()
        try:
            rows = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for number, row in enumerate(rows):
                yield Document(name=f"{self.dataset}, row {number}", text=self._text(row))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise self._not_given(error) from error

    def _check_hub(self) -> None:
        """One short request, without which `datasets` would retry for half a minute."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            HfApi().dataset_info(self.dataset, revision=self.revision, timeout=5.0)
        except (HfHubHTTPError, HFValidationError) as error:
            raise self._not_given(error) from error
        except Exception as error:  # whatever the HTTP library raises where there is no network
            raise InputError(
                f"data set {self.dataset} can't be read: the Hub can't be reached ({error}); "
                "download it on a machine that has network and give its files: "
                "corpus: {source: files, paths: [FOLDER/*.parquet]}"
            ) from error

    def _not_given(self, error: Exception) -> InputError:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return InputError(
            f"the Hub does not give data set {self.dataset}, config {self.config}, split "
            f"{self.split} ({reason}); correct corpus.dataset, config, split and revision, or set "
            "HF_TOKEN if it is gated"
        )

    def _text(self, row: Mapping[str, Any]) -> str:
        text = row.get(self.text_key)
        if not isinstance(text, str):
            raise InputError(
                f"data set {self.dataset} has no text in a column '{self.text_key}' (it has "
                f"{', '.join(row)}); set corpus.text_key"
            )
        return text


Corpus = StdlibCorpus | FilesCorpus | HubCorpus
