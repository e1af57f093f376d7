"""auto takes whichever executor is fastest, says so in one line, and passes by what cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import foedus as fd
from foedus.backends import open_trainer
from foedus.backends.cores import cores
from foedus.errors import ConfigurationError, LoweringMismatch, UnsupportedOperator
from foedus.rounds.debug import Debug, DebugSession
from foedus.rounds.work import Job, Orders, Outcome, Session
from foedus.sim.auto import BUDGET, CLIENTS, LASTING, LONG, STEPS, TURNS, Auto, affordable, choose

NAMES = ("debug", "vectorised", "compiled", "processes")


@dataclass(frozen=True)
class Renamed:
    """The plain executor under another name."""

    name: str
    error: Exception | None = None

    def open(self, job: Job) -> Session:
        if self.error is not None:
            raise self.error
        session: DebugSession = Debug().open(job)
        session.name = self.name
        return session


def job() -> Job:
    draw = np.random.default_rng(0)
    data = {i: (draw.normal(size=(7, 4)).astype("f4"), draw.integers(0, 3, 7)) for i in range(5)}
    task = fd.Task(lambda: torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy)
    return Job(task, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=2)), fd.Clients.of(data), seed=0)


def orders(job: Job) -> Orders:
    return Orders(1, open_trainer(job.task, seed=0).initial(), np.arange(5))


@pytest.mark.parametrize("fastest", NAMES)
def test_whichever_is_made_fastest_is_chosen(fastest: str) -> None:
    seconds = {name: 1.0 + i for i, name in enumerate(NAMES)} | {fastest: 0.5}

    def timer(name: str, rehearsal: object) -> float:
        rehearsal()  # type: ignore[operator]
        return seconds[name]

    said: list[str] = []
    candidates = tuple(Renamed(name) for name in NAMES)
    with choose(Auto(candidates, timer), job(), orders(job()), rounds=10, say=said.append) as session:
        assert session.name == fastest
    assert len(said) == 1
    assert said[0].startswith(f"executor {fastest} (")
    assert "\n" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("fastest", NAMES)
def test_a_busy_machine_seldom_decides(fastest: str) -> None:
    """Other programs only add time: here to every other rehearsal, up to fifty times as much."""
    seconds = {name: 1.0 + i / 10 for i, name in enumerate(NAMES)} | {fastest: 0.9}
    draw = np.random.default_rng(NAMES.index(fastest))

    def timer(name: str, rehearsal: object) -> float:
        return seconds[name] * (1 if draw.random() < 0.5 else draw.uniform(1, 50))

    one, right = job(), 0
    for _ in range(20):
        candidates = tuple(Renamed(name) for name in NAMES)
        with choose(Auto(candidates, timer), one, orders(one), rounds=10, say=lambda text: None) as session:
            right += session.name == fastest
    assert right >= 16  # of 20; with a single rehearsal of each it would be 5 to 14


def test_what_slows_down_all_from_some_moment_on_does_not_favour_the_earlier() -> None:
    seconds, calls = {"debug": 1.0, "compiled": 0.5}, iter(range(1000))

    def timer(name: str, rehearsal: object) -> float:
        return seconds[name] * (1 if next(calls) < TURNS else 20)

    said: list[str] = []
    candidates = (Renamed("debug"), Renamed("compiled"))
    with choose(Auto(candidates, timer), job(), orders(job()), rounds=10, say=said.append) as session:
        assert session.name == "compiled"
    assert said[0].index("compiled ") < said[0].index("debug ")


def test_an_unknown_operator_is_named_and_passed_by() -> None:
    said: list[str] = []
    candidates = (Renamed("compiled", UnsupportedOperator("aten.median.dim")), Renamed("debug"))
    with choose(Auto(candidates, lambda name, rehearsal: 1.0), job(), orders(job()), rounds=1, say=said.append) as s:
        assert s.name == "debug"
    assert "compiled passed by" in said[0]
    assert "aten.median.dim" in said[0]


def test_a_compiled_step_that_differs_from_torch_is_passed_by() -> None:
    said: list[str] = []
    candidates = (Renamed("compiled", LoweringMismatch("the loss", 0.1, 1e-4)), Renamed("debug"))
    with choose(Auto(candidates, lambda name, rehearsal: 1.0), job(), orders(job()), rounds=1, say=said.append) as s:
        assert s.name == "debug"
    assert "differs from eager torch in the loss" in said[0]


def test_when_none_can_run_the_first_reason_is_raised() -> None:
    candidates = (Renamed("compiled", ConfigurationError("because of this")),)
    with pytest.raises(ConfigurationError, match="because of this"):
        choose(Auto(candidates), job(), orders(job()), rounds=1, say=lambda text: None)


def test_measuring_changes_nothing(tmp_path: object) -> None:
    one = job()
    plain = Debug().open(one).run(orders(one))
    candidates = tuple(Renamed(name) for name in NAMES[:3])
    with choose(Auto(candidates), one, orders(one), rounds=1, say=lambda text: None) as session:
        chosen = session.run(orders(one))
    assert plain.message is not None
    assert chosen.message is not None
    assert all((plain.message[k] == chosen.message[k]).all() for k in plain.message)


def test_the_rehearsal_takes_only_first_steps() -> None:
    counted: list[int] = []

    @dataclass(frozen=True)
    class Counting(Renamed):
        def open(self, job: Job) -> Session:
            session = Debug().open(job)
            run = session.run

            def counting(orders: Orders):  # type: ignore[no-untyped-def]
                outcome = run(orders)
                counted.extend(outcome.steps)
                return outcome

            session.run = counting  # type: ignore[method-assign]
            return session

    many = job()
    many = replace(many, algorithm=fd.fedavg(fd.local_sgd(lr=0.1, epochs=50, batch_size=1)))
    choose(Auto((Counting("debug"),)), many, orders(many), rounds=1, say=lambda text: None).close()
    assert counted
    assert max(counted) == 8


class Slow:
    """A session on a clock of its own: every client takes so long, and every step."""

    name = "slow"

    def __init__(self, client: float, step: float) -> None:
        self.client, self.step, self.now = client, step, 0.0

    def run(self, orders: Orders) -> Outcome:
        assert orders.limit is not None
        self.now += len(orders.cohort) * (self.client + orders.limit * self.step)
        return Outcome()

    def close(self) -> None: ...


@pytest.mark.parametrize("client", [0.0, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("cohort", [1, 10, 1000])
def test_a_rehearsal_is_as_long_as_the_model_allows(client: float, step: float, cohort: int) -> None:
    session = Slow(client, step)
    whole = replace(orders(job()), cohort=np.arange(cohort), limit=STEPS)
    sample = affordable(session, whole, now=lambda: session.now)  # type: ignore[arg-type]
    own, count, steps = cores(), len(sample.cohort), sample.limit or 0
    slow = BUDGET / (client + step) / min(cohort, CLIENTS * own) < STEPS
    least, most = min(cohort, own if slow else CLIENTS * own), LASTING if slow else STEPS
    assert least <= count <= cohort
    assert 1 <= steps <= most
    took = count * (client + steps * step)
    assert steps == 1 or took <= BUDGET * 1.01
    assert count == least or took <= LONG * 1.01  # no longer than wanted, where it could be shorter,
    assert (count == cohort and steps == most) or took > 0.9 * LONG  # and not shorter where it could be longer


def test_a_fault_inside_a_fast_path_is_passed_by_if_another_can_run() -> None:
    said: list[str] = []
    candidates = (Renamed("debug"), Renamed("compiled", MemoryError("XLA ran out of it")))
    with choose(Auto(candidates), job(), orders(job()), rounds=1, say=said.append) as session:
        assert session.name == "debug"
    assert "compiled passed by: MemoryError: XLA ran out of it" in said[0]


def test_candidates_are_tried_with_all_that_a_method_sends_down(tmp_path: Path) -> None:
    clients = fd.Clients.of({i: (np.ones((8, 3)), np.zeros(8, int)) for i in range(3)})
    algorithm = fd.scaffold(fd.local_sgd(lr=0.1), personal=fd.fine_tune())
    settings = fd.Settings(folder=tmp_path / "run", progress=False)
    run = fd.simulate(fd.Task(fd.logistic(3, 2)), algorithm, clients, rounds=2, settings=settings)
    assert [line["senders"] for line in run.metrics] == [3, 3]


@pytest.mark.parametrize("sizes", [[0, 7, 7], None])
def test_a_first_cohort_may_be_empty(sizes: list[int] | None) -> None:
    this = job()
    counts = sizes or [7, 7, 7]
    clients = fd.Clients.generated(lambda i: (np.ones((counts[i], 4), "f4"), np.zeros(counts[i], int)), 3, sizes=sizes)
    this = replace(this, clients=clients, algorithm=fd.fedavg(fd.local_sgd(lr=0.1, batch_size=None)))
    asked = replace(orders(this), cohort=np.empty(0, np.int64))
    with choose(Auto((Renamed("debug"),), lambda n, r: 1.0), this, asked, rounds=2, say=lambda text: None) as session:
        assert session.name == "debug"
