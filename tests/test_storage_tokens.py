"""The token store: what is appended is read back, and a store is there whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import root, tokens
from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.places import place
from storage.root import read_root, write_root
from storage.tokens import TokenSpec, TokenStore, TokenWriter
from storage.verify import Verification


def spec(context: int) -> TokenSpec:
    return TokenSpec(
        context=context, first_position=1, separator_id=1, special_ids=(1, 2), tokenizer="abc"
    )


def write(path: Path, ids: dict[str, np.ndarray], parts: int = 1) -> None:
    context = next(iter(ids.values())).shape[1]
    writer = TokenWriter(path, spec(context), {split: len(rows) for split, rows in ids.items()})
    for split, rows in ids.items():
        for part in np.array_split(rows, parts):
            writer.append(split, part, part + np.uint32(7))
    writer.seal()


@settings(max_examples=25)
@given(st.data())
def test_what_is_appended_in_any_parts_is_read_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    n, context = data.draw(st.integers(1, 40), label="n"), data.draw(st.integers(1, 9), label="c")
    rows = np.random.default_rng(0).integers(0, 2**32 - 8, (n, context), np.uint32)
    wanted = np.array(data.draw(st.lists(st.integers(0, n - 1)), label="wanted"), np.int64)
    path = tmp_path_factory.mktemp("store") / "tokens.zarr"
    with pytest.MonkeyPatch.context() as patch:  # shards small enough for several of them
        patch.setattr(tokens, "CHUNK_TOKENS", data.draw(st.integers(1, 32), label="chunk"))
        patch.setattr(tokens, "CHUNKS_PER_SHARD", data.draw(st.integers(1, 4), label="shard"))
        write(path, {"train": rows}, parts=data.draw(st.integers(1, 5), label="parts"))
    store = TokenStore.open(path)
    assert store.n_sequences("train") == n
    np.testing.assert_array_equal(store.ids("train", wanted), rows[wanted])
    np.testing.assert_array_equal(store.documents("train", wanted), rows[wanted] + np.uint32(7))


def test_the_specification_survives(tmp_path: Path):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})
    store = TokenStore.open(tmp_path / "tokens.zarr")
    assert store.spec == spec(5)
    assert (store.context, store.first_position, store.special_ids) == (5, 1, (1, 2))
    assert store.ids("train", np.array([0])).dtype == np.int64


def test_a_split_may_be_empty(tmp_path: Path):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)[:0]})
    assert TokenStore.open(tmp_path / "tokens.zarr").n_sequences("train") == 0


def test_an_unfinished_store_is_none_and_the_next_writer_clears_it_away(tmp_path: Path):
    path = tmp_path / "tokens.zarr"
    rows = np.arange(10, dtype=np.uint32).reshape(2, 5)
    TokenWriter(path, spec(5), {"train": 2}).append("train", rows[:1], rows[:1])
    with pytest.raises(StoreError, match=r"there is no token store at .*tokens\.zarr"):
        TokenStore.open(path)
    write(path, {"train": rows})
    np.testing.assert_array_equal(TokenStore.open(path).ids("train", np.array([1, 0])), rows[::-1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens.zarr"]


def test_an_existing_store_is_never_written_over(tmp_path: Path):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})
    with pytest.raises(StoreError, match="exists already, and a token store never changes"):
        write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})


def test_an_unknown_split_is_named(tmp_path: Path):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})
    with pytest.raises(StoreError, match="no split 'test', it has train"):
        TokenStore.open(tmp_path / "tokens.zarr").n_sequences("test")


def test_a_folder_that_is_no_token_store_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="there is no token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="is not a token store"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("context", "x"), ("special_ids", None), ("special_ids", [1, "2"])),
        *(("first_position", None), ("separator_id", "a"), ("tokenizer", 5), ("new", 1)),
    ],
)
def test_a_token_store_whose_values_are_of_other_kinds_is_damage(
    tmp_path: Path, key: str, value: object
):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})
    where = place(tmp_path / "tokens.zarr")
    there = read_root(where, "token")
    write_root(where, replace(there, spec={**there.spec, key: value}))
    with pytest.raises(StoreError, match="its file was edited or damaged"):
        TokenStore.open(where)
    assert [damage.file for damage in Verification(where, "token").damages] == ["zarr.json"]


@pytest.mark.parametrize("kind", ["token", "activation"])
@pytest.mark.parametrize(
    ("spec", "n_bytes", "told"),
    [
        *((spec, 1, "its specification is no object") for spec in (None, [], "x", 7)),
        *(({}, n_bytes, "is no number of bytes") for n_bytes in (None, "1", [1])),
    ],
)
def test_a_root_of_values_of_other_kinds_is_damage(
    tmp_path: Path, kind: str, spec: object, n_bytes: object, told: str
):
    where = place(tmp_path)
    files = {"x": {"n_bytes": n_bytes, "xxh3": "0"}}
    body = {"strata_format": root.FORMAT_VERSIONS[0], "spec": spec, "files": files}
    metadata = root.group_metadata({**body, "crc32c": root._checksum(body)})
    where.write(root.NAME, [metadata])
    opened = TokenStore if kind == "token" else ActivationStore
    with pytest.raises(StoreError, match=told):
        opened.open(where)
    assert [damage.file for damage in Verification(where, kind).damages] == ["zarr.json"]


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "tokens.zarr", {"train": np.ones((2, 5), np.uint32)})
    monkeypatch.setattr(root, "FORMAT_VERSIONS", (3, 4))
    with pytest.raises(StoreError, match="format version 2, and this Strata reads 3 to 4"):
        TokenStore.open(tmp_path / "tokens.zarr")


def test_a_flipped_byte_is_found_when_read(tmp_path: Path):
    rows = np.random.default_rng(0).integers(0, 4096, (64, 16), np.uint32)
    write(tmp_path / "tokens.zarr", {"train": rows})
    shard = tmp_path / "tokens.zarr" / "train" / "ids" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="train/ids is damaged"):
        TokenStore.open(tmp_path / "tokens.zarr").ids("train", np.arange(64))


def test_what_a_kill_has_left_while_a_store_was_sealed_is_removed(tmp_path: Path):
    store = tmp_path / "tokens.zarr"
    for name in ("train/zarr.json", "zarr.json", "train/ids/c/0/0"):
        partial = store / f"{name}.{'0a' * 16}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("half")
    write(store, {"train": np.ones((2, 5), np.uint32)})
    assert TokenStore.open(store).n_sequences("train") == 2
    assert not list(store.rglob("*.partial"))
