"""Files written past the system's memory hold what was given, piece by piece, on any file system."""

import errno
import fcntl
import os
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import bulk_file
from storage.bulk_file import STAGE_BYTES, BulkFile
from storage.files import is_cached


def written(path, parts) -> bytes:
    with closing(BulkFile(path)) as file:
        for part in parts:
            file.write(part)
        file.sync()
    return path.read_bytes()


def takes_direct_writes(folder) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 30_000), max_size=8))
def test_a_file_holds_its_parts_one_after_the_other(sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("bulk") / "file"
    parts = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_file, "STAGE_BYTES", 8192)
        assert written(path, parts) == b"".join(parts)


def test_a_large_file_goes_past_the_systems_memory_and_its_end_through_it(tmp_path):
    path = tmp_path / "file"
    data = np.arange(STAGE_BYTES // 4 + 5, dtype=np.uint32).view(np.uint8)
    assert written(path, [data]) == data.tobytes()
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system writes through the system's memory alone")
    path.unlink()
    with closing(BulkFile(path)) as file:
        file.write(data)
        file.sync()
    assert not is_cached(path, 0)
    assert is_cached(path, len(data) - 1)


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
