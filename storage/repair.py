"""Takes back what is damaged, so that the next harvest writes it again, and nothing else.

Both functions may be killed and called again. What a shard holds is a pure function of the
specification, the model and the tokens, so what is written again equals what was written first.
"""

from collections.abc import Sequence

from storage.commits import CommitLog
from storage.errors import StoreError, VersionError
from storage.layout import StoreSpec
from storage.metadata import write_metadata
from storage.places import Place
from storage.root import NAME, read_root
from storage.verify import Damage, damaged_shards


def take_back_shards(place: Place, damages: Sequence[Damage]) -> None:
    """Uncommit the damaged shards of an activation store, and write damaged metadata again.

    Where the root itself is damaged it is removed: `ActivationStore.create` makes it again, and
    the shards that are sound count as before.
    """
    try:
        spec = StoreSpec.from_json(read_root(place, "activation").spec)
    except VersionError:
        raise
    except StoreError:
        place.delete(NAME)
        return
    commits = CommitLog(place, spec.digest)
    for shard in damaged_shards(damages):
        commits.remove(shard)
    if any(damage.shard is None for damage in damages):
        write_metadata(place, spec)


def take_back_tokens(place: Place) -> None:
    """Make a token store count for nothing: it is packed again as a whole."""
    place.delete(NAME)
