"""Worker processes: the plain loop's bits at any number of workers, and nothing lost, left behind or run twice.

All of these start real processes, hence all are slow.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from foedus.backends.cores import cores
from foedus.core.client import local_training
from foedus.core.compose import fedavg
from foedus.core.population import Clients, Examples
from foedus.core.task import Task
from foedus.errors import ConfigurationError, DataError, TrainingError, WorkerDied
from foedus.rounds.debug import Debug
from foedus.rounds.work import Job, Outcome
from foedus.sim.processes import Processes

from .jobs import EVERYONE, SIZES, Tiny, bits, examples, numpy_job, orders, pooled, rounds, torch_job

pytestmark = pytest.mark.slow

COHORTS = [[0, 1, 3, 4, 5, 6, 7, 8], [8, 3], [1], [], [7, 4, 0, 5]]


@pytest.mark.parametrize(("average", "counts"), [(True, (1, 2, 3)), (False, (2,))])
def test_any_number_of_workers_gives_the_bits_of_the_plain_loop(average: bool, counts: tuple[int, ...]) -> None:
    this = torch_job(pooled(), average_buffers=average)
    expected = [bits(o) for o in rounds(Debug(), this, COHORTS)]
    assert any(kept for _, _, _, kept in expected) is not average
    for workers in counts:
        assert [bits(o) for o in rounds(Processes(workers), this, COHORTS)] == expected


def test_workers_are_as_many_as_are_of_use_and_stay() -> None:
    this = numpy_job(pooled())
    with Processes(3).open(this) as session:
        assert session.pids == ()
        session.run(orders(this, [3, 4]))
        two = session.pids
        session.run(orders(this, [3, 4, 5, 6], 2))
        assert (len(two), len(session.pids)) == (2, 3)
        assert session.pids[:2] == two
    assert not any(map(alive, (*two, *session.pids)))


def test_the_number_of_workers_is_checked_and_defaults_to_the_cores() -> None:
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ConfigurationError, match="workers must be a whole number of at least 1"):
            Processes(wrong)  # type: ignore[arg-type]
    with Processes().open(numpy_job(pooled())) as session:
        assert session._workers == cores()  # type: ignore[attr-defined]


def test_the_users_own_loop_and_optimiser_run_in_workers() -> None:
    spec = local_training(optimiser=lambda p: torch.optim.AdamW(p, lr=0.01), batch_size=64)
    this = Job(Task(model=Tiny, loss=nn.functional.cross_entropy), fedavg(spec), pooled(), seed=1)
    assert bits(rounds(Processes(2), this, [[3, 4]])[0]) == bits(rounds(Debug(), this, [[3, 4]])[0])


def test_it_works_while_an_event_loop_is_running() -> None:
    this = numpy_job(pooled())

    async def cell() -> Outcome:
        return rounds(Processes(2), this, [[3, 4]])[0]

    assert bits(asyncio.run(cell())) == bits(rounds(Debug(), this, [[3, 4]])[0])


# --- workers that die ----------------------------------------------------------------------------------------


def first_time(marker: Path) -> bool:
    """True once, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def dying(how: Callable[[], None], folder: Path, often: int) -> Clients:
    """Clients of which the fifth ends the process that reads it, so many times."""

    def read(client: int) -> Examples:
        if client == 4 and any(first_time(folder / str(time)) for time in range(often)):
            how()
        return examples(client, SIZES[client])

    return Clients.generated(read, len(SIZES), sizes=SIZES)


def by_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("how", "workers"),
    [(by_signal(signal.SIGKILL), 1), (by_signal(signal.SIGKILL), 2), (partial(os._exit, 3), 2)],
)
def test_what_a_dead_worker_had_not_delivered_is_done_again(
    how: Callable[[], None], workers: int, tmp_path: Path
) -> None:
    this = numpy_job(dying(how, tmp_path, often=2))
    found = rounds(Processes(workers), this, [EVERYONE, EVERYONE])
    assert len(list(tmp_path.iterdir())) == 2  # it did die twice
    expected = rounds(Debug(), numpy_job(dying(how, tmp_path, often=0)), [EVERYONE, EVERYONE])
    assert [bits(o) for o in found] == [bits(o) for o in expected]


@pytest.mark.parametrize(
    ("how", "told"),
    [(by_signal(signal.SIGKILL), "by the signal SIGKILL"), (partial(os._exit, 3), "with exit code 3")],
)
def test_a_share_that_ends_three_workers_is_given_up(how: Callable[[], None], told: str, tmp_path: Path) -> None:
    this = numpy_job(dying(how, tmp_path, often=9))
    with Processes(2).open(this) as session:
        with pytest.raises(WorkerDied, match=rf"\b4\b.* in round 1, the last {told}.*processes\(workers=1\)"):
            session.run(orders(this, EVERYONE))
        assert len(list(tmp_path.iterdir())) == 3
        assert session.pids == ()
        session.run(orders(this, [1, 2], 2))  # the session is still of use


def test_a_worker_that_died_between_rounds_is_replaced() -> None:
    this = numpy_job(pooled())
    with Processes(2).open(this) as session:
        session.run(orders(this, EVERYONE))
        for pid in session.pids:
            end(pid)
        found = session.run(orders(this, EVERYONE, 2))
    assert bits(found) == bits(rounds(Debug(), this, [EVERYONE, EVERYONE])[1])


def test_workers_that_cannot_begin_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    this = numpy_job(pooled())
    with Processes(1).open(this) as session:
        monkeypatch.setattr(sys, "path", [])  # nothing can be imported there
        with pytest.raises(WorkerDied, match=r"3 workers ended before they could begin.*exit code 1"):
            session.run(orders(this, [3]))


# --- exceptions ----------------------------------------------------------------------------------------------


class Unlucky(Exception):
    """Of a module that workers cannot import."""


def test_a_failed_training_comes_back_with_its_client_round_step_and_batch() -> None:
    data = {f"node {i}": examples(i, 6) for i in range(4)}
    data["node 2"].targets[5] = 17  # there are three classes
    this = torch_job(Clients.of({name: (e.inputs[0], e.targets) for name, e in data.items()}))
    with Processes(2).open(this) as session, pytest.raises(TrainingError, match="node 2") as caught:
        session.run(orders(this, [0, 1, 2, 3], 7))
    error = caught.value
    assert (error.client, error.round, error.step) == ("node 2", 7, 0)
    assert 17 in error.batch[1]
    assert isinstance(error.__cause__, IndexError)
    assert "in a worker process" in error.__notes__[0]


def test_an_exception_of_the_users_own_is_the_cause() -> None:
    def read(client: int) -> Examples:
        if client == 3:
            raise Unlucky("no such file")
        return examples(client, 5)

    this = numpy_job(Clients.generated(read, 5))
    with Processes(2).open(this) as session:
        with pytest.raises(DataError, match=r"client 3 could not be read: Unlucky") as caught:
            session.run(orders(this, [0, 1, 2, 3, 4]))
        assert isinstance(caught.value.__cause__, Unlucky)
        assert session.run(orders(this, [0, 1, 2, 4])).clients == [0, 1, 2, 4]


# --- scripts -------------------------------------------------------------------------------------------------

HEAD = """
import os, signal, sys
import numpy as np
from foedus.backends import open_trainer
from foedus.core.client import local_sgd
from foedus.core.compose import fedavg
from foedus.core.linear import logistic
from foedus.core.population import Clients
from foedus.core.task import Task
from foedus.rounds.debug import Debug
from foedus.sim.processes import Processes
from foedus.rounds.work import Job, Orders

def run(executor, task, clients, count):
    job = Job(task, fedavg(local_sgd(0.1, batch_size=4)), clients, 0)
    with executor.open(job) as session:
        return session.run(Orders(1, open_trainer(task, seed=0).initial(), np.arange(count)))
"""


def script(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "script.py"
    file.write_text(HEAD + textwrap.dedent(text))
    return [sys.executable, "-W", "error", str(file)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    import foedus

    (tmp_path / "temporary").mkdir()
    root = str(Path(foedus.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path / "temporary")}


def test_a_script_needs_no_main_guard(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "own_module.py").write_text("import torch\nclass Layer(torch.nn.Linear): pass\n")
    text = """
        import torch
        sys.path.insert(0, os.path.join(os.path.dirname(__file__), "side"))
        from own_module import Layer
        print("begun")

        SCALE = 2.0
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = Layer(4, 3)
            def forward(self, x):
                return scaled(self.layer(x))
        def scaled(x):
            return x * SCALE
        def read(client):
            values = np.random.default_rng(client)
            return values.random((5, 4)), values.integers(0, 3, 5)

        task = Task(model=Net, loss=lambda output, target: torch.nn.functional.cross_entropy(output, target))
        clients = Clients.generated(read, 6)
        found = [run(executor, task, clients, 6) for executor in (Debug(), Processes(2))]
        assert all(np.array_equal(a, b) for a, b in zip(*(f.message.values() for f in found)))
        print("equal", len(found[1].clients))
    """
    done = subprocess.run(
        script(tmp_path, text), env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout, done.stderr) == ("begun\nequal 6\n", "")


BUSY = r"""
    def read(client):
        os.write(1, f"{os.getpid()}\n".encode())
        signal.pause()

    try:
        run(Processes(2), Task(model=logistic(4, 3)), Clients.generated(read, 8), 8)
    except KeyboardInterrupt:
        os.write(1, b"stopped\n")
"""


@pytest.fixture
def busy(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A script in a process group of its own, two workers of which are in the middle of a round."""
    with subprocess.Popen(
        script(tmp_path, BUSY), env=environment, text=True, process_group=0,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield process, [int(process.stdout.readline()) for _ in range(2)]
        process.kill()


def test_nothing_is_left_when_the_parent_is_killed(
    busy: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, workers = busy
    assert len({process.pid, *workers}) == 3
    process.kill()
    process.communicate(timeout=60)  # returns when the workers, which hold the other ends too, are no more
    assert list((tmp_path / "temporary").iterdir()) == []
    there = [file.name for file in Path("/dev").glob("shm/foedus-*")]  # servers' keys of sums are to stay
    assert not [name for name in there if not name.startswith("foedus-sums-")]


def test_an_interrupt_is_the_parents_alone(busy: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = busy
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("stopped\n", "")
    assert process.returncode == 0
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end(pid: int) -> None:
    """Kill a child of ours and wait until it is dead, without taking its exit code."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
