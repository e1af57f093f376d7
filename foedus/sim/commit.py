"""The server's end of a round: what was merged is decoded, and becomes the next global model.

Not here: who took part (``engine.py``), how clients trained (the executors).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from foedus.backends import Weights
from foedus.core.aggregate import Aggregator
from foedus.core.method import Gathered
from foedus.core.values import SERVER, Context, Message, State
from foedus.sim.state import COSTS, RunState
from foedus.sim.work import BUFFERS, UPDATE, Job, Outcome
from foedus.tree import Layout, Vector


class Server(NamedTuple):
    """What the server needs to know to decode: the job, and the layouts of parameters and buffers."""

    job: Job
    layout: Layout
    buffer_layout: Layout

    def first(self, state_of: Weights) -> RunState:
        """The state of a run in which nothing has happened."""
        algorithm, population = self.job.algorithm, len(self.job.clients)
        method = algorithm.method
        sides = (
            {} if method is None else {name: rule.init(self.layout) for name, rule in method.sides.items()}
        )
        return RunState(
            round=0,
            weights=state_of,
            server=algorithm.server.init(state_of.vector),
            aggregator=algorithm.aggregator.init(self.layout),
            buffers=algorithm.buffers.init(self.buffer_layout),
            method={} if method is None else method.init(state_of.vector, population),
            sides=sides,
            costs=np.zeros((population, len(COSTS))),
        )

    def commit(self, state: RunState, outcome: Outcome, number: int, *, pull: Vector | None = None) -> None:
        """The round's end: the next model, and what the server keeps; ``pull`` is added to the update."""
        algorithm = self.job.algorithm
        vector, buffers = state.weights
        update = None
        if outcome.message is not None:
            update, state.aggregator = self._decoded(UPDATE, state.aggregator, outcome.message, number)
            update = update if pull is None else update + pull
        if algorithm.method is not None:
            update, state.method = algorithm.method.finish(self._gathered(state, outcome, update, number))
        if update is not None:
            vector, state.server = algorithm.server.step(state.server, vector, update, number)
        if outcome.buffers is not None:
            change, state.buffers = self._decoded(BUFFERS, state.buffers, outcome.buffers, number)
            buffers = (buffers + change).astype(buffers.dtype)
        state.weights = Weights(vector, buffers)

    def _gathered(self, state: RunState, outcome: Outcome, update: Vector | None, number: int) -> Gathered:
        sides = {}
        for name, message in sorted(outcome.sides.items()):
            sides[name], state.sides[name] = self._decoded(name, state.sides[name], message, number)
        return Gathered(
            state.method, state.weights.vector, update, sides, outcome.senders, len(self.job.clients), number,
            self.job.algorithm.client.rate(number),
        )  # fmt: skip

    def _decoded(self, channel: str, state: State, message: Message, number: int) -> tuple[Vector, State]:
        rule: Aggregator = self.job.algorithm.aggregator_of(channel)
        layout = {UPDATE: self.layout, BUFFERS: self.buffer_layout}.get(channel)
        size = self.layout.size if layout is None else layout.size
        context = Context(self.job.seed, number, SERVER, layout=layout, size=size, channel=channel)
        return rule.decode(state, message, context)
