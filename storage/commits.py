"""Commit records: a shard counts when its record exists, and the record is written last.

Of a shard that was released the record and the columns stay, and a mark beside the record says that its
activations are gone.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass

import google_crc32c

from storage.errors import RecordError
from storage.files import FileRecord
from storage.places import Place

_READ_AT_ONCE = 16
"""Records; one after the other they take minutes where each is a request."""

_FIRST_FEW = 16

_NAME = re.compile(r"commits/(\d+)\.json")
_MARK = re.compile(r"commits/(\d+)\.released")


@dataclass(frozen=True, kw_only=True)
class LayerTotals:
    """What a shard holds of one layer."""

    rows: int
    """Activations of this layer."""

    norm_sum: float
    """Sum of their Euclidean norms, in the model's units."""

    n_clipped: int
    """Values too large for the store's dtype, stored as its largest; 0 is what one wants."""

    squared_error: float | None = None
    """Of int8: sum of the squared differences between the rows as read and as given, else None."""

    squared_deviation: float | None = None
    """Of int8: sum of the rows' squared distances, as read, from their mean in this shard, else None."""


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

    def __init__(self, place: Place, store: str) -> None:
        """Of the store at a place, whose digest is `store`."""
        self._place = place
        self._store = store
        self._records: dict[int, ShardRecord] = {}

    def committed(self) -> dict[int, ShardRecord]:
        """All records by shard, ascending.

        Raises:
            StoreError: If a record is damaged or belongs to another store.
        """
        shards = self.shards()
        with ThreadPoolExecutor(_READ_AT_ONCE) as threads:
            return dict(zip(shards, threads.map(self.record, shards), strict=True))

    def __contains__(self, shard: int) -> bool:
        return shard in self._records or self._place.size(_name(shard)) is not None

    def record(self, shard: int) -> ShardRecord:
        """The record of a committed shard. Committed is for ever, so it is read once.

        Raises:
            RecordError: If it is damaged or belongs to another store.
            StoreError: If it can't be read.
        """
        if shard not in self._records:
            name = _name(shard)
            text = self._place.read(name)
            try:
                self._records[shard] = self._parsed(text, shard)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise RecordError(
                    f"{self._place}/{name} is not the record that was written ({error}); it was edited, damaged, "
                    "or belongs to another store: `strata verify` and then `strata harvest` write "
                    "its shard again"
                ) from error
        return self._records[shard]

    def has_sound(self) -> bool:
        """Whether a record is there that is of this store; of the first few, as all are of one or few are sound."""
        for shard in self.shards()[:_FIRST_FEW]:
            with suppress(RecordError):
                self.record(shard)
                return True
        return False

    def write(self, record: ShardRecord) -> None:
        """Commit a shard, all of whose files are written."""
        self._place.write(_name(record.shard), [self.text(record, self._store)])
        self._records[record.shard] = record

    @staticmethod
    def text(record: ShardRecord, store: str) -> bytes:
        """The file of a record of the store whose digest is `store`."""
        # First as a reader will find it: layers are numbers here and text there, which sort differently from 10 on.
        body = json.loads(json.dumps({"store": store, **asdict(record)}))
        checksum = _checksum(json.dumps(body, sort_keys=True))
        return json.dumps({"crc32c": checksum, "record": body}, sort_keys=True).encode()

    def remove(self, shard: int) -> None:
        """Take a commit back, so that the next harvest writes the shard again."""
        self._records.pop(shard, None)
        self._place.delete(_name(shard))

    def shards(self) -> list[int]:
        """The shards that have a record, sound or not, ascending."""
        return self._listed(_NAME)

    def released(self) -> list[int]:
        """The shards whose activations are gone, ascending."""
        return self._listed(_MARK)

    def mark_released(self, shard: int) -> None:
        """Note that a shard's activations are going."""
        self._place.write(_mark(shard), [])

    def mark_whole(self, shard: int) -> None:
        """Note that a shard's activations are there again."""
        self._place.delete(_mark(shard))

    def is_released(self, shard: int) -> bool:
        """Whether a shard's activations are gone."""
        return self._place.size(_mark(shard)) is not None

    def _listed(self, pattern: re.Pattern[str]) -> list[int]:
        matches = map(pattern.fullmatch, self._place.names("commits"))
        return sorted(int(match[1]) for match in matches if match)

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
            files={name: FileRecord.from_json(file) for name, file in body["files"].items()},
            layers={int(layer): LayerTotals(**t) for layer, t in body["layers"].items()},
        )


def _name(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def _mark(shard: int) -> str:
    return f"commits/{shard:06d}.released"


def _checksum(text: str) -> str:
    return f"{google_crc32c.value(text.encode()):08x}"
