"""Compressed or not, in place or through zarr: the same numbers, and the bytes that zarr would write."""

import warnings

import numpy as np
import pytest
import zarr

from storage.activations import ActivationStore
from storage.codecs import CODECS, declaration
from storage.errors import StoreError
from storage.files import is_cached
from tests.stores import activation, files_of, filled_store, small_spec

GROUPED = {"groups": ((0, 2), (1,))}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("groups", [{}, GROUPED], ids=["layers", "groups"])
def test_reading_in_place_gives_the_bytes_that_zarr_gives(tmp_path, dtype, groups):
    path = filled_store(tmp_path / "s", small_spec(dtype=dtype, **groups)).place.folder
    mapped, through_zarr = (ActivationStore.open(path, memory_map=m) for m in (True, False))
    spans = [(0, 110), (0, 10), (7, 13), (10, 20), (29, 31), (90, 110), (105, 110), (40, 40)]
    for array in mapped.spec.arrays:
        for span in spans:
            ours, theirs = (s.read_stored(array, *span) for s in (mapped, through_zarr))
            assert ours.tobytes() == theirs.tobytes()
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            zarrs = zarr.open_array(path / array / "norm", mode="r")[span[0] : span[1]]
            np.testing.assert_array_equal(mapped.column(f"{array}/norm", *span), zarrs)


def test_a_chunk_is_checked_when_it_is_first_touched_and_others_are_not_needed(tmp_path):
    path = filled_store(tmp_path / "s", small_spec()).place.folder
    file = path / "layers/1/x/c/1/0"
    data = bytearray(file.read_bytes())
    data[244 + 17] ^= 1  # in the second of its chunks
    file.write_bytes(data)
    store = ActivationStore.open(path)
    assert len(store.read("layers/1", 30, 40)) == 10
    with pytest.raises(StoreError, match=r"layers/1/x, shard 1, chunk 1 of .* is damaged"):
        store.read("layers/1", 30, 60)


@pytest.mark.parametrize("codec", CODECS[1:])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_codec_changes_no_number_and_writes_what_zarr_writes(tmp_path, codec, dtype):
    if (codec, dtype) == ("pcodec", "int8"):
        with pytest.raises(StoreError, match="pcodec for float16"):
            small_spec(codec=codec, dtype=dtype)
        return
    warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")
    plain = filled_store(tmp_path / "plain", small_spec(dtype=dtype))
    store = filled_store(tmp_path / "s", small_spec(dtype=dtype, codec=codec))
    spec = store.spec
    assert files_of(store.place.folder) == files_of(
        filled_store(tmp_path / "again", spec, [2, 0, 3, 1]).place.folder
    )
    ours = zarr.open_array(store.place.folder / "layers/1/x", mode="r")
    theirs = zarr.create_array(
        tmp_path / "t",
        shape=ours.shape,
        dtype=ours.dtype,
        chunks=ours.chunks,
        shards=ours.shards,
        **declaration(codec, ours.dtype),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    theirs[:] = ours[:]
    for shard in range(spec.n_shards):
        written = (store.place.folder / f"layers/1/x/c/{shard}/0").read_bytes()
        assert written == (tmp_path / f"t/c/{shard}/0").read_bytes()
    for array in spec.arrays:
        np.testing.assert_array_equal(store.read(array, 3, 110), plain.read(array, 3, 110))


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_of_a_compressed_chunk_is_found(tmp_path, codec):
    warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")
    path = filled_store(tmp_path / "s", small_spec(codec=codec)).place.folder
    file = path / "layers/1/x/c/1/0"
    whole = file.read_bytes()
    for i in np.random.default_rng(0).integers(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << (int(i) % 8)
        file.write_bytes(flipped)
        with pytest.raises(StoreError, match="damaged"):
            ActivationStore.open(path).read("layers/1", 30, 60)


def test_int8_rows_are_within_half_a_step_and_their_cost_is_recorded(tmp_path):
    store = filled_store(tmp_path / "s", small_spec(dtype="int8", **GROUPED))
    spec = store.spec
    sequence, position = (store.column(n, 0, spec.n_rows) for n in ("sequence", "position"))
    costs = store.rounding_fvu()
    for array in spec.arrays:
        layers = store.row_layers(array, 0, spec.n_rows)
        x = activation(sequence, position, layers, spec.d_model)
        got = store.read(array, 0, spec.n_rows)
        assert store.read_stored(array, 0, spec.n_rows).dtype == np.int8
        step = np.abs(x).max(axis=1) / 127
        assert (np.abs(got - x) <= 0.501 * step[:, None]).all()
        for layer in spec.layers_of(array):
            mine = layers == layer
            error = np.square((got - x)[mine].astype(np.float64)).sum()
            deviation = sum(  # about the mean of each shard
                np.square(part - part.mean(axis=0)).sum()
                for shard in range(spec.n_shards)
                for part in [
                    x[slice(*spec.shard_range(shard))][mine[slice(*spec.shard_range(shard))]]
                ]
            )
            assert 0 < costs[layer] == pytest.approx(error / deviation, rel=1e-3)
    assert sum(record.n_clipped for record in store.committed().values()) == 0


def test_the_cost_of_rounding_is_known_of_int8_alone(tmp_path):
    with pytest.raises(StoreError, match=r"has the dtype float32 .* measured for int8"):
        filled_store(tmp_path / "s", small_spec()).rounding_fvu()


def test_what_can_not_be_asked_for_does_not_count_as_cached(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert not is_cached(tmp_path / "none", 0)
    assert not is_cached(file, 3)
