"""Corpora: the same documents in the same order, and errors that name file and line."""

import json
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.corpus import FilesCorpus, HubCorpus, StdlibCorpus
from actors.errors import InputError


def files(*paths: Path | str, text_key: str = "text") -> FilesCorpus:
    return FilesCorpus(paths=tuple(map(str, paths)), text_key=text_key)


def texts(corpus: FilesCorpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def test_the_standard_library_is_a_document_per_module_sorted_by_dotted_name():
    documents = list(StdlibCorpus().documents())
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {"os", "json", "json.decoder", "importlib.metadata"} <= set(names)
    with tokenize.open(tokenize.__file__) as file:
        assert documents[names.index("tokenize")].text == file.read()


def test_the_standard_library_leaves_out_tests_and_installed_packages():
    parts = {part for document in StdlibCorpus().documents() for part in document.name.split(".")}
    assert not parts & {"test", "tests", "idle_test", "lib2to3", "pytest", "numpy"}


def test_the_standard_library_is_about_twelve_megabytes():
    assert 8e6 < sum(len(document.text) for document in StdlibCorpus().documents()) < 16e6


def test_files_are_read_in_the_order_given_and_patterns_sorted(tmp_path: Path):
    for name in ("b", "a", "z"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.txt").write_text("text of c")
    corpus = files(tmp_path / "z.txt", tmp_path / "[ab].txt", tmp_path / "**" / "*.txt")
    assert texts(corpus) == ["text of z", "text of a", "text of b", "text of c"]


def test_json_lines_and_parquet_give_a_document_per_record(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"story": "one"}\n\n{"story": "", "other": 3}\n')
    pq.write_table(pa.table({"n": [1, 2], "story": ["two", "drei ß"]}), tmp_path / "b.parquet")
    corpus = files(tmp_path / "*", text_key="story")
    assert [(Path(d.name).name, d.text) for d in corpus.documents()] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", ""),
        ("b.parquet, row 0", "two"),
        ("b.parquet, row 1", "drei ß"),
    ]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}', encoding="utf-8-sig")
    assert texts(files(tmp_path / "*")) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_text("  \n\n")
    with pytest.raises(InputError, match=rf"{name} is empty; remove it from corpus.paths or fill"):
        texts(files(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=rf"{name}:2 is not UTF-8 \(byte 0xe9\); .*iconv"):
        texts(files(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "a.jsonl:2 is not JSON .*mend or remove the line"),
        ('{"body": "x", "id": 1}', r"a.jsonl:2 has no text under the key 'text' .*keys body, id"),
        ('{"text": null}', r"a.jsonl:2 has no text under the key 'text'"),
        (r'{"text": "\ud800"}', "a.jsonl:2 holds half of a surrogate pair"),
        ("[" * 100_000, "a.jsonl:2 is not JSON"),
        ('["text"]', r"a.jsonl:2 has no text under the key 'text' \(it has no object\)"),
    ],
    ids=["not-json", "no-key", "null", "half-a-character", "too-deep", "not-an-object"],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': 'fine'})}\n{line}\n")
    with pytest.raises(InputError, match=message):
        texts(files(tmp_path / "a.jsonl"))


def test_a_bad_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_text("no such thing")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["x" * 100, "y"]}), tmp_path / "d.parquet")
    page = bytearray((tmp_path / "d.parquet").read_bytes())
    page[4:40] = b"\xff" * 36
    (tmp_path / "d.parquet").write_bytes(page)
    pq.write_table(pa.table({"text": ["x" * 100]}), tmp_path / "e.parquet", compression="none")
    data = (tmp_path / "e.parquet").read_bytes()
    (tmp_path / "e.parquet").write_bytes(data.replace(b"x" * 100, b"\xff" * 100))
    for name in ("a", "d", "e"):
        with pytest.raises(InputError, match=rf"{name}\.parquet can't be read as a parquet file"):
            texts(files(tmp_path / f"{name}.parquet"))
    with pytest.raises(InputError, match=r"b.parquet has no column 'text' \(it has body\)"):
        texts(files(tmp_path / "b.parquet"))
    with pytest.raises(InputError, match=r"c\.parquet, row 1: column 'text' holds None"):
        texts(files(tmp_path / "c.parquet"))


def test_a_missing_or_strange_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no file matches .*stories-\*\.txt"):
        texts(files(tmp_path / "stories-*.txt"))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"can't tell what .*a\.pdf holds; files end in \.txt"):
        texts(files(tmp_path / "a.pdf"))


def test_files_need_at_least_one_path():
    with pytest.raises(ValueError, match="paths is empty; name at least one file"):
        files()


def test_a_hub_that_cannot_be_reached_says_how_to_use_local_files():
    corpus = HubCorpus(dataset="roneneldan/TinyStories")
    with pytest.raises(InputError, match=r"Hub can't be reached.*source: files"):
        next(corpus.documents())
