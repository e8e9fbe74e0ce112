"""Files written past the system's memory hold what was given, piece by piece, on any file system."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import bulk_file
from storage.bulk_file import PIECE_BYTES, STAGE_BYTES, BulkFile
from storage.files import is_cached


def written(path, parts) -> bytes:
    write(path, parts)
    return path.read_bytes()


def write(path, parts) -> None:
    with closing(BulkFile(path)) as file:
        for part in parts:
            file.write(part)
        file.sync()


def stays_out_of_memory(way, path) -> bool:
    """Whether the system keeps what is written directly out of its memory, in one of three tries: any
    single write it may take through it all the same."""
    for _ in range(3):
        path.unlink(missing_ok=True)
        way(path)
        if not is_cached(path, 0):
            return True
    return False


def write_directly(path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    try:
        os.write(descriptor, mmap.mmap(-1, STAGE_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@settings(max_examples=30)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["given", "made", "made, then others given"]), st.integers(0, 30_000)
        ),
        max_size=8,
    )
)
def test_a_file_holds_its_parts_one_after_the_other(parts, tmp_path_factory):
    """Whether they were made in the file's own memory, which holds 24,000 bytes here, or given."""
    path = tmp_path_factory.mktemp("bulk") / "file"
    expected = b""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("STAGE_BYTES", 8192), ("PIECE_BYTES", 16_000), ("_FREE", [])):
            patch.setattr(bulk_file, name, value)
        with closing(BulkFile(path)) as file:
            for i, (way, size) in enumerate(parts):
                data = np.random.default_rng(i).bytes(size)
                if way == "given":
                    file.write(data)
                else:
                    memory = file.room(size)
                    memory[:] = np.frombuffer(data, np.uint8)
                    file.write(memory if way == "made" else data[::-1])
                expected += data[::-1] if way == "made, then others given" else data
            file.sync()
    assert path.read_bytes() == expected


def test_files_that_are_written_at_once_have_memory_of_their_own(tmp_path):
    sizes = STAGE_BYTES + 5, STAGE_BYTES + 7
    files = [BulkFile(tmp_path / str(size)) for size in sizes]
    for start in range(0, max(sizes), PIECE_BYTES):
        for file, size in zip(files, sizes, strict=True):
            memory = file.room(min(PIECE_BYTES, size - start))
            memory[:] = size % 251
            file.write(memory)
    for file in files:
        file.sync()
        file.close()
    for size in sizes:
        assert (tmp_path / str(size)).read_bytes() == bytes([size % 251]) * size


FORKED = """
import os, sys
from contextlib import closing
from pathlib import Path
from storage.bulk_file import BulkFile

BulkFile(Path(sys.argv[1])).close()  # its memory is free again, here and in the child
ready, go = os.pipe()
child = os.fork()
if not child:
    os.read(ready, 1)
    BulkFile(Path(os.devnull)).room(9)[:] = 2
    os._exit(0)
with closing(BulkFile(Path(sys.argv[1]))) as file:
    memory = file.room(9)
    memory[:] = 1
    os.write(go, b"x")
    os.waitpid(child, 0)
    file.write(memory)
    file.sync()
"""


def test_a_forked_process_writes_from_memory_of_its_own(tmp_path):
    subprocess.run([sys.executable, "-c", FORKED, tmp_path / "file"], check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == b"\1" * 9


def test_a_large_file_goes_past_the_systems_memory_and_its_end_through_it(tmp_path):
    path = tmp_path / "file"
    data = np.arange(STAGE_BYTES // 4 + 5, dtype=np.uint32).view(np.uint8)
    assert written(path, [data]) == data.tobytes()
    assert is_cached(path, len(data) - 1)
    try:
        direct = stays_out_of_memory(write_directly, tmp_path / "probe")
    except OSError:
        direct = False
    if not direct:
        pytest.skip("this file system writes through the system's memory alone")
    assert stays_out_of_memory(lambda new: write(new, [data]), path)


def test_a_file_system_that_refuses_gets_it_the_usual_way(tmp_path, monkeypatch):
    """What NFS and FUSE may answer, at the switch or at the first write."""
    usual = fcntl.fcntl

    def refuses(descriptor, command, *flags):
        if command == fcntl.F_SETFL and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return usual(descriptor, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", refuses)
    data = os.urandom(STAGE_BYTES + 3)
    assert written(tmp_path / "file", [data[:7], data[7:]]) == data
