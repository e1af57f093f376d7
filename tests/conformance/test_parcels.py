"""Every aggregator and every method travels: what goes through bytes and the server's checks ends with the same bits.

The simulator's collector is the oracle; the other way is packed, written, read, checked and merged, as over a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import Weights, open_trainer
from foedus.core.aggregate import Aggregator
from foedus.core.linear import logistic
from foedus.core.method import Contribution
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.protocol import blob
from foedus.rounds.collect import Collector
from foedus.rounds.commit import Server
from foedus.rounds.freight import orders_blob, orders_of, parcel_of, update_blob
from foedus.rounds.parcel import Intake, Terms, outward, packed
from foedus.rounds.untold import noised
from foedus.rounds.visits import layouts_of
from foedus.rounds.work import Given, Job, Orders, Outcome
from foedus.tree import Layout

from .test_aggregators import MEMBERS
from .test_methods import METHODS, population, task

SIZE, COHORT = 37, [4, 0, 2, 9, 7]
OPEN = [m for m in MEMBERS if not m.hidden]  # what is masked has a way of its own; ciphertexts differ every time
LAYOUTS = (Layout(("w", "v"), ((5, 7), (2,)), ("float32",) * 2), Layout((), (), ()))
CLIENTS = fd.Clients.of({i: (np.ones((2, 5), np.float32), [0, 1]) for i in range(10)})


def same(a: Outcome, b: Outcome, *, told: bool = True) -> None:
    """Everything that was merged or told, bit for bit; ``told`` false: a simulation knows more than travels."""
    for x, y in [(a.message, b.message), (a.buffers, b.buffers), *((a.sides.get(n), b.sides.get(n)) for n in a.sides)]:
        assert (x is None) == (y is None)
        assert {n: v.tobytes() for n, v in (x or {}).items()} == {n: v.tobytes() for n, v in (y or {}).items()}
    rows = [sorted(zip(o.clients, o.sent, strict=True)) for o in (a, b)]
    assert rows[0] == rows[1]
    figures = [sorted(zip(o.clients, o.examples, o.steps, map(repr, o.losses), strict=True)) for o in (a, b)]
    assert figures[1] == (figures[0] if told else [(c, 0, 0, "nan") for c in sorted(b.clients)])
    assert (a.sides.keys(), a.sizes, a.senders, a.reports) == (b.sides.keys(), b.sizes, b.senders, b.reports)


def travelled(terms: Terms, given: dict[int, Given], order: list[int]) -> Outcome:
    """The results of clients, each as bytes, taken in some order by a server."""
    intake = Intake(terms, seats=len(order))
    for client in order:
        brought, examples = given[client]
        parcel = packed(terms, client, brought, examples, secret=known_to_all_who_know_the_seed)
        data = update_blob(outward(terms.job.algorithm, parcel))
        intake.take(client, parcel_of(blob.unpack(data, size=len(data), digest=blob.digest_of(data))))
    assert intake.counted == set(order)
    return intake.outcome


@pytest.mark.parametrize("member", OPEN, ids=lambda m: m.label)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_every_aggregator_travels(member: Aggregator, dtype: str) -> None:
    rng = np.random.default_rng(3)
    algorithm = fd.fedavg(fd.local_sgd(0.1), aggregator=member, gate=fd.Gate(max_norm=1e6))
    job = Job(fd.Task(logistic(5, 2)), algorithm, CLIENTS, seed=11)
    told = {} if member.tell is None else {"update": member.tell(member.init(LAYOUTS[0]))}
    orders = Orders(3, Weights(np.zeros(SIZE, dtype), np.empty(0, dtype)), np.array(COHORT), told=told)
    given = {c: Given(Contribution(rng.normal(size=SIZE).astype(dtype), steps=c, loss=1 / 3), c + 1) for c in COHORT}
    collector = Collector(job, orders, LAYOUTS)
    for slot, client in enumerate(COHORT):
        collector.contribute(slot, *given[client])
    travelled_ = travelled(Terms.of(job, orders, LAYOUTS), given, sorted(COHORT))
    same(collector.outcome, travelled_, told=not noised(algorithm))


@pytest.mark.slow
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_every_method_travels(make: Callable[[], fd.Algorithm]) -> None:
    """Two rounds with everybody; orders go through bytes, too."""
    job = Job(task(), make(), population(), seed=5)
    trainer = open_trainer(job.task, seed=job.seed)
    first, everybody = trainer.initial(), np.arange(len(job.clients))
    server = Server(job, *layouts_of(trainer))
    state, kept = server.first(first), {}
    with fd.executors.debug().open(job) as session:
        for number in (1, 2):
            method: Any = job.algorithm.method
            down = method.down(state.method)
            orders = Orders(number, state.weights, everybody, kept=kept, down=down, told=server.told(state))
            terms = Terms.of(job, orders, layouts_of(trainer))
            data = orders_blob(orders, terms.travels, run="study")
            read = replace(orders_of(blob.unpack(data), first, terms.travels), cohort=everybody, kept=kept)
            given = session.run(replace(read, single=True)).given
            outcome = session.run(orders)
            same(outcome, travelled(terms, given, sorted(given)))
            server.commit(state, outcome, number)
            kept = {**kept, **outcome.kept}


def test_what_stays_at_home_is_not_in_the_bytes() -> None:
    job = Job(task(), METHODS["local_parts"](), population(), seed=5)
    trainer = open_trainer(job.task, seed=job.seed)
    first = trainer.initial()
    start = Weights(first.vector + 1, first.buffers + 1)
    orders = Orders(1, start, np.arange(1))
    travels = Terms.of(job, orders, layouts_of(trainer)).travels
    assert travels[0] is not None
    read = orders_of(blob.unpack(orders_blob(orders, travels, run="study")), first, travels)
    at_home = np.setdiff1d(np.arange(len(first.vector)), travels[0].at)
    assert len(at_home)
    np.testing.assert_array_equal(read.start.vector[at_home], first.vector[at_home])
    np.testing.assert_array_equal(read.start.vector[travels[0].at], start.vector[travels[0].at])
