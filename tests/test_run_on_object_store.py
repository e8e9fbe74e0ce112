"""A whole run whose tokens and activations lie in a bucket."""

from pathlib import Path

import pytest

from storage.places import place
from tests.object_server import BUCKET, ENVIRONMENTS, SCHEMES, object_server, use
from tests.runs import SMALL_RUN, strata, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.crash
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_in_a_bucket_leaves_no_store_on_the_disk_and_no_credentials_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    with object_server(scheme) as endpoint:
        use(monkeypatch, endpoint, scheme)
        store = f"{scheme}://{BUCKET}/run"
        config = write_config(
            tmp_path,
            harvest={**SMALL_RUN["harvest"], "tokens": 20_000, "store": store},
            sweep={**SMALL_RUN["sweep"], "tokens": 20_000, "encoders": ["dense"]},
        )
        status, output = strata("run", config)
        assert status == 0, output
        names = place(store).names()
        for name in ("tokens.zarr", "pilot.zarr", "validation.zarr", "train.zarr"):
            assert f"{name}/zarr.json" in names
        run = tmp_path / "runs" / "small"
        assert (run / "summary.json").is_file()
        assert not list(run.glob("*.zarr"))
        written = {name: place(store).read(name) for name in names}
        written |= {str(f): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert any(name.endswith("mlflow.db") for name in written)
        for secret in {v for k, v in ENVIRONMENTS[scheme].items() if k != "AWS_REGION"}:
            assert secret not in output
            assert [name for name, data in written.items() if secret.encode() in data] == []

        status, output = strata("verify", config)
        assert status == 0, output
        other = write_config(
            tmp_path / "other",
            harvest={**SMALL_RUN["harvest"], "tokens": 10_000, "store": store},
        )
        status, output = strata("harvest", other)
        assert status == 2
        assert f"{store} belongs to another configuration" in output
        assert "set another harvest.store" in output


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("ftp://x/y", "harvest.store: a store at ftp:// is of no known kind"),
        (f"s3://no-such-{BUCKET}/x", "there is no such bucket"),
    ],
)
def test_a_store_that_can_not_be_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, told: str
):
    with object_server() as endpoint:
        use(monkeypatch, endpoint)
        config = write_config(tmp_path, harvest={**SMALL_RUN["harvest"], "store": store})
        status, output = strata("run", config)
    assert status == 2, output
    assert told in output
    assert "Traceback" not in output
