"""Clients' visits driven together: what a method's generators ask for, carried out for many clients at once.

Every client of a shard has its own generator (``foedus.core.method``). All are advanced side by side: the requests
that they yield are put into groups of the same kind, an executor carries out each group in one go, and every
generator is given its answer, until all have ended. Which clients are driven together changes no result.

Not here: how a group is carried out (the executors), what methods may not write (``brought.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.backends import Trainer, Weights
from foedus.backends.cohort import Guides
from foedus.core.client import Client, LocalTraining, manner
from foedus.core.method import Consult, Contribution, Measure, Method, Request, Train, Trained, Visit
from foedus.errors import FoedusError, NoGuarantee, TrainingError
from foedus.rounds.brought import check_contribution, check_generator, check_lengths, check_own, check_request
from foedus.rounds.work import METHOD, Job, Orders, held_out, read, under
from foedus.tree import Layout, Vector


class Group(NamedTuple):
    """Trainings that can be carried out in one go.

    Attributes:
        members: int64 [k], which of the driven clients.
        spec: how they train.
        phase: which training of the visit it is, counted from 0.
        guides: how it departs from the plain one; rows are the members'.
        buffers: what each begins with, [k, buffer].
    """

    members: NDArray[np.int64]
    spec: Client
    phase: int
    guides: Guides
    buffers: Vector


Train_ = Callable[[Group], Sequence[Trained]]
Answer_ = Callable[[int, Measure | Consult], Any]


@dataclass
class _Client:
    """A client whose visit is under way."""

    generator: Any
    visit: Visit
    request: Request
    trainings: int = 0


def method_of(job: Job) -> Method:
    """The job's method, which there is."""
    assert job.algorithm.method is not None
    return job.algorithm.method


def visit(job: Job, orders: Orders, slot: int, *, examples: int, layouts: tuple[Layout, Layout]) -> Visit:
    """What the client of a slot of the cohort has at hand."""
    position = int(orders.cohort[slot])
    kept = under(METHOD, orders.kept.get(position, {}))
    return Visit(
        orders.start.vector, orders.buffers(position), orders.down, kept, position, orders.round, job.seed, examples,
        job.algorithm.client, *layouts,
    )  # fmt: skip


def layouts_of(trainer: Trainer) -> tuple[Layout, Layout]:
    """Of parameters and buffers."""
    return trainer.layout, trainer.buffer_layout


def phase(orders: Orders, training: int) -> int:
    """The number that makes a training's batches its own within a round."""
    return orders.part << 16 | training


def contributions(job: Job, visits: Sequence[Visit], train: Train_, answer: Answer_) -> list[Contribution]:
    """What every client's visit ends with."""
    method = method_of(job)
    found = drive(job, visits, method.local, (train, _covered(job, answer)))
    for brought, seen in zip(found, visits, strict=True):
        check_contribution(method.label, brought, seen)
        check_lengths(method.label, brought, method.lengths(seen.layout))
    return found


def _covered(job: Job, answer: Answer_) -> Answer_:
    """The same answers; none where the noise that hides single examples is in their training, and not in answers."""
    client, label = job.algorithm.client, method_of(job).label
    if not (isinstance(client, LocalTraining) and client.private):
        return answer

    def refused(_: int, request: Measure | Consult) -> Any:
        raise NoGuarantee(
            f"clients train by dp_sgd(), and the method {label} asks for a {type(request).__name__} of their data, "
            "which has no noise: what it sends would not be covered. Leave the method out, or take another"
        )

    return refused


def own_model(job: Job, seen: Visit, train: Train_, answer: Answer_) -> Weights:
    """The client's own model, after a method that gives clients models of their own."""
    method = method_of(job)
    assert method.personal is not None
    (found,) = drive(job, [seen], method.personal, (train, answer))
    return check_own(method.label, found, seen)


def answered(job: Job, trainer: Trainer, orders: Orders, slot: int, request: Measure | Consult) -> Any:
    """What a client's own examples say: mean loss and metrics of some weights, or what the method's function gives."""
    position, clients = int(orders.cohort[slot]), job.clients.at(orders.round)
    if isinstance(request, Consult):
        examples = read(clients, position)
        with blamed(job, f"the method {method_of(job).label} failed in Consult", orders.round, position):
            return request.function(examples)
    buffers = orders.buffers(position) if request.buffers is None else request.buffers
    chosen = held_out(clients, position) if request.held_out else read(clients, position)
    return trainer.evaluate(Weights(request.vector, buffers), chosen)


def drive(
    job: Job, visits: Sequence[Visit], begin: Callable[[Visit], Any], carry_out: tuple[Train_, Answer_]
) -> list[Any]:
    """Begin every client's generator, and advance all until they have ended; what each returned."""
    label, (train, answer) = method_of(job).label, carry_out
    results: list[Any] = [None] * len(visits)
    open_: dict[int, _Client] = {}

    def advance(i: int, generator: Any, result: Any, trainings: int) -> None:
        with blamed(job, f"the method {label} failed", visits[i].round, visits[i].client):
            try:
                request = generator.send(result)
            except StopIteration as end:
                open_.pop(i, None)
                results[i] = end.value
                return
        check_request(label, request, visits[i])
        open_[i] = _Client(generator, visits[i], request, trainings)

    for i, seen in enumerate(visits):
        with blamed(job, f"the method {label} failed", seen.round, seen.client):
            generator = begin(seen)
        check_generator(label, begin, generator)
        advance(i, generator, None, 0)
    while open_:
        answers: dict[int, Any] = {}
        for group in _groups(open_):
            answers |= zip(group.members.tolist(), train(group), strict=True)
        for i, client in open_.items():
            if isinstance(client.request, Measure | Consult):
                answers[i] = answer(i, client.request)
        for i, result in answers.items():
            client = open_[i]
            trained = isinstance(client.request, Train)
            advance(i, client.generator, result, client.trainings + trained)
    return results


@contextmanager
def blamed(job: Job, what: str, number: int, position: int) -> Iterator[None]:
    """An exception of a method's own code, with the client and round that it happened at."""
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        name = job.clients.ids[position]
        raise TrainingError(
            f"{what} for client {name!r} in round {number}: {type(error).__name__}: {error}", client=name, round=number
        ) from error


def _groups(clients: dict[int, _Client]) -> Iterator[Group]:
    """The trainings asked for, those of one kind together."""
    kinds: dict[Any, list[int]] = {}
    for i, client in clients.items():
        request = client.request
        if isinstance(request, Train):
            own = (request.start, request.anchor, request.shift, request.momenta)
            common = (id(request.mask), id(request.bases))
            how = manner(request.spec or client.visit.spec, client.visit.round)
            kinds.setdefault((how, client.trainings, *(v is not None for v in own), *common), []).append(i)
    for members in kinds.values():
        yield _group(members, [clients[i] for i in members])


def _group(members: Sequence[int], clients: Sequence[_Client]) -> Group:
    requests = [c.request for c in clients if isinstance(c.request, Train)]
    visits = [c.visit for c in clients]
    first = requests[0]

    def rows(vectors: Sequence[Vector | None]) -> Vector | None:
        dtype = visits[0].received.dtype
        return None if vectors[0] is None else np.stack([v for v in vectors if v is not None]).astype(dtype, copy=False)

    start = rows([r.start for r in requests])
    anchor = rows([r.anchor for r in requests])
    if start is not None and anchor is None:  # penalties pull towards the received weights, wherever it begins
        anchor = np.broadcast_to(visits[0].received, start.shape)
    buffers = [v.buffers if r.buffers is None else r.buffers for r, v in zip(requests, visits, strict=True)]
    return Group(
        np.array(members, np.int64), first.spec or visits[0].spec, clients[0].trainings,
        Guides(start, anchor, rows([r.shift for r in requests]), first.mask, first.bases,
               rows([r.momenta for r in requests])),
        np.stack(buffers),
    )  # fmt: skip
