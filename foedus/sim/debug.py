"""The plain executor: one client after another, in this process.

The reference for all others, and the one to find a fault with: an exception in the model or loss carries the
client, round, step and batch (:class:`foedus.errors.TrainingError`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from foedus.backends import Assignment, Trainer, Weights, open_trainer
from foedus.core.batches import plan
from foedus.sim.work import Collector, Job, Orders, Outcome, Session, read

Observer = Callable[[int, int, Weights], None]  # (client's position, local step, weights)


@dataclass(frozen=True)
class Debug:
    """See :func:`foedus.executors.debug`."""

    name: str = "debug"

    def open(self, job: Job) -> DebugSession:
        return DebugSession(job, open_trainer(job.task, seed=job.seed, device=job.device))


class DebugSession(Session):
    """Trains client after client; ``observe`` may be set to watch every local step."""

    name = "debug"

    def __init__(self, job: Job, trainer: Trainer) -> None:
        self._job, self._trainer = job, trainer
        self.observe: Observer | None = None

    def run(self, orders: Orders) -> Outcome:
        collector = Collector(self._job, orders, (self._trainer.layout, self._trainer.buffer_layout))
        for slot in range(len(orders.cohort)):
            self._client(slot, orders, collector)
        return collector.outcome

    def _client(self, slot: int, orders: Orders, collector: Collector) -> None:
        job, position = self._job, int(orders.cohort[slot])
        examples = read(job.clients, position)
        if not len(examples):
            return  # the rule for empty clients: no step, no weight
        spec = job.algorithm.client
        sizes, clients = np.array([len(examples)]), np.array([position])
        own = plan(spec, sizes, clients, seed=job.seed, round=orders.round, limit=orders.limit)
        start = orders.start._replace(buffers=orders.kept.get(position, orders.start.buffers))
        observe = self.observe
        watch = None if observe is None else lambda step, weights: observe(position, step, weights)
        work = Assignment(spec, examples, own, orders.round, job.clients.ids[position], watch)
        trained = self._trainer.train(start, work)
        collector.add(slot, trained.weights, examples=len(examples), steps=int(own.steps[0]), loss=trained.loss)

    def close(self) -> None:
        pass
