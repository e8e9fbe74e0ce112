"""The `zarr.json` files of an activation store: what makes it one, for any program that reads Zarr."""

import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from storage.codecs import declaration
from storage.dtypes import stored_dtype
from storage.files import FileRecord
from storage.layout import StoreSpec
from storage.places import Place
from storage.root import NAME, Root, group_metadata, write_root


def write_metadata(place: Place, spec: StoreSpec) -> None:
    """Declare the store's arrays and columns, and at last the store itself.

    The root's file comes last and atomically: where it is missing there is no store yet, and this
    function, called again, starts over. Shards that are there are left alone.
    """
    files = {name: place.write(name, [data]) for name, data in _metadata_files(spec).items()}
    write_root(place, Root(spec=spec.to_json(), files=files))


def metadata_bytes(spec: StoreSpec) -> int:
    """Bytes of all `zarr.json` of a store."""
    files = _metadata_files(spec)
    some = dict.fromkeys(files, FileRecord(n_bytes=999, xxh3="0123456789abcdef"))
    return sum(map(len, files.values())) + len(Root(spec=spec.to_json(), files=some).to_bytes())


def _metadata_files(spec: StoreSpec) -> dict[str, bytes]:
    """Every `zarr.json` but the root's, by its path in the store."""
    made: dict = {}
    memory = MemoryStore(made)
    for array in spec.arrays:
        zarr.create_array(
            memory,
            name=f"{array}/x",
            shape=(spec.n_rows, spec.d_model),
            chunks=(spec.chunk_rows, spec.d_model),
            shards=(spec.shard_rows, spec.d_model),
            dtype=stored_dtype(spec.dtype),
            **declaration(spec.codec, stored_dtype(spec.dtype)),
            fill_value=0,
            attributes={"logical_dtype": spec.dtype},
            dimension_names=("row", "d_model"),
        )
    for column, dtype in spec.columns.items():
        zarr.create_array(
            memory,
            name=column,
            shape=(spec.n_rows,),
            chunks=(spec.shard_rows,),
            dtype=dtype,
            compressors=[Crc32cCodec()],
            fill_value=0,
            dimension_names=("row",),
        )
    arrays = [*(f"{array}/x" for array in spec.arrays), *spec.columns]
    files = {f"{array}/{NAME}": made[f"{array}/{NAME}"].to_bytes() for array in arrays}
    for group in (*spec.arrays, spec.arrays[0].split("/")[0]):
        files[f"{group}/{NAME}"] = group_metadata({})
    return files


def has_metadata(place: Place) -> bool:
    """Whether there is a store at a place, of activations or of tokens."""
    return place.size(NAME) is not None
