"""Writers that are killed, disks that are full: what is there is whole, and the rest is written later."""

import itertools
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.activations import ActivationStore
from storage.errors import StoreError
from storage.tokens import TokenSpec, TokenWriter
from storage.verify import Verification
from tests.stores import files_of, filled_store, shard_content, small_spec

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import sys
from pathlib import Path
from storage.activations import ActivationStore
from tests.stores import filled_store, small_spec

path = Path(sys.argv[1])
filled_store(path, small_spec(), ActivationStore.create(path, small_spec()).missing())
"""


def kill_once(path: Path, delay: float) -> bool:
    """Kill a writer some time after its first deed; False if it was done before."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, path], cwd=ROOT)
    seen = len(list(path.rglob("*")))
    while child.poll() is None and len(list(path.rglob("*"))) == seen:
        time.sleep(0.0005)
    time.sleep(delay)
    child.kill()
    return child.wait() < 0


@pytest.mark.parametrize("n_kills", [5, pytest.param(20, marks=pytest.mark.crash)])
def test_writers_killed_at_any_moment_leave_nothing_that_the_last_does_not_mend(tmp_path, n_kills):
    whole = files_of(filled_store(tmp_path / "whole", small_spec()).place.folder)
    moments, kills, path = random.Random(0), 0, tmp_path / "s0"
    while kills < n_kills:
        kills += kill_once(path, moments.random() * 0.1)
        if not (path / "zarr.json").exists():
            continue  # killed before the store was one
        verification = Verification(path, "activation")
        list(verification.run(n_threads=2))
        assert verification.damages == []
        store = ActivationStore.open(path)
        assert all(
            files_of(path)[name] == whole[name]
            for r in store.committed().values()
            for name in r.files
        )
        if not store.missing():
            assert files_of(path) == whole
            path = tmp_path / f"s{kills}"
    filled_store(path, small_spec())
    assert files_of(path) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "strata-test", folder]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """Take all but `left` bytes of a disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        file.writelines(itertools.repeat(b"x" * 4096))
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - left)
    return ballast


def test_a_full_disk_commits_nothing_half_and_is_gone_on_with_when_there_is_room(
    tmp_path, small_disk
):
    whole = files_of(filled_store(tmp_path / "whole", small_spec()).place.folder)
    path = small_disk / "s"
    ActivationStore.create(path, small_spec())
    ballast = fill(small_disk, left=80_000)
    with pytest.raises(StoreError, match=r"can't be written \(No space left.* make room"):
        filled_store(path, small_spec())
    committed = ActivationStore.open(path).committed()
    assert 0 < len(committed) < 4
    assert not list(path.rglob("*.partial"))
    verification = Verification(path, "activation")
    list(verification.run(n_threads=2))
    assert verification.damages == []
    ballast.unlink()
    filled_store(path, small_spec())
    assert files_of(path) == whole


def test_a_disk_that_is_full_while_text_is_packed_leaves_no_store(small_disk):
    spec = TokenSpec(context=64, first_position=0, separator_id=None, special_ids=(), tokenizer="x")
    ids = np.random.default_rng(0).integers(0, 2**31, (4096, 64), np.uint32)
    path = small_disk / "tokens.zarr"
    with pytest.raises(
        StoreError, match=r"tokens\.zarr/train/ids/c/0/0 can't be written \(No space left"
    ):
        pack(path, spec, ids)
    assert not (path / "zarr.json").exists()
    pack(path, spec, ids[:64])
    assert Verification(path, "token").damages == []


def pack(path: Path, spec: TokenSpec, ids: np.ndarray) -> None:
    writer = TokenWriter(path, spec, {"train": len(ids)})
    writer.append("train", ids, ids)
    writer.seal()


def test_a_disk_that_is_read_only_is_named(small_disk):
    store = ActivationStore.create(small_disk / "s", small_spec())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreError, match=r"can't be written \(Read-only file system\)"):
        store.write_shard(0, *shard_content(small_spec(), 0))
    with pytest.raises(StoreError, match=r"can't be written \(Read-only file system\)"):
        ActivationStore.create(small_disk / "t", small_spec())


def test_a_file_that_may_not_grow_leaves_the_shard_uncommitted(tmp_path):
    store = ActivationStore.create(tmp_path / "s", small_spec())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"layers/0/x/c/0/0 can't be written"):
            store.write_shard(0, *shard_content(small_spec(), 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.missing() == [0, 1, 2, 3]
    assert not list(store.place.folder.rglob("*.partial"))
    filled_store(store.place.folder, small_spec())
    assert files_of(store.place.folder) == files_of(
        filled_store(tmp_path / "t", small_spec()).place.folder
    )
