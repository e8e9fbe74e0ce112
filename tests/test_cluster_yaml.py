"""What a cluster is launched with holds against the schemas of those who read it."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from orchestrator.__main__ import parser
from orchestrator.jobs import SECRET_FILES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "cluster"
LAUNCHER = [ROOT / "cluster.yaml", FOLDER / "gcp.yaml", FOLDER / "on_premises.yaml"]
CLOUDS = LAUNCHER[:2]
KUBERAY = [FOLDER / "raycluster.yaml", FOLDER / "rayjob.yaml"]
SCHEMA = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())


def load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def kuberay_faults(manifest: dict[str, Any]) -> list[str]:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def texts(data: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from texts(inner)


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_launcher_of_the_pinned_ray_takes_it(file: Path):
    from ray.autoscaler._private import util

    config = load(file)
    util.validate_config(util.prepare_config(config))
    with pytest.raises(Exception, match="hed_node_type"):
        util.validate_config({**util.prepare_config(load(file)), "hed_node_type": "head"})


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.stem)
def test_in_a_cloud_the_head_computes_nothing_and_gpus_are_spot_machines_while_needed(file: Path):
    config = load(file)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["cpu_worker"]["min_workers"] == types["gpu_worker"]["min_workers"] == 0
    assert types["gpu_worker"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu_worker"]["resources"]
    assert re.search("spot|preemptible", json.dumps(types["gpu_worker"]["node_config"]))
    assert config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda file: file.stem)
def test_the_project_installs_itself_on_every_node_and_the_dashboard_stays_on_the_head(file: Path):
    config = load(file)
    assert list(config["file_mounts"].values()) == ["."]
    assert {*SECRET_FILES, ".git", ".venv", "runs"} == set(config["rsync_exclude"])
    setup = " ".join(config["setup_commands"])
    assert "uv venv" not in setup or "--allow-existing" in setup, "Ray gives them again and again"
    torch = re.search(r"TORCH \?= (\S+)", (ROOT / "Makefile").read_text())
    assert torch
    assert torch[1] in setup
    assert "install -q -c constraints.txt -e ." in setup
    starts = [
        command
        for role in ("head", "worker")
        for command in config[f"{role}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all(start.startswith("PATH=~/venv/bin:$PATH ray start") for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("file", [*LAUNCHER, *KUBERAY], ids=lambda file: file.stem)
def test_four_things_are_to_be_changed(file: Path):
    assert {*re.findall(r"# \((\d)\)", file.read_text())} == {"1", "2", "3", "4"}


@pytest.mark.parametrize("file", KUBERAY, ids=lambda file: file.stem)
def test_kuberay_takes_it_and_would_not_take_a_typing_error(file: Path):
    manifest = load(file)
    assert kuberay_faults(manifest) == []
    cluster_spec(manifest)["authOptions"] = {"mode": "token"}  # as docs/cluster.md says
    assert kuberay_faults(manifest) == []
    for path, wrong in (
        (("headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        (("headGroupSpec", "templat"), {}),
        (("workerGroupSpecs", 1, "template", "spec", "containers", 0, "volumeMount"), []),
        (("workerGroupSpecs", 0, "minReplicas"), "0"),
    ):
        broken = copy.deepcopy(manifest)
        where: Any = cluster_spec(broken)
        for step in path[:-1]:
            where = where[step]
        where[path[-1]] = wrong
        assert kuberay_faults(broken), path


@pytest.mark.parametrize("file", KUBERAY, ids=lambda file: file.stem)
def test_all_pods_have_the_same_image_credentials_and_shared_folder(file: Path):
    spec = cluster_spec(load(file))
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0]
    pods = [
        group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    containers = [pod["containers"][0] for pod in pods]
    assert len({container["image"] for container in containers}) == 1
    assert len({json.dumps(container["envFrom"]) for container in containers}) == 1
    for pod, container in zip(pods, containers, strict=True):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_command_of_the_job_is_one_that_strata_knows():
    command = load(FOLDER / "rayjob.yaml")["spec"]["entrypoint"].split()
    assert command[:3] == ["python", "-m", "orchestrator"]
    args = parser().parse_args(command[3:])
    assert (args.verb, args.address) == ("run", "auto")


@pytest.mark.parametrize("file", [*LAUNCHER, *KUBERAY], ids=lambda file: file.stem)
def test_no_credential_stands_in_it(file: Path):
    words = " ".join(texts(load(file)))
    assert not re.search(r"(?i)(password|secret_access_key|api_key)\s*[=:]", words)
