"""What a user can mend about a store, as against what we got wrong."""


class StoreError(ValueError):
    """A store can't be created, written or read as asked; the message says what to do."""


class VersionError(StoreError):
    """A store is of another version of the format: nothing of it is damaged, or to be mended."""
