import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.errors import StoreError
from storage.object_store import PART_BYTES, ObjectPlace
from storage.places import LocalPlace, Place, place
from tests.object_server import (
    BUCKET,
    ENVIRONMENTS,
    FAULTS,
    SCHEMES,
    SECRET,
    disturbed,
    forgetful,
    object_server,
    refusing_server,
    use,
)

HASTE = {"request_seconds": 1.0, "patience_seconds": 1.0}
ANYWHERE = pytest.mark.parametrize("scheme", ["disk", *SCHEMES], indirect=True)
BIG = np.random.default_rng(0).bytes(PART_BYTES * 2 + 12345)


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def endpoint(scheme):
    with object_server(scheme) as endpoint:
        yield endpoint


@pytest.fixture
def in_bucket(scheme, endpoint, monkeypatch, request) -> Place:
    use(monkeypatch, endpoint, scheme)
    return place(f"{scheme}://{BUCKET}/{request.node.name}")


@pytest.fixture
def somewhere(scheme, tmp_path, request) -> Place:
    return place(tmp_path) if scheme == "disk" else request.getfixturevalue("in_bucket")


@ANYWHERE
def test_what_is_written_is_read_back_listed_and_deleted(somewhere):
    content = {"a/b/one": b"1", "a/two": b"", "three.json": b"xyz" * 1000}
    for name, data in content.items():
        record = somewhere.write(name, [data[:1], data[1:]])
        assert record.n_bytes == len(data) == somewhere.size(name)
    assert somewhere.names() == sorted(content)
    assert somewhere.names("a") == ["a/b/one", "a/two"]
    assert {name: somewhere.read(name) for name in content} == content
    assert (somewhere / "a").read("two") == b""
    assert (somewhere / "a").names("b") == ["b/one"]
    somewhere.delete("a/two")
    somewhere.delete("a/two")
    assert somewhere.names("a") == ["a/b/one"]


@ANYWHERE
def test_what_is_not_there_is_said_so(somewhere):
    assert somewhere.size("none") is None
    assert somewhere.names("none") == []
    with pytest.raises(FileNotFoundError):
        somewhere.read("none")


def test_both_kinds_record_the_same_of_the_same_bytes(tmp_path, in_bucket):
    parts = [BIG[:1000], BIG[1000:]]
    assert in_bucket.write("big", parts) == place(tmp_path).write("big", parts)
    assert in_bucket.read("big") == BIG
    in_bucket.write("big", [b"less"])
    assert in_bucket.read("big") == b"less"


@ANYWHERE
def test_zarr_reads_through_a_place(tmp_path, somewhere):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    zarr.create_array(tmp_path / "elsewhere", name="x", data=values)
    written = place(tmp_path / "elsewhere")
    for name in written.names():
        somewhere.write(name, [written.read(name)])
    np.testing.assert_array_equal(
        zarr.open_array(somewhere.zarr_store(), path="x", mode="r")[:], values
    )


@ANYWHERE
def test_a_place_is_its_location(somewhere):
    copy = pickle.loads(pickle.dumps(somewhere / "x"))
    assert copy == somewhere / "x" == place(str(somewhere / "x"))
    assert SECRET.encode() not in pickle.dumps(somewhere)
    assert (copy.folder is None) == isinstance(somewhere, ObjectPlace)


def test_paths_stay_paths():
    assert place("runs/one") == LocalPlace(Path("runs/one")) == place(Path("runs/one"))


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_refused_and_slow_requests_change_nothing(scheme, endpoint, monkeypatch, seed):
    small = [np.random.default_rng(i).bytes(1000 + i) for i in range(20)]
    with disturbed(endpoint, seed) as (way, done):
        use(monkeypatch, way, scheme)
        disturbed_place = place(f"{scheme}://{BUCKET}/seed{seed}")
        for i, data in enumerate(small):
            disturbed_place.write(f"small/{i}", [data])
        disturbed_place.write("big", [BIG])
        assert [disturbed_place.read(f"small/{i}") for i in range(20)] == small
        assert disturbed_place.read("big") == BIG
        names = disturbed_place.names()
    assert set(done) == set(FAULTS)
    use(monkeypatch, endpoint, scheme)
    undisturbed = place(f"{scheme}://{BUCKET}/seed{seed}")
    assert undisturbed.names() == names == sorted(["big", *(f"small/{i}" for i in range(20))])
    assert [undisturbed.read(f"small/{i}") for i in range(20)] == small
    assert undisturbed.read("big") == BIG


def test_parts_are_put_together_though_the_answer_is_lost(scheme, endpoint, monkeypatch, request):
    with forgetful(endpoint) as (way, lost):
        use(monkeypatch, way, scheme)
        where = place(f"{scheme}://{BUCKET}/{request.node.name}")
        where.write("big", [BIG])
        assert len(lost) == 1
        assert where.read("big") == BIG


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (
            "ftp://bucket/x",
            "ftp:// is of no known kind; give a path, or a URL that begins with s3://",
        ),
        ("s3://", "names no bucket; give s3://BUCKET"),
        ("s3://bucket/../x", "leads out of its bucket, .*; leave out the '..'"),
        ("s3:/bucket/x", "is no folder and no URL of a bucket; give a folder, or s3://"),
        ("gs://bucket\0/x", "is no folder and no URL of a bucket"),
        ("", "is no folder and no URL of a bucket"),
        (f"s3://key:{SECRET}@bucket/x", "leave out everything else: credentials come from the env"),
        (
            f"az://container/x?sig={SECRET}",
            "leave out everything else: credentials come from the env",
        ),
    ],
)
def test_a_url_that_is_none_is_refused(location, told):
    with pytest.raises(StoreError, match=told) as error:
        place(location)
    assert SECRET not in str(error.value)


def test_a_missing_bucket_is_named(scheme, endpoint, monkeypatch):
    use(monkeypatch, endpoint, scheme)
    nowhere = f"{scheme}://no-such-bucket/x"
    with pytest.raises(FileNotFoundError):
        place(nowhere).read("y")
    told = rf"can't (write|list) {nowhere}/y?: there is no such bucket \(404 .*\); create it"
    for request in (
        lambda where: where.write("y", [b"1"]),
        lambda where: where.write("y", [BIG]),
        lambda where: where.names(),
    ):
        with pytest.raises(StoreError, match=told) as error:
            request(place(nowhere))
        assert error.value.__suppress_context__


@pytest.mark.parametrize("server", ["absent", "silent"])
def test_a_server_that_does_not_answer_is_given_up_in_the_stated_time(scheme, monkeypatch, server):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen(16)
        use(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}", scheme)
        with pytest.raises(
            StoreError,
            match=r"did not answer within 1 s of trying, 1 s a request; check the network, and "
            + {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}[
                scheme
            ],
        ):
            ObjectPlace(f"{scheme}://{BUCKET}/x", **HASTE).write("y", [b"1"])


def test_an_object_that_is_gone_is_told_without_what_the_server_repeats(scheme, monkeypatch):
    with refusing_server(404) as endpoint:
        use(monkeypatch, endpoint, scheme)
        with pytest.raises(FileNotFoundError) as error:
            place(f"{scheme}://{BUCKET}/x").read("y")
    assert str(error.value) == f"[Errno 2] No such file or directory: '{scheme}://{BUCKET}/x/y'"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_said_so_and_not_repeated(scheme, monkeypatch, status):
    with refusing_server(status) as endpoint:
        use(monkeypatch, endpoint, scheme)
        where = place(f"{scheme}://{BUCKET}/x")
        for request in (
            lambda: where.write("y", [b"1"]),
            lambda: where.read("y"),
            lambda: where.size("y"),
            where.names,
            lambda: where.delete("y"),
        ):
            with pytest.raises(StoreError) as error:
                request()
            text = str(error.value)
            assert f"the server refuses these credentials ({status}" in text
            assert "allow them to list, read, write and delete there" in text
            assert not any(value in text for value in ENVIRONMENTS[scheme].values())
            assert error.value.__suppress_context__


@pytest.mark.parametrize("scheme", ["gs", "az"], indirect=True)
def test_a_wrong_key_is_refused_by_the_server_itself(scheme, endpoint, monkeypatch):
    use(monkeypatch, endpoint, scheme)
    wrong = {"gs": "GOOGLE_BEARER_TOKEN", "az": "AZURE_STORAGE_ACCOUNT_KEY"}[scheme]
    monkeypatch.setenv(wrong, "d3Jvbmc=")
    with pytest.raises(StoreError, match=r"refuses these credentials \(40[13]") as error:
        place(f"{scheme}://{BUCKET}/x").write("y", [b"1"])
    assert "d3Jvbmc=" not in str(error.value)


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("gs", {"GOOGLE_BEARER_TOKEN": None, "GOOGLE_SERVICE_ACCOUNT_KEY": SECRET}),
        ("gs", {"GOOGLE_BEARER_TOKEN": None, "GOOGLE_APPLICATION_CREDENTIALS": f"/no/{SECRET}"}),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": f"{SECRET}!"}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": None}),
    ],
    ids=["gs-no-json", "gs-no-file", "az-no-base64", "az-no-account"],
    indirect=["scheme"],
)
def test_settings_that_can_not_be_used_are_said_so_and_not_repeated(scheme, monkeypatch, changes):
    use(monkeypatch, "http://127.0.0.1:1", scheme)
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(
        StoreError, match=r"can't open .*: the environment lacks a setting"
    ) as error:
        place(f"{scheme}://{BUCKET}/x").write("y", [b"1"])
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__
