"""What a user can mend about a store, as against what we got wrong."""


class StoreError(ValueError):
    """A store can't be created, written or read as asked; the message says what to do."""


class RecordError(StoreError):
    """A commit record is not the one that was written, or belongs to another store."""


class VersionError(StoreError):
    """A store is of another version of the format: nothing of it is damaged, or to be mended."""


class RowsError(StoreError):
    """Rows are such that no store holds them: the model that made them is at fault, wherever it ran."""
