"""Commit records: a shard counts when its record exists, and the record is written last."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import google_crc32c

from storage.errors import StoreError
from storage.files import FileRecord, write_file


@dataclass(frozen=True, kw_only=True)
class LayerTotals:
    """What a shard holds of one layer."""

    rows: int
    """Activations of this layer."""

    norm_sum: float
    """Sum of their Euclidean norms, in the model's units."""

    n_clipped: int
    """Values too large for the store's dtype, stored as its largest; 0 is what one wants."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a committed shard holds."""

    shard: int
    """Its index."""

    rows: int
    """Rows of each of its arrays."""

    files: dict[str, FileRecord]
    """Every file of the shard, by its path inside the store."""

    layers: dict[int, LayerTotals]
    """Totals by layer."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.n_bytes for file in self.files.values())

    @property
    def n_clipped(self) -> int:
        """Values that were too large for the store's dtype."""
        return sum(totals.n_clipped for totals in self.layers.values())


class CommitLog:
    """The commit records of one store, as `commits/<shard>.json`."""

    def __init__(self, folder: Path, store: str) -> None:
        """Look for records in `folder` that belong to the store whose digest is `store`."""
        self._folder = folder
        self._store = store
        self._records: dict[int, ShardRecord] = {}

    def committed(self) -> dict[int, ShardRecord]:
        """All records by shard, ascending.

        Raises:
            StoreError: If a record is damaged or belongs to another store.
        """
        shards = sorted(int(path.stem) for path in self._folder.glob("[0-9]*.json"))
        return {shard: self.record(shard) for shard in shards}

    def __contains__(self, shard: int) -> bool:
        return shard in self._records or self._path(shard).is_file()

    def record(self, shard: int) -> ShardRecord:
        """The record of a committed shard. Committed is for ever, so it is read once.

        Raises:
            StoreError: If it is damaged or belongs to another store.
        """
        if shard not in self._records:
            path = self._path(shard)
            try:
                self._records[shard] = self._parsed(path.read_bytes(), shard)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise StoreError(
                    f"{path} is not the record that was written ({error}); it was edited, damaged, "
                    "or belongs to another store: delete it, and the next harvest writes its shard "
                    "again"
                ) from error
        return self._records[shard]

    def write(self, record: ShardRecord) -> None:
        """Commit a shard, all of whose files are written."""
        body = json.dumps({"store": self._store, **asdict(record)}, sort_keys=True)
        text = json.dumps({"crc32c": _checksum(body), "record": json.loads(body)}, sort_keys=True)
        write_file(self._path(record.shard), [text.encode()])
        self._records[record.shard] = record

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06d}.json"

    def _parsed(self, text: bytes, shard: int) -> ShardRecord:
        data = json.loads(text)
        body = data["record"]
        if data["crc32c"] != _checksum(json.dumps(body, sort_keys=True)):
            raise ValueError("its checksum does not match")
        if body["store"] != self._store or body["shard"] != shard:
            raise ValueError(f"it is of shard {body['shard']} of the store {body['store']}")
        return ShardRecord(
            shard=shard,
            rows=body["rows"],
            files={name: FileRecord(**file) for name, file in body["files"].items()},
            layers={int(layer): LayerTotals(**t) for layer, t in body["layers"].items()},
        )


def _checksum(text: str) -> str:
    return f"{google_crc32c.value(text.encode()):08x}"
