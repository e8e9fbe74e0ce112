"""The `zarr.json` files of an activation store: what makes it one, for any program that reads Zarr."""

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec

from storage.dtypes import stored_dtype
from storage.errors import StoreError
from storage.files import write_file
from storage.layout import StoreSpec

FORMAT_VERSION = 1
"""Raised when a program that knows only the former would misread a store."""


def write_metadata(path: Path, spec: StoreSpec) -> None:
    """Declare the store's arrays and columns, and at last the store itself.

    The root's file comes last and atomically: where it is missing there is no store yet, and this
    function, called again, starts over.
    """
    for array in spec.arrays:
        zarr.create_array(
            path / array / "x",
            shape=(spec.n_rows, spec.d_model),
            chunks=(spec.chunk_rows, spec.d_model),
            shards=(spec.shard_rows, spec.d_model),
            dtype=stored_dtype(spec.dtype),
            compressors=[Crc32cCodec()],
            fill_value=0,
            attributes={"logical_dtype": spec.dtype},
            dimension_names=("row", "d_model"),
            overwrite=True,
        )
    for column, dtype in spec.columns.items():
        zarr.create_array(
            path / column,
            shape=(spec.n_rows,),
            chunks=(spec.shard_rows,),
            dtype=dtype,
            compressors=[Crc32cCodec()],
            fill_value=0,
            dimension_names=("row",),
            overwrite=True,
        )
    for array in spec.arrays:
        _write_group(path / array, {})
    _write_group((path / spec.arrays[0]).parent, {})
    _write_group(path, {"strata_format": FORMAT_VERSION, "spec": spec.to_json()})


def _write_group(path: Path, attributes: dict[str, Any]) -> None:
    metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    write_file(path / "zarr.json", [json.dumps(metadata, indent=2).encode()])


def has_metadata(path: Path) -> bool:
    """Whether there is a store at `path`."""
    return (path / "zarr.json").exists()


def read_spec(path: Path) -> StoreSpec:
    """The specification of the store at `path`.

    Raises:
        StoreError: If there is none, or this version of Strata can't read it.
    """
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        version, spec = attributes["strata_format"], attributes["spec"]
    except FileNotFoundError:
        raise StoreError(
            f"there is no activation store at {path}; `strata harvest` makes it"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is not an activation store ({error!r} in its zarr.json); "
            "give the folder of one, or delete it and harvest again"
        ) from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, and this Strata reads {FORMAT_VERSION}; "
            "use the Strata that wrote it, or harvest again into another run directory"
        )
    return StoreSpec.from_json(spec)
