"""Disk that a run takes, what of it is written already, and whether the rest has room."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import disk_usage

from actors.language_model import ModelShape
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.labels import size
from orchestrator.planning import requests
from orchestrator.run_directory import RunDirectory
from sae.config import SaeConfig
from storage.commits import CommitLog
from storage.layout import StoreSpec
from storage.metadata import has_metadata
from storage.places import Place
from storage.shards import CHECKSUM_BYTES, INDEX_ENTRY_BYTES
from storage.sizes import store_bytes
from storage.tokens import CHUNKS_PER_SHARD

_FLOAT = 4

_TOKEN_METADATA_BYTES = 8192
"""Of all `zarr.json` of packed tokens, but for what the root says of each file."""

_TOKEN_RECORD_BYTES = 100
"""Which is that."""


def token_bytes(shape: ModelShape, context: int, specs: Mapping[str, StoreSpec]) -> int:
    """Of the packed tokens, at most: ids as they are compressed, and a bit each for where documents end."""
    populations = [specs[name].n_population for name in ("train", "validation")]
    n_tokens = context * sum(populations)
    n_files = 2 * sum(requests.token_files(n, context) for n in populations)
    each = CHUNKS_PER_SHARD * INDEX_ENTRY_BYTES + CHECKSUM_BYTES + _TOKEN_RECORD_BYTES
    compressed = n_tokens * ((shape.vocabulary - 1).bit_length() + 1) // 8
    return compressed + n_files * each + _TOKEN_METADATA_BYTES


def trials_bytes(cfg: RunConfig, saes: Sequence[SaeConfig], at_once: int) -> int:
    """Of trials, at most: their autoencoders, MLflow's copies where it writes beside the run, and checkpoints.

    Args:
        cfg: Of the run.
        saes: What they train.
        at_once: That are trained at a time here; one that has ended has no checkpoint, one that waits
            at a rung has, and one that is writing the next has both.
    """
    weights = sorted(sae.n_parameters * _FLOAT for sae in saes)
    counters = 8 * max((sae.d_sae for sae in saes), default=0)
    checkpoints = [3 * n_bytes + counters for n_bytes in weights]
    copies = 2 if cfg.tracking.sqlite_file or cfg.tracking.uri is None else 1
    # How many places a cluster has is not known here.
    all_may_have_one = cfg.sweep.stop.method == "asha" or cfg.compute.address is not None
    kept = checkpoints if all_may_have_one else checkpoints[-at_once:]
    return copies * sum(weights) + sum(kept) + sum(checkpoints[-at_once:])


def left_bytes(
    run: RunDirectory, planned: Mapping[str, int], specs: Mapping[str, StoreSpec], trials: int
) -> dict[str, int]:
    """Of what is planned in the run directory, what is still to be written: nothing of what is there and whole.

    Args:
        run: Where.
        planned: Bytes by store.
        specs: Of the activation stores.
        trials: Bytes of those that are to be trained yet.
    """
    left = {"trials": trials}
    if run.store.folder is not None:
        left["tokens"] = 0 if has_metadata(run.tokens) else planned["tokens"]
        for name, store in (
            ("pilot", run.pilot),
            ("validation", run.validation),
            ("train", run.train),
        ):
            left[name] = max(0, planned[name] - _there(store, specs[name]))
    return left


def _there(store: Place, spec: StoreSpec) -> int:
    """Bytes, as planned, of the shards that are written and not released."""
    commits = CommitLog(store, spec.digest)
    n_shards = len(set(commits.shards()) - set(commits.released()))
    return sum(store_bytes(spec).values()) * n_shards // spec.n_shards


def by_disk(
    run_dir: Path, store: Place, left: Mapping[str, int]
) -> list[tuple[str, Path, dict[str, int]]]:
    """What is still to be written on disks, as `left_bytes` gives it: the setting that names each, where, and what."""
    folder = store.folder
    if folder is None or _disk(folder) == _disk(run_dir):
        return [("run_dir", run_dir, dict(left))]
    stores = {name: n for name, n in left.items() if name != "trials"}
    return [("run_dir", run_dir, {"trials": left["trials"]}), ("harvest.store", folder, stores)]


def refuse_full_disk(cfg: RunConfig, left: Mapping[str, int], bound: str) -> None:
    """Compare what is still to be written with the room for it.

    Args:
        cfg: Of the run.
        left: As `left_bytes` gives it.
        bound: What is said where it may be less.

    Raises:
        UserError: If there is too little.
    """
    for setting, folder, parts in by_disk(cfg.run_dir, RunDirectory.of(cfg).store, left):
        needed, free = sum(parts.values()), free_disk_bytes(folder)
        if needed <= free:
            continue
        settings = []
        is_new = left.get("tokens", 1) > 0  # or it lies in a bucket, where that is not looked up
        if is_new and parts.get("trials", 0) > needed / 2:
            settings = ["list less in sweep.k and sweep.encoders, or lower sweep.d_sae"]
        elif "train" in parts and left["tokens"]:
            settings = ["lower harvest.tokens", *(["set group.n_groups"] if bound else [])]
        elif parts.get("train"):  # the run belongs to the others
            settings = [
                "set harvest.disk_budget, which may change (--set harvest.disk_budget=10GB)"
            ]
        told = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
        raise UserError(
            f"the plan needs {size(needed)} more of disk{bound} ({told}), and {folder} has {size(free)}; "
            + ", ".join([*settings, f"free as much, or move {setting} to a larger disk"])
        )


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    return disk_usage(_existing(path)).free


def _disk(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def bytes_under(path: Path) -> int:
    """What is written there already."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
