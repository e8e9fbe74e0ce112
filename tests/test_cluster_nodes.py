"""Nodes come, go and prove unfit while a pool works, on a real cluster of several."""

import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors

from orchestrator import cluster, config_file
from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
from orchestrator.placement import Nodes, Placement
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory
from orchestrator.stages.same_model import note_model
from storage.errors import RowsError
from tests.counter import Counter
from tests.ray_nodes import RAY, if_it_can_mount, lose, nodes
from tests.runs import ROOT, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
HERE = {"PYTHONPATH": str(ROOT)}
N_JOBS = 400


def test_nodes_that_come_are_used_and_those_that_go_or_are_unfit_are_done_without(tmp_path: Path):
    heard: list[str] = []
    done: list[tuple[int, str]] = []
    with (
        nodes(cpus=1, environment=HERE) as there,
        cluster.connected(cfg := ComputeConfig(address=there.address)),
    ):
        pool = Pool(Placement.of(cfg, Nodes(heard.append)))
        work = pool.work(Counter, (tmp_path,), "somewhere", [(i,) for i in range(N_JOBS)])

        def until_seen(n_nodes: int) -> str:
            for (number,), node in work:
                done.append((number, node))
                if len({node for _, node in done}) == n_nodes:
                    return node
            raise AssertionError(f"all is done, and no {n_nodes} nodes were used: {heard}")

        until_seen(1)
        worker = there.add(cpus=1)
        until_seen(2)
        lose(worker)
        there.add(cpus=1)
        unfit = until_seen(3)
        (tmp_path / unfit).touch()
        (tmp_path / "hurry").touch()
        done += [(number, node) for (number,), node in work]

        [warning] = heard
        assert "is left out from here on: the store is out of reach on " + unfit in warning
        assert sorted(number for number, _ in done) == list(range(N_JOBS))
        [(_, last)] = pool.work(Counter, (tmp_path,), "somewhere", [(0,)])
        assert last == done[0][1]


@pytest.mark.cluster
@if_it_can_mount
def test_a_node_without_strata_or_the_model_that_joins_is_left_out(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples" / "tiny_lm" / "model", model)
    cfg = config_file.load(write_config(tmp_path, model={"name": str(model)}))
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "sitecustomize.py").write_text(
        "import sys\n"
        "class Lacking:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'orchestrator': raise ModuleNotFoundError('no orchestrator')\n"
        "sys.meta_path.insert(0, Lacking())\n"
    )
    heard: list[str] = []
    with (
        nodes(cpus=1, environment=HERE) as there,
        cluster.connected(ComputeConfig(address=there.address)),
    ):
        run = RunDirectory.claim(cfg)
        note_model(cfg, run)
        cluster_cfg = replace(cfg, compute=ComputeConfig(address=there.address))
        pool = Pool.of_run(cluster_cfg, run, heard.append)
        work = pool.work(Counter, (tmp_path,), "somewhere", [(i,) for i in range(N_JOBS)])
        done = [next(work)]
        there.add(cpus=1, environment={"PYTHONPATH": str(lacking)})
        there.add(cpus=1, blind_to=model)
        there.add(cpus=1)
        for found in work:
            done.append(found)
            if len(heard) == 2 and len({node for _, node in done[-20:]}) == 2:
                (tmp_path / "hurry").touch()
        assert len(done) == N_JOBS
        assert len({node for _, node in done[-20:]}) == 2, heard
        assert len({node for _, node in done}) == 2, "no job before a node has said that it is fit"
        without, blind = sorted(heard, key=lambda text: "model.name" in text)
        assert "install Strata on every node" in without
        assert f"model.name: {model} on node" in blind or "is no folder" in blind


@pytest.mark.cluster
def test_a_node_that_is_told_to_go_gets_nothing_new(tmp_path: Path):
    with (
        nodes(cpus=1, environment=HERE) as there,
        cluster.connected(cfg := ComputeConfig(address=there.address)),
    ):
        there.add(cpus=1)
        there.wait_for(2)
        pool = Pool(Placement.of(cfg, Nodes(print)))
        work = pool.work(Counter, (tmp_path,), "somewhere", [(i,) for i in range(200)])
        here = ray.get_runtime_context().get_node_id()
        going = next(node for _, node in work if node != here)
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run(
            [
                *(*RAY, "drain-node", "--address", there.address, "--node-id", going, *notice),
                *("--deadline-remaining-seconds", "600"),
            ],
            check=True,
            capture_output=True,
            env=there.environment,
        )
        time.sleep(2)  # jobs in hand are done by then
        later = [node for _, node in work]
        assert later.count(going) < 10
        assert set(later[10:]) == {here}


@pytest.mark.cluster
def test_rows_that_no_store_holds_are_no_fault_of_the_node_that_made_them(tmp_path: Path):
    heard: list[str] = []
    with (
        nodes(cpus=1, environment=HERE) as there,
        cluster.connected(cfg := ComputeConfig(address=there.address)),
    ):
        there.add(cpus=1)
        there.wait_for(2)
        pool = Pool(Placement.of(cfg, Nodes(heard.append)))
        with pytest.raises(RowsError, match="see to the model"):
            list(pool.work(Counter, (tmp_path,), "make_nonsense", [(i,) for i in range(8)]))
        assert not heard


@pytest.mark.cluster
def test_gpus_of_uneven_nodes_hold_as_many_actors_as_they_have_shares_and_no_more():
    with nodes(cpus=1, environment=HERE) as there:
        there.add(cpus=4, gpus=2)
        there.add(cpus=1, gpus=4)
        there.wait_for(3)
        address = there.address

        def placed(**asked: Any) -> tuple[int, int]:
            """Actors that there is said to be room for, and those that Ray has given a place."""
            cfg = ComputeConfig(address=address, wait_seconds=60.0, **asked)
            placement = Placement.of(cfg, Nodes(print))
            pool = Pool(placement)
            pool.start()
            alive = [
                actor
                for actor in list_actors(filters=[("state", "=", "ALIVE")])
                if actor.class_name == "_Process"
            ]
            pool.free()
            return placement.room(), len(alive)

        with cluster.connected(ComputeConfig(address=address)):
            assert placed(gpus_per_actor=0.4) == (
                5,
                5,
            )  # two for each of two GPUs, one for one core
            assert placed(gpus_per_actor=2.0) == (2, 2)
            assert placed(cpus_per_actor=2) == (2, 2)


@pytest.mark.cluster
def test_what_no_node_has_is_an_error_after_the_stated_time_and_a_node_that_comes_ends_the_wait():
    with nodes(cpus=1, environment=HERE) as there:
        heard: list[str] = []

        def waiting(**asked: Any) -> Placement:
            return Placement.of(ComputeConfig(address=there.address, **asked), Nodes(heard.append))

        with cluster.connected(ComputeConfig(address=there.address)):
            with pytest.raises(
                UserError, match=r"cpus_per_actor: 64 is more .* 1 CPUs at most, after 3 s"
            ):
                waiting(cpus_per_actor=64, wait_seconds=3.0).wait_for_room()
            with pytest.raises(
                UserError, match=r"gpus_per_actor: 1 is more .* 0 GPUs at most, after 3 s"
            ):
                [
                    *Pool(waiting(gpus_per_actor=1.0, wait_seconds=3.0)).work(
                        Counter, (Path(),), "square", [(1,)]
                    )
                ]
            assert "waiting up to 3 s for more nodes (compute.wait_seconds)" in heard[0]
            there.add(cpus=2, gpus=1)
            waiting(gpus_per_actor=1.0, cpus_per_actor=2, wait_seconds=120.0).wait_for_room()
