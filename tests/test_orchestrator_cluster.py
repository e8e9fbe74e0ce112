"""The pool of actors, on a real Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from actors.errors import InputError
from orchestrator import cluster, config_file
from orchestrator.config import ComputeConfig
from orchestrator.errors import UserError
from orchestrator.node_error import NodeError
from orchestrator.placement import Nodes, Placement
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory
from orchestrator.shared_storage import SharedStorage
from orchestrator.sweeps.rank_grid import RankGrid
from orchestrator.sweeps.rank_process import Workplace
from orchestrator.sweeps.tune_trial import TuneTrial
from tests.counter import Counter
from tests.runs import write_config
from tests.trials import small_trial

pytestmark = pytest.mark.ray
CFG = ComputeConfig(cpus=2)
NODES = Nodes(print)


@pytest.fixture(scope="module")
def pool():
    with cluster.connected(CFG):
        yield Pool(Placement.of(CFG, NODES))


def test_every_job_is_done_once(pool: Pool, tmp_path: Path):
    jobs = [(i,) for i in range(20)]
    done = sorted(pool.work(Counter, (tmp_path,), "square", jobs))
    assert done == [((i,), i * i) for i in range(20)]


def test_one_actor_does_two_jobs_at_once_if_it_may(pool: Pool, tmp_path: Path):
    jobs = [(i,) for i in range(4)]
    work = pool.work(Counter, (tmp_path,), "meet", jobs, n_actors=1, overlap=True)
    assert len({instance for _, instance in work}) == 1


def test_one_job_at_a_time_is_the_rule(pool: Pool, tmp_path: Path):
    jobs = [(i,) for i in range(4)]
    done = pool.work(Counter, (tmp_path,), "alone", jobs, n_actors=1)
    assert {alone for _, alone in done} == {True}


def test_the_processes_are_kept_for_other_actors_until_they_are_freed(pool: Pool, tmp_path: Path):
    first, again, other = (
        pool.call(Counter, (tmp_path / name,), "process") for name in ("a", "a", "b")
    )
    assert first["pid"] == again["pid"] == other["pid"]
    assert first["made"] == again["made"] != other["made"]
    pool.free()
    assert pool.call(Counter, (tmp_path / "a",), "process")["pid"] != first["pid"]


def test_what_a_trainer_can_not_begin_with_is_told_as_itself(pool: Pool, tmp_path: Path):
    run = RunDirectory.claim(config_file.load(write_config(tmp_path)))
    storage = replace(SharedStorage.of(run), driver={"pid": 1, "host": "elsewhere"})
    work = Workplace(
        storage=storage, device="cpu", n_threads=1, shared=None, grid=RankGrid(latents=1)
    )
    trainable = tune.with_parameters(TuneTrial, workplace=work, gpus=0.0)
    trainer: Any = ray.remote(trainable).remote(config={"trials": (small_trial(tmp_path),)})
    with pytest.raises(NodeError) as told:
        ray.get(trainer.train.remote(), timeout=120)
    assert str(told.value.cause.why).startswith(f"run_dir: {run.path} on node")


def test_no_jobs_start_no_actor(pool: Pool):
    assert list(pool.work(Counter, ("never used",), "square", [])) == []


def test_an_actor_that_dies_is_replaced_and_its_jobs_are_done(pool: Pool, tmp_path: Path):
    jobs = [(i,) for i in range(6)]
    done = sorted(pool.work(Counter, (tmp_path,), "square_after_dying_once", jobs))
    assert done == [((i,), i * i) for i in range(6)]
    assert (tmp_path / "died-3").exists()


def test_a_mistake_found_in_a_method_arrives_as_itself(pool: Pool, tmp_path: Path):
    with pytest.raises(InputError, match=r"^this job makes no sense; give another$"):
        pool.call(Counter, (tmp_path,), "complain")


def test_a_mistake_found_in_a_constructor_arrives_as_itself(pool: Pool, tmp_path: Path):
    with pytest.raises(InputError, match=r"^this counter was given nonsense; give it sense$"):
        pool.call(Counter, (tmp_path, True), "square", 1)


def test_a_job_that_ends_every_process_is_given_up(pool: Pool, tmp_path: Path):
    with pytest.raises(UserError, match=r"a job ended 4 processes that tried it .*memory"):
        pool.call(Counter, (tmp_path,), "die", 1)


def test_an_actor_too_large_for_the_cluster_is_refused(pool: Pool):
    asked: dict[str, Any]
    for asked, told in (
        (
            {"cpus_per_actor": 64},
            r"^compute\.cpus_per_actor: 64 is more than any node .* has, which is 2 CPUs",
        ),
        ({"gpus_per_actor": 1.0}, r"^compute\.gpus_per_actor: 1 is more .* 0 GPUs at most"),
    ):
        with pytest.raises(UserError, match=told):
            Placement.of(ComputeConfig(cpus=2, **asked), NODES).wait_for_room()
    told = []
    nodes = Nodes(told.append)
    nodes.leave_out(next(iter(nodes.usable())), "here", "it has no disk")
    assert told == ["warning: node here is left out from here on: it has no disk"]
    with pytest.raises(
        UserError, match=r"is 0 CPUs at most, 1 more being left out for the reasons"
    ):
        Placement.of(CFG, nodes).wait_for_room()
    two, three = (ComputeConfig(cpus=2, ranks_per_trial=n) for n in (2, 3))
    Placement.of_trainers(two, NODES).wait_for_room()
    assert (Placement.of(two, NODES).room(), Placement.of_trainers(two, NODES).room()) == (2, 1)
    with pytest.raises(UserError, match=r"^compute\.ranks_per_trial: 3 is more .* which is 2 "):
        Placement.of_trainers(three, NODES).wait_for_room()
    shared = ComputeConfig(cpus=2, gpus_per_trial=0.5, trials_per_actor=4)
    with pytest.raises(UserError, match=r"^compute\.gpus_per_trial: 2 is more .* 0 GPUs at most"):
        Placement.of_trainers(shared, NODES).wait_for_room()
