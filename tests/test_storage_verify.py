"""Damage is found and named, is mended by writing the shard again, and never gives other numbers."""

import json
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from storage import tokens
from storage.activations import ActivationStore
from storage.batches import Cursor, ShuffledBatches
from storage.errors import StoreError, VersionError
from storage.hygiene import Hygiene, RowFilter
from storage.places import place
from storage.repair import take_back_shards, take_back_tokens
from storage.root import NAME, group_metadata
from storage.tokens import TokenSpec, TokenStore, TokenWriter
from storage.verify import Damage, Verification, damaged_shards
from tests.stores import files_of, filled_store, small_spec

SPEC = small_spec(groups=((0, 2), (1,)))


def verified(path: Path, kind: str = "activation") -> list[Damage]:
    verification = Verification(path, kind)
    assert sum(verification.run(n_threads=2)) == verification.n_bytes
    return verification.damages


def numbers(path: Path) -> np.ndarray:
    """All that training sees of a store, in its order."""
    row_filter = RowFilter(Hygiene(), (0,), {0: 2.0, 1: 2.0, 2: 2.0})
    rows = []
    for array in ("groups/0", "groups/1"):
        batches = ShuffledBatches(ActivationStore.open(path), array, row_filter, 16, 4, seed=0)
        for _, batch in islice(batches.batches(Cursor()), batches.batches_per_epoch):
            rows.append(np.column_stack([batch.x, batch.layer]))
    return np.concatenate(rows)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def token_store(path: Path) -> Path:
    spec = TokenSpec(
        context=16, first_position=1, separator_id=1, special_ids=(1,), tokenizer="none"
    )
    ids = np.random.default_rng(0).integers(0, 4096, (70, 16), np.uint32)
    writer = TokenWriter(path, spec, {"train": 60, "validation": 10})
    writer.append("train", ids[:60], ids[:60] // np.uint32(9))
    writer.append("validation", ids[60:], ids[60:] // np.uint32(9))
    writer.seal()
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 64)


def test_a_sound_store_has_no_damage_finished_or_not(tmp_path: Path):
    assert verified(filled_store(tmp_path / "whole", SPEC).place.folder) == []
    assert verified(filled_store(tmp_path / "part", SPEC, [2]).place.folder) == []
    assert verified(token_store(tmp_path / "tokens.zarr"), "token") == []


def test_any_flipped_bit_is_found_and_none_changes_the_numbers_that_training_reads(tmp_path: Path):
    path = filled_store(tmp_path / "s", SPEC).place.folder
    whole, expected = files_of(path), numbers(path)
    draws = np.random.default_rng(0)
    kinds = {
        "data": [f for f in whole if "/x/c/" in f],
        "columns": [f for f in whole if "/c/" in f and "/x/" not in f],
        "metadata": [f for f in whole if f.endswith(NAME)],
        "root": [NAME],
        "commits": [f for f in whole if f.startswith("commits/")],
    }
    for kind, files in kinds.items():
        for _ in range(40):
            file = str(draws.choice(files))
            # Of the data a third of the flips are in the index at the end of the shard.
            n_bits = 8 * len(whole[file])
            first = n_bits - 8 * 52 if kind == "data" and draws.random() < 1 / 3 else 0
            bit = int(draws.integers(first, n_bits))
            flip(path / file, bit)

            damages = verified(path)
            assert damages, f"bit {bit} of {file} is not found"
            assert file in {damage.file for damage in damages}
            with suppress(StoreError):
                np.testing.assert_array_equal(numbers(path), expected, err_msg=f"{bit} of {file}")
            (path / file).write_bytes(whole[file])
    assert verified(path) == []


@pytest.mark.parametrize("array", ["groups/0/x/c/{}/0", "token_id/c/{}"])
def test_a_file_that_is_another_one_of_the_store_is_found(tmp_path: Path, array: str):
    """Each of its chunks is sound, and its length is that of the other."""
    path = filled_store(tmp_path / "s", SPEC).place.folder
    (path / array.format(1)).write_bytes((path / array.format(0)).read_bytes())
    (damage,) = verified(path)
    assert (damage.file, damage.shard) == (array.format(1), 1)
    assert damage.what == "it is not the file that was written"


def test_damage_is_named_by_array_shard_and_chunk(tmp_path: Path):
    path = filled_store(tmp_path / "s", SPEC).place.folder
    chunk_bytes = SPEC.chunk_rows * SPEC.d_model * 4 + 4
    flip(path / "groups/1/x/c/2/0", 8 * (chunk_bytes + 5))
    flip(path / "groups/0/x/c/1/0", 8 * 3 * chunk_bytes)  # the first bit of the index
    flip(path / "token_id/c/3", 9)
    (path / "groups/0/norm/c/0").unlink()
    (path / "position/c/0").write_bytes(b"torn")
    damages = verified(path)
    assert damaged_shards(damages) == [0, 1, 2, 3]
    told = {str(damage) for damage in damages}
    assert told == {
        "groups/1/x, shard 2, chunk 1: its checksum does not match (groups/1/x/c/2/0)",
        "groups/0/x, shard 1: the index of its chunks is damaged (groups/0/x/c/1/0)",
        "token_id, shard 3, chunk 0: its checksum does not match (token_id/c/3)",
        "groups/0/norm, shard 0: it can't be read (No such file or directory) (groups/0/norm/c/0)",
        "position, shard 0: it has 4 bytes, not the 64 written (position/c/0)",
    }


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("groups/0/x/c/1/0", [1]),
        ("sequence/c/2", [2]),
        ("commits/000003.json", [3]),
        ("groups/0/x/zarr.json", []),
        ("groups/zarr.json", []),
        ("zarr.json", []),
    ],
)
def test_only_damaged_shards_are_written_again_and_equal_the_first_ones(
    tmp_path: Path, file: str, again: list[int]
):
    path = filled_store(tmp_path / "s", SPEC).place.folder
    whole = files_of(path)
    flip(path / file, 300)
    for _ in range(2):  # as after a kill between taking back and forgetting the damage
        take_back_shards(place(path), verified(path))
    assert ActivationStore.create(path, SPEC).missing() == again
    assert verified(path) == []
    filled_store(path, SPEC, again)
    assert files_of(path) == whole


@pytest.mark.usefixtures("small_shards")
def test_any_flipped_bit_of_a_token_store_is_found_and_none_changes_the_ids(tmp_path: Path):
    path = token_store(tmp_path / "tokens.zarr")
    whole = files_of(path)

    def everything() -> list[np.ndarray]:
        store, spans = TokenStore.open(path), {"train": 60, "validation": 10}
        read = [(getattr(store, a), s, n) for a in ("ids", "documents") for s, n in spans.items()]
        return [array(split, np.arange(n)) for array, split, n in read]

    expected = everything()
    draws = np.random.default_rng(0)
    for file in [*whole, *draws.choice(list(whole), 60)]:
        flip(path / file, int(draws.integers(0, 8 * len(whole[file]))))
        assert file in {damage.file for damage in verified(path, "token")}
        with suppress(StoreError):
            for got, wanted in zip(everything(), expected, strict=True):
                np.testing.assert_array_equal(got, wanted, err_msg=file)
        (path / file).write_bytes(whole[file])


@pytest.mark.usefixtures("small_shards")
def test_damage_of_a_token_store_is_named_by_chunk_and_all_of_it_is_packed_again(tmp_path: Path):
    path = token_store(tmp_path / "tokens.zarr")
    whole = files_of(path)
    flip(path / "train/ids/c/0/0", 8)
    [damage] = verified(path, "token")
    assert (damage.file, damage.shard, damage.chunks) == ("train/ids/c/0/0", 0, (0,))
    for _ in range(2):
        take_back_tokens(place(path))
    with pytest.raises(StoreError, match="there is no token store"):
        TokenStore.open(path)
    token_store(path)
    assert files_of(path) == whole


def test_a_token_file_that_is_gone_is_an_error_and_never_zeros(tmp_path: Path):
    path = token_store(tmp_path / "tokens.zarr")
    (path / "train/ids/c/0/0").unlink()
    with pytest.raises(StoreError, match="train/ids/c/0/0 is gone"):
        TokenStore.open(path)


def test_a_store_of_another_version_is_no_damage_and_nothing_of_it_is_taken_back(tmp_path):
    path = filled_store(tmp_path / "s", SPEC).place.folder
    root = path / NAME
    attributes = json.loads(root.read_text())["attributes"]
    root.write_bytes(group_metadata({**attributes, "strata_format": 4, "crc32c": "of version 4"}))
    before = files_of(path)
    with pytest.raises(VersionError, match="format version 4"):
        Verification(path, "activation")
    with pytest.raises(VersionError):
        take_back_shards(place(path), [Damage(file=NAME, shard=None, chunks=(), what="damaged")])
    assert files_of(path) == before
    # The same digit by damage: the rest is still that of the version before.
    root.write_bytes(group_metadata({**attributes, "strata_format": 4}))
    assert [damage.file for damage in verified(path)] == [NAME]
