"""Clients for tests of the server: what each has, and the client's halves of a visit, without a sandbox or rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.values import State
from foedus.protocol import blob
from foedus.rounds.debug import DebugSession
from foedus.rounds.evaluate import ClientFigures
from foedus.rounds.freight import closed_of, figures_blob, orders_of, update_blob
from foedus.rounds.parcel import Parcel, Terms, packed
from foedus.rounds.work import UPDATE, Job, Orders, held_out


@dataclass
class Trainee:
    """All the clients of a population, each with what it keeps."""

    task: fd.Task
    algorithm: fd.Algorithm
    clients: fd.Clients
    seed: int = 0
    kept: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trainer = open_trainer(self.task, seed=self.seed)
        self.job = Job(self.task, self.algorithm, self.clients, self.seed)
        self._waiting: dict[tuple[int, bytes], Parcel] = {}

    def orders(self, data: bytes | memoryview, position: int, scale: float = 1.0) -> Orders:
        layouts = self.trainer.layout, self.trainer.buffer_layout
        nobody = Orders(0, self.trainer.initial(), np.empty(0, np.int64))
        travels = Terms.of(self.job, nobody, layouts).travels
        found = orders_of(blob.unpack(data), self.trainer.initial(), travels)
        kept = {position: self.kept[position]} if position in self.kept else {}
        return replace(found, cohort=np.array([position]), kept=kept, scale=scale)

    def update(self, data: bytes | memoryview, position: int, *, scale: float = 1.0) -> bytes:
        """The update that a client makes of some orders, as bytes; what it keeps waits until it is let in."""
        orders = self.orders(data, position, scale)
        session = DebugSession(self.job, self.trainer)
        given = session.run(replace(orders, single=True)).given[position]
        terms = Terms.of(self.job, orders, (self.trainer.layout, self.trainer.buffer_layout))
        parcel = packed(terms, position, given.contribution, given.examples)
        content = update_blob(parcel)
        self._waiting[position, blob.digest_of(content)] = parcel
        return content

    def let_in(self, position: int, content: bytes) -> None:
        """The server took it."""
        parcel = self._waiting.pop((position, blob.digest_of(content)), None)
        if parcel is not None and parcel.kept is not None:
            self.kept[position] = parcel.kept

    def opened(self, closed: bytes, run: str, round: int, position: int) -> dict[str, Any]:
        """What a client finds in an encrypted sum, by its own key."""
        orders = Orders(round, self.trainer.initial(), np.array([position]))
        terms = Terms.of(self.job, orders, (self.trainer.layout, self.trainer.buffer_layout))
        context = terms.context(position, UPDATE, terms.layout(UPDATE, 0).size)
        sealed = self.algorithm.aggregator.sealed
        assert sealed is not None
        return sealed.open(closed_of(blob.unpack(closed), run=run, round=round), context)

    def figures(self, data: bytes | memoryview, position: int) -> bytes:
        """The figures of an evaluation, as bytes."""
        orders = self.orders(data, position)
        examples = held_out(self.clients.at(orders.round), position)
        weights = orders.start._replace(buffers=orders.buffers(position))
        method, personal = self.algorithm.method, None
        if method is not None and method.personal is not None:
            own = DebugSession(self.job, self.trainer).personal(orders)
            personal = self.trainer.evaluate(own, examples)
        found: Any = ClientFigures(len(examples), self.trainer.evaluate(weights, examples), personal)
        return figures_blob(found)
