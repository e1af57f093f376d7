"""A Ray cluster of two machines, both of them this one: the plain loop's bits, whatever is killed.

All of these start real clusters, hence all are slow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus.core.population import Clients, Examples
from foedus.errors import ConfigurationError, MissingExtra, TrainingError, WorkerDied
from foedus.rounds.debug import Debug
from foedus.sim.ray_executor import Ray

from .jobs import EVERYONE, SIZES, bits, examples, numpy_job, orders, pooled, rounds, torch_job

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning:ray.*")]
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two machines of one core each."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    two = Cluster(initialize_head=True, head_node_args=head)
    two.add_node(num_cpus=1, object_store_memory=10**8)
    yield two.address
    two.shutdown()


@pytest.mark.parametrize("average", [True, False])
def test_a_cluster_gives_the_bits_of_the_plain_loop(cluster: str, average: bool) -> None:
    this = torch_job(pooled(), average_buffers=average)
    cohorts = [EVERYONE, [7, 3], [1], [], [7, 4, 0, 5]]
    expected = [bits(o) for o in rounds(Debug(), this, cohorts)]
    assert any(kept for _, _, _, kept in expected) is not average
    assert [bits(o) for o in rounds(Ray(cluster, workers=2), this, cohorts)] == expected


def test_work_is_shared_out_over_the_machines(cluster: str, tmp_path: Path) -> None:
    def read(client: int) -> Examples:
        import ray

        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + 20  # whoever is there first waits for the other to take its share
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            threading.Event().wait(0.05)
        return examples(client, 5)

    rounds(Ray(cluster), numpy_job(Clients.generated(read, 8)), [list(range(8))])
    assert len(list(tmp_path.iterdir())) == 2


def first_time(marker: Path) -> bool:
    """True once, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def dying(folder: Path, often: int) -> Clients:
    """Clients of which the fifth ends the process that reads it, so many times."""

    def read(client: int) -> Examples:
        if client == 4 and any(first_time(folder / str(time)) for time in range(often)):
            os.kill(os.getpid(), signal.SIGKILL)
        return examples(client, SIZES[client])

    return Clients.generated(read, len(SIZES), sizes=SIZES)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_killed_actor_had_not_delivered_is_done_again(cluster: str, workers: int, tmp_path: Path) -> None:
    found = rounds(Ray(cluster, workers), numpy_job(dying(tmp_path, often=2)), [EVERYONE, EVERYONE])
    assert len(list(tmp_path.iterdir())) == 2  # it was killed twice
    expected = rounds(Debug(), numpy_job(dying(tmp_path, often=0)), [EVERYONE, EVERYONE])
    assert [bits(o) for o in found] == [bits(o) for o in expected]


def test_a_share_that_ends_three_actors_is_given_up(cluster: str, tmp_path: Path) -> None:
    this = numpy_job(dying(tmp_path, often=9))
    with Ray(cluster, workers=2).open(this) as session:
        with pytest.raises(WorkerDied, match=r"\b4\b.* in round 1, the last with Ray's words: .*ray\(workers=1\)"):
            session.run(orders(this, EVERYONE))
        assert len(list(tmp_path.iterdir())) == 3
        session.run(orders(this, [1, 2], 2))  # the session is still of use


def test_a_failed_training_comes_back_with_its_client_round_step_and_batch(cluster: str) -> None:
    data = {f"node {i}": examples(i, 6) for i in range(4)}
    data["node 2"].targets[5] = 17  # there are three classes
    this = torch_job(Clients.of({name: (e.inputs[0], e.targets) for name, e in data.items()}))
    with Ray(cluster).open(this) as session, pytest.raises(TrainingError, match="node 2") as caught:
        session.run(orders(this, [0, 1, 2, 3], 7))
    error = caught.value
    assert (error.client, error.round, error.step) == ("node 2", 7, 0)
    assert 17 in error.batch[1]
    assert isinstance(error.__cause__, IndexError)


def test_more_workers_than_cores_are_refused_at_once(cluster: str) -> None:
    with pytest.raises(ConfigurationError, match=r"3 workers need a core each, and of the Ray cluster's 2 cores"):
        Ray(cluster, workers=3).open(numpy_job(pooled()))


def test_cores_that_others_hold_are_not_waited_for_without_end(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foedus.sim.ray_executor.PATIENCE", 1)
    this = numpy_job(pooled())
    with Ray(cluster, workers=2).open(this) as holder:
        holder.run(orders(this, EVERYONE))
        late = Ray(workers=1).open(this)
        with pytest.raises(ConfigurationError, match="of the Ray cluster's 2 cores 0 are free"):
            late.run(orders(this, EVERYONE))
        late.close()
        holder.run(orders(this, EVERYONE, 2))  # the cluster, which the other had only used, is still there


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'foedus\[ray\]'"):
        Ray().open(numpy_job(pooled()))


def test_an_address_where_no_cluster_is_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        Ray("127.0.0.1:1").open(numpy_job(pooled()))


def test_a_script_starts_a_cluster_of_its_own_and_ends_it(tmp_path: Path) -> None:
    """Nothing is said on standard error, though every warning is an error, and no process is left."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "script.py")],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3]\nFalse\n", "")


SCRIPT = """
    import numpy as np
    import ray
    from foedus.backends import open_trainer
    from foedus.core.client import local_sgd
    from foedus.core.compose import fedavg
    from foedus.core.linear import logistic
    from foedus.core.population import Clients
    from foedus.core.task import Task
    from foedus.sim.ray_executor import Ray
    from foedus.rounds.work import Job, Orders

    def read(client):
        values = np.random.default_rng(client)
        return values.random((5, 4)), values.integers(0, 3, 5)

    job = Job(Task(model=logistic(4, 3)), fedavg(local_sgd(0.1)), Clients.generated(read, 4), 0)
    with Ray(workers=1).open(job) as session:
        print(session.run(Orders(1, open_trainer(job.task, seed=0).initial(), np.arange(4))).clients)
    print(ray.is_initialized())
"""
