"""The plain executor: one client after another, in this process.

The reference for all others, and the one to find a fault with: an exception in the model or loss carries the
client, round, step and batch (:class:`foedus.errors.TrainingError`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from foedus.backends import Assignment, Trainer, Weights, open_trainer
from foedus.backends.cohort import UNGUIDED
from foedus.core.batches import plan
from foedus.core.examples import Examples
from foedus.core.method import Consult, Measure, Trained
from foedus.core.values import Context, Secret
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.rounds.collect import Collector
from foedus.rounds.spending import exhausted
from foedus.rounds.visits import Group, answered, contributions, layouts_of, own_model, phase, visit
from foedus.rounds.work import Job, Orders, Outcome, Session, read

Observer = Callable[[int, int, Weights], None]  # (client's position, local step, weights)


@dataclass(frozen=True)
class Debug:
    """See :func:`foedus.executors.debug`."""

    name: str = "debug"

    def open(self, job: Job) -> DebugSession:
        return DebugSession(job, open_trainer(job.task, seed=job.seed, device=job.device))


class DebugSession(Session):
    """Trains client after client; ``observe`` may be set to watch every local step. ``secret`` is where training that
    adds noise for privacy draws it from: by default counted from the seed, for simulations only."""

    name = "debug"

    def __init__(
        self, job: Job, trainer: Trainer, *, secret: Secret | None = known_to_all_who_know_the_seed
    ) -> None:  # fmt: skip
        self._job, self._trainer, self._secret = job, trainer, secret
        self.observe: Observer | None = None

    def run(self, orders: Orders) -> Outcome:
        collector = Collector(self._job, orders, layouts_of(self._trainer))
        for slot in range(len(orders.cohort)):
            self._client(slot, orders, collector)
        return collector.outcome

    def _client(self, slot: int, orders: Orders, collector: Collector) -> None:
        job, position = self._job, int(orders.cohort[slot])
        examples = read(job.clients.at(orders.round), position)
        if not len(examples):
            return  # the rule for empty clients: no step, no weight
        limit = orders.most(slice(slot, slot + 1))
        if told := exhausted(job.algorithm, orders.kept.get(position, {}), len(examples), limit):
            collector.spent(slot, told)
            return
        seen = visit(job, orders, slot, examples=len(examples), layouts=layouts_of(self._trainer))
        if job.algorithm.method is None:
            buffers = orders.buffers(position)[None]
            group = Group(np.zeros(1, np.int64), job.algorithm.client, 0, UNGUIDED, buffers)
            trained = self._trained(orders, slot, examples, group)
            weights = Weights(trained.vector, trained.buffers)
            collector.add(slot, weights, examples=len(examples), steps=trained.steps, loss=trained.loss)
            return

        def train(group: Group) -> list[Trained]:
            return [self._trained(orders, slot, examples, group)]

        def answer(_: int, request: Measure | Consult) -> Any:
            return answered(job, self._trainer, orders, slot, request)

        (brought,) = contributions(job, [seen], train, answer)
        collector.contribute(slot, brought, len(examples))

    def personal(self, orders: Orders) -> Weights:
        """The own model of the one client of the orders, after a method that gives clients models of their own."""
        job = self._job
        position = int(orders.cohort[0])
        examples = read(job.clients.at(orders.round), position)
        if not len(examples):  # nothing to train or choose on: the global model is all it has
            return Weights(orders.start.vector, orders.buffers(position))
        seen = visit(job, orders, 0, examples=len(examples), layouts=layouts_of(self._trainer))
        return own_model(
            job,
            seen,
            lambda group: [self._trained(orders, 0, examples, group)],
            lambda _, request: answered(job, self._trainer, orders, 0, request),
        )

    def _trained(self, orders: Orders, slot: int, examples: Examples, group: Group) -> Trained:
        """One training of one client."""
        job, position = self._job, int(orders.cohort[slot])
        sizes, clients = np.array([len(examples)]), np.array([position])
        own = plan(
            group.spec, sizes, clients, seed=job.seed, round=orders.round, limit=orders.most(slice(slot, slot + 1)),
            phase=phase(orders, group.phase),
        )  # fmt: skip
        guides = group.guides.of(np.zeros(1, np.int64))
        own_rows = (guides.start, guides.anchor, guides.shift, guides.momenta)
        start, anchor, shift, momenta = (None if v is None else v[0] for v in own_rows)
        begin = Weights(orders.start.vector if start is None else start, group.buffers[0])
        observe = self.observe
        watch = None if observe is None else lambda step, weights: observe(position, step, weights)
        work = Assignment(
            group.spec,
            examples,
            own,
            orders.round,
            job.clients.ids[position],
            watch,
            anchor,
            shift,
            guides.mask,
            guides.bases,
            momenta,
            Context(job.seed, orders.round, position, secret=self._secret),
        )
        trained = self._trainer.train(begin, work)
        return Trained(*trained.weights, int(own.steps[0]), trained.loss, trained.momenta)

    def close(self) -> None:
        pass
