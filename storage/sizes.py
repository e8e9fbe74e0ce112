"""What a store will weigh, file by file, before anything is written."""

from storage.commits import CommitLog, LayerTotals, ShardRecord
from storage.dtypes import stored_dtype
from storage.files import FileRecord
from storage.layout import StoreSpec
from storage.metadata import metadata_bytes
from storage.shards import CHECKSUM_BYTES, shard_file_bytes

_SOME_HASH, _SOME_NORM = "0123456789abcdef", 123456.0123456789


def store_bytes(spec: StoreSpec) -> dict[str, int]:
    """Bytes of every array and column, of `metadata` and of `commits`; with a codec, at most so many.

    Exact but for the commit records, whose decimal numbers have no fixed length.
    """
    chunk_bytes = spec.chunk_rows * spec.d_model * stored_dtype(spec.dtype).itemsize
    full, rest = divmod(spec.n_chunks, spec.chunks_per_shard)
    x = full * shard_file_bytes(spec.chunks_per_shard, chunk_bytes, spec.chunks_per_shard)
    if rest:
        x += shard_file_bytes(rest, chunk_bytes, spec.chunks_per_shard)
    columns = {
        name: spec.n_shards * (spec.shard_rows * dtype.itemsize + CHECKSUM_BYTES)
        for name, dtype in spec.columns.items()
    }
    return {
        **{f"{array}/x": x for array in spec.arrays},
        **columns,
        "metadata": metadata_bytes(spec),
        "commits": spec.n_shards * _commit_bytes(spec),
    }


def _commit_bytes(spec: StoreSpec) -> int:
    """Length of a commit record of a full shard."""
    measured = {"squared_error": _SOME_NORM, "squared_deviation": _SOME_NORM}
    totals = LayerTotals(
        rows=spec.shard_rows,
        norm_sum=_SOME_NORM,
        n_clipped=0,
        **(measured if spec.dtype == "int8" else {}),
    )
    record = ShardRecord(
        shard=0,
        rows=spec.shard_rows,
        files=dict.fromkeys(
            spec.shard_files(0), FileRecord(n_bytes=spec.shard_bytes(0), xxh3=_SOME_HASH)
        ),
        layers=dict.fromkeys(spec.layers, totals),
    )
    return len(CommitLog.text(record, spec.digest))
