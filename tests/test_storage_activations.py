import json
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from storage.activations import ActivationStore
from storage.encoding import EncodedRows
from storage.errors import StoreError
from storage.row_memory import RowMemory
from tests.stores import activation, encoded, files_of, filled_store, shard_content, small_spec

GROUPED = {"groups": ((0, 2), (1,))}


@settings(max_examples=15)
@given(data=st.data())
def test_shards_written_in_any_order_are_read_back_by_any_slice(tmp_path_factory, data):
    spec = small_spec(
        n_sequences=data.draw(st.integers(1, 40), label="n_sequences"),
        sequences_per_chunk=data.draw(st.integers(1, 4), label="sequences_per_chunk"),
        chunks_per_shard=data.draw(st.integers(1, 4), label="chunks_per_shard"),
        **data.draw(st.sampled_from([{}, GROUPED]), label="groups"),
    )
    order = data.draw(st.permutations(range(spec.n_shards)), label="order of writing")
    edges = data.draw(st.tuples(*[st.integers(0, spec.n_rows)] * 2), label="slice")
    start, stop = sorted(edges)
    store = filled_store(tmp_path_factory.mktemp("store"), spec, order)

    assert store.missing() == []
    sequence, position = (store.column(name, start, stop) for name in ("sequence", "position"))
    for array in spec.arrays:
        layers = store.row_layers(array, start, stop)
        expected = activation(sequence, position, layers, spec.d_model)
        np.testing.assert_array_equal(store.read(array, start, stop), expected)
        np.testing.assert_allclose(
            store.column(f"{array}/norm", start, stop),
            np.linalg.norm(expected, axis=1),
            rtol=1e-6,
        )


def test_columns_hold_every_harvested_token_once_and_stand_aligned(tmp_path):
    store = filled_store(tmp_path / "s", small_spec(**GROUPED))
    spec = store.spec
    columns = [store.column(name, 0, spec.n_rows) for name in ("sequence", "position")]
    assert len(np.unique(np.stack(columns), axis=1).T) == spec.n_rows
    token_id = store.column("token_id", 0, spec.n_rows)
    np.testing.assert_array_equal(token_id, (columns[0].astype(int) * 3 + columns[1]) % 11)
    assert set(store.row_layers("groups/0", 0, spec.n_rows).tolist()) == {0, 2}
    assert set(store.row_layers("groups/1", 0, spec.n_rows).tolist()) == {1}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("groups", [{}, GROUPED], ids=["layers", "groups"])
def test_reading_undoes_the_scales_of_each_layer(tmp_path, dtype, groups):
    spec = small_spec(dtype=dtype, scales=(2.0**-3, 1.0, 2.0**5), **groups)
    store = filled_store(tmp_path / "s", spec)
    tolerance = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0.0}[dtype]
    sequence, position = (store.column(n, 0, spec.n_rows) for n in ("sequence", "position"))
    for array in spec.arrays:
        layers = store.row_layers(array, 0, spec.n_rows)
        expected = activation(sequence, position, layers, spec.d_model)
        got = store.read(array, 0, spec.n_rows)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-6 if tolerance else 0)


def test_files_are_byte_for_byte_what_zarr_itself_writes(tmp_path):
    """But for the last shard's padding, which zarr fills alike."""
    store = filled_store(tmp_path / "s", small_spec(dtype="float16"))
    spec = store.spec
    ours = zarr.open_array(store.place.folder / "layers/1/x", mode="r")
    theirs = zarr.create_array(
        tmp_path / "t",
        shape=ours.shape,
        dtype=ours.dtype,
        chunks=ours.chunks,
        shards=ours.shards,
        compressors=[Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    theirs[:] = ours[:]
    column = zarr.create_array(
        tmp_path / "u",
        shape=(spec.n_rows,),
        dtype="uint16",
        chunks=(spec.shard_rows,),
        compressors=[Crc32cCodec()],
        fill_value=0,
    )
    column[:] = store.column("position", 0, spec.n_rows)
    for shard in range(spec.n_shards):
        for mine, zarrs in (("layers/1/x/c/{}/0", "t/c/{}/0"), ("position/c/{}", "u/c/{}")):
            written = (store.place.folder / mine.format(shard)).read_bytes()
            assert written == (tmp_path / zarrs.format(shard)).read_bytes()


def test_size_on_disk_is_what_the_specification_foretells(tmp_path):
    for groups in ({}, GROUPED):
        store = filled_store(tmp_path / f"s{len(groups)}", small_spec(dtype="bfloat16", **groups))
        data = sum(
            p.stat().st_size
            for p in store.place.folder.rglob("*")
            if "c" in p.parts and p.is_file()
        )
        assert data == store.spec.n_bytes
        assert data == sum(record.n_bytes for record in store.committed().values())


def test_commit_record_states_rows_and_norms_of_each_layer(tmp_path):
    store = filled_store(tmp_path / "s", small_spec(**GROUPED))
    records = ActivationStore.open(store.place.folder).committed()
    assert list(records) == [0, 1, 2, 3]
    norms = store.column("groups/0/norm", 0, store.spec.n_rows)
    layers = store.row_layers("groups/0", 0, store.spec.n_rows)
    for layer in (0, 2):
        totals = [record.layers[layer] for record in records.values()]
        assert sum(t.rows for t in totals) == (layers == layer).sum()
        assert sum(t.norm_sum for t in totals) == pytest.approx(norms[layers == layer].sum())
    assert sum(record.rows for record in records.values()) == store.spec.n_rows


@pytest.mark.parametrize("groups", [(), ((2, 9, 10, 11), (0, 1, 3, 4, 5, 6, 7, 8))])
def test_records_of_as_many_layers_as_a_model_has_are_read_again(tmp_path, groups):
    filled_store(tmp_path / "store", small_spec(layers=tuple(range(12)), groups=groups))
    records = ActivationStore.open(tmp_path / "store").committed()
    assert set(records) == {0, 1, 2, 3}
    assert set(records[0].layers) == set(range(12))


def test_clipped_values_are_counted_in_the_record_of_their_layer(tmp_path):
    spec = small_spec(dtype="float16", scales=(1.0, 2.0**17, 1.0))
    record = filled_store(tmp_path / "s", spec, [0]).committed()[0]
    assert record.layers[0].n_clipped == record.layers[2].n_clipped == 0
    assert record.n_clipped == record.layers[1].n_clipped > 0


def test_a_shard_that_is_not_committed_is_an_error_and_never_zeros(tmp_path):
    store = filled_store(tmp_path / "s", small_spec(), [0, 2])
    assert store.missing() == [1, 3]
    assert len(store.read("layers/0", 0, 30)) == 30
    with pytest.raises(StoreError, match=r"shard 1 .* is not committed"):
        store.read("layers/0", 29, 31)
    with pytest.raises(StoreError, match=r"shard 3 .* is not committed"):
        store.column("token_id", 100, 110)


def test_shards_committed_elsewhere_are_seen_by_an_open_store(tmp_path):
    reader = ActivationStore.create(tmp_path / "s", small_spec())
    filled_store(tmp_path / "s", small_spec(), [3])
    assert reader.missing() == [0, 1, 2]
    assert len(reader.read("layers/2", 90, 110)) == 20


def test_a_committed_shard_is_final(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    before = files_of(store.place.folder)
    arrays, columns = shard_content(store.spec, 1)
    for rows in arrays.values():
        rows.stored[:] += 1
    record = store.write_shard(1, arrays, columns)
    assert record == store.committed()[1]
    assert files_of(store.place.folder) == before


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("groups", [{}, GROUPED], ids=["layers", "groups"])
def test_arrays_written_at_the_same_time_are_the_same_bytes(tmp_path, dtype, groups):
    spec = small_spec(dtype=dtype, **groups)
    whole = filled_store(tmp_path / "one", spec)
    store = ActivationStore.create(tmp_path / "three", spec)
    for shard in range(spec.n_shards):
        store.write_shard(shard, *shard_content(spec, shard), n_threads=3)
    assert files_of(store.place.folder) == files_of(whole.place.folder)


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    whole = files_of(filled_store(tmp_path / "whole", small_spec()).place.folder)
    store = filled_store(tmp_path / "s", small_spec(), [0, 1, 3])
    torn = store.place.folder / "layers/1/x/c/2/0.0123456789abcdef.partial"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half of it")
    (store.place.folder / "layers/0/x/c/2").mkdir(parents=True)
    (store.place.folder / "layers/0/x/c/2/0").write_bytes(b"written, but the shard not committed")
    filled_store(store.place.folder, small_spec())
    assert files_of(store.place.folder) == whole


def test_create_again_is_harmless_with_the_same_specification_alone(tmp_path):
    filled_store(tmp_path / "s", small_spec(), [0])
    assert list(ActivationStore.create(tmp_path / "s", small_spec()).committed()) == [0]
    with pytest.raises(StoreError, match=r"seed: 7 there, 8 asked") as error:
        ActivationStore.create(tmp_path / "s", small_spec(seed=8))
    assert "n_sequences" not in str(error.value)


def test_create_after_the_groups_have_changed_is_refused(tmp_path):
    filled_store(tmp_path / "s", small_spec(**GROUPED), [0])
    with pytest.raises(
        StoreError, match=r"groups: \[\[0, 2\], \[1\]\] there, \[\[0\], \[1, 2\]\] asked"
    ):
        ActivationStore.create(tmp_path / "s", small_spec(groups=((0,), (1, 2))))


def test_create_that_was_killed_starts_over(tmp_path):
    store = ActivationStore.create(tmp_path / "s", small_spec(dtype="float16"))
    (store.place.folder / "zarr.json").unlink()
    with pytest.raises(StoreError, match="there is no activation store"):
        ActivationStore.open(store.place.folder)
    filled_store(tmp_path / "s", small_spec())
    assert files_of(tmp_path / "s") == files_of(
        filled_store(tmp_path / "t", small_spec()).place.folder
    )


def test_activations_that_are_not_finite_are_refused_by_layer(tmp_path):
    store = ActivationStore.create(tmp_path / "s", small_spec(**GROUPED))
    arrays, columns = shard_content(store.spec, 0)
    sequence, position = store.spec.rows_of(0)
    layers = store.spec.row_layers("groups/0", sequence, position)
    row = int(np.flatnonzero(layers == 2)[0])
    for value in (np.nan, np.inf):
        x = activation(sequence, position, layers, store.spec.d_model)
        x[row, 3] = value
        arrays |= encoded(store.spec, 0, {"groups/0": x})
        with pytest.raises(
            StoreError, match=r"1 of 30 .* not finite \(layer 2; the first at .*model\.dtype"
        ):
            store.write_shard(0, arrays, columns)
    assert store.missing() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda a, c: a.pop("layers/1"), "takes the arrays"),
        (lambda a, c: c.pop("token_id"), "takes the columns"),
        (
            lambda a, c: a.update(
                {
                    "layers/1": EncodedRows.empty(
                        29, "float32", RowMemory(29, 6, np.dtype(np.float32))
                    )
                }
            ),
            r"shape \(29, 6\)",
        ),
        (lambda a, c: c.update(token_id=c["token_id"][1:]), r"shape \(29,\)"),
        (lambda a, c: c.update(sequence=c["sequence"][::-1]), "not in its order"),
    ],
)
def test_a_shard_that_is_not_whole_is_refused(tmp_path, spoil, named):
    store = ActivationStore.create(tmp_path / "s", small_spec())
    arrays, columns = shard_content(store.spec, 0)
    spoil(arrays, columns)
    with pytest.raises(StoreError, match=named):
        store.write_shard(0, arrays, columns)


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    for name, read in (
        ("layers/1/x/c/1/0", lambda opened: opened.read("layers/1", 30, 60)),
        ("layers/1/norm/c/1", lambda opened: opened.column("layers/1/norm", 30, 60)),
        ("token_id/c/1", lambda opened: opened.column("token_id", 30, 60)),
    ):
        path = store.place.folder / name
        whole = path.read_bytes()
        for i in np.random.default_rng(0).integers(0, len(whole), 25):
            flipped = bytearray(whole)
            flipped[i] ^= 1 << (int(i) % 8)
            path.write_bytes(flipped)
            with pytest.raises(StoreError, match="damaged"):
                read(ActivationStore.open(store.place.folder))  # which has checked nothing yet
        path.write_bytes(whole)


def test_a_missing_or_truncated_file_is_named(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    path = store.place.folder / "layers/1/x/c/1/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="layers/1/x/c/1/0 is gone or has another length"):
        store.read("layers/1", 59, 61)
    path.unlink()
    with pytest.raises(StoreError, match="layers/1/x/c/1/0 is gone"):
        store.read("layers/1", 59, 61)


def test_an_edited_commit_record_is_named(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    path = store.place.folder / "commits/000001.json"
    path.write_text(path.read_text().replace('"rows": 30', '"rows": 31'))
    with pytest.raises(StoreError, match=r"000001\.json is not the record that was written"):
        ActivationStore.open(store.place.folder).committed()
    path.write_text("{}")
    with pytest.raises(StoreError, match=r"000001\.json is not the record"):
        ActivationStore.open(store.place.folder).committed()


def test_a_commit_record_of_another_store_is_named(tmp_path):
    other = filled_store(tmp_path / "other", small_spec(seed=8), [1])
    store = ActivationStore.create(tmp_path / "s", small_spec())
    (store.place.folder / "commits").mkdir()
    (other.place.folder / "commits/000001.json").rename(store.place.folder / "commits/000001.json")
    with pytest.raises(StoreError, match="is of shard 1 of the store"):
        store.record(1)


def test_a_store_of_another_version_is_refused(tmp_path):
    store = ActivationStore.create(tmp_path / "s", small_spec())
    root = store.place.folder / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"] |= {"strata_format": 4, "crc32c": "of version 4"}
    root.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="format version 4, and this Strata reads 2 to 3"):
        ActivationStore.open(store.place.folder)


def test_a_store_of_other_weights_or_text_is_refused_and_so_are_its_shards(tmp_path):
    there = filled_store(tmp_path / "s", small_spec(source="a"), [1])
    assert ActivationStore.create(there.place, small_spec(source="a")).record(1) == there.record(1)
    with pytest.raises(StoreError, match="or other text: a there, b asked"):
        ActivationStore.create(there.place, small_spec(source="b"))
    other = filled_store(tmp_path / "other", small_spec(source="b"), [1])
    shutil.copytree(there.place.folder, other.place.folder, ignore=_roots, dirs_exist_ok=True)
    with pytest.raises(StoreError, match="is of shard 1 of the store"):
        ActivationStore.open(other.place).record(1)


def _roots(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "zarr.json"]


def test_a_store_without_a_source_is_of_the_version_before_and_may_be_of_any(tmp_path):
    there = filled_store(tmp_path / "s", small_spec(), [1])
    root = json.loads((there.place.folder / "zarr.json").read_text())["attributes"]
    assert root["strata_format"] == 2
    assert "source" not in root["spec"]
    again = ActivationStore.create(there.place, small_spec(source="a"))
    assert again.spec == small_spec()
    assert again.record(1) == there.record(1)
    (there.place.folder / "zarr.json").unlink()  # as a repair does with a damaged one
    again = ActivationStore.create(there.place, small_spec(source="a"))
    assert again.spec == small_spec()
    assert again.record(1) == there.record(1)
    sourced = ActivationStore.create(tmp_path / "sourced", small_spec(source="a"))
    root = json.loads((sourced.place.folder / "zarr.json").read_text())["attributes"]
    assert root["strata_format"] == 3
    assert root["spec"]["source"] == "a"
    assert ActivationStore.open(sourced.place).spec == small_spec(source="a")


@pytest.mark.parametrize("there", [2, 3])
def test_one_bit_between_two_versions_is_damage(tmp_path, there):
    store = ActivationStore.create(tmp_path / "s", small_spec(source="a" if there == 3 else ""))
    root = store.place.folder / "zarr.json"
    text = root.read_text()
    assert f'"strata_format": {there}' in text
    root.write_text(text.replace(f'"strata_format": {there}', f'"strata_format": {5 - there}'))
    with pytest.raises(StoreError, match="its checksum does not match"):
        ActivationStore.open(store.place)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"attributes": {}}', '{"attributes": {"strata_format": 2}}']
)
def test_a_folder_that_is_no_store_is_named(tmp_path, text):
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match="is not an activation store"):
        ActivationStore.open(tmp_path)


def test_wrong_rows_and_names_are_named(tmp_path):
    store = filled_store(tmp_path / "s", small_spec())
    with pytest.raises(StoreError, match="rows 0 to 110"):
        store.read("layers/0", 100, 111)
    with pytest.raises(StoreError, match="there is no array 'layers/7'"):
        store.read("layers/7", 0, 1)
    with pytest.raises(StoreError, match="there is no column 'norm'"):
        store.column("norm", 0, 1)
