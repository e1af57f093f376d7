"""The server's end of a round: what was merged is decoded, and becomes the next global model.

Not here: who took part (``engine.py``), how clients trained (the executors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from foedus.backends import Weights
from foedus.core.aggregate import Aggregator, nothing
from foedus.core.method import Gathered, Travels, Vectors, travelling
from foedus.core.server import sgd
from foedus.core.values import NOTHING, SERVER, Context, Message, Secret, State
from foedus.privacy.claims import seen_by_nobody
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.rounds.brought import finished, first_state
from foedus.rounds.state import COSTS, RunState
from foedus.rounds.work import BUFFERS, UPDATE, Job, Outcome, side_layout
from foedus.tree import Layout, Vector

_LENGTH = "length of what is sent"  # kept beside the state of a channel that has noise


class Server(NamedTuple):
    """What the server needs to know to decode: the job, and the layouts of parameters and buffers; and where its noise
    comes from: counted, so that simulated runs repeat, or ``None`` for the operating system."""

    job: Job
    layout: Layout
    buffer_layout: Layout
    secret: Secret | None = known_to_all_who_know_the_seed

    def first(self, state_of: Weights) -> RunState:
        """The state of a run in which nothing has happened."""
        algorithm, population = self.job.algorithm, len(self.job.clients)
        method = algorithm.method
        return RunState(
            round=0,
            weights=state_of,
            server=algorithm.server.init(state_of.vector),
            aggregator=algorithm.aggregator.init(self._own(UPDATE, self.layout)),
            buffers=algorithm.buffers.init(self._own(BUFFERS, self.buffer_layout)),
            method={} if method is None else first_state(method, state_of.vector, population),
            sides={},  # made when something comes: only then is it known how long it is
            costs=np.zeros((population, len(COSTS))),
        )

    def averaging(self) -> Server:
        """One that averages and does nothing else: an edge's, whose server optimiser is the server's own."""
        return self._replace(job=replace(self.job, algorithm=replace(self.job.algorithm, server=sgd())))

    def commit(self, state: RunState, outcome: Outcome, number: int, *, pull: Weights | None = None) -> None:
        """The round's end: the next model, and what the server keeps; ``pull`` is added to the update."""
        algorithm = self.job.algorithm
        vector, buffers = state.weights
        update, refused = None, len(outcome.refused)
        message = outcome.message
        if message is None and seen_by_nobody(algorithm.aggregator):
            message = self._nothing(UPDATE, state, number)
        if message is not None:
            update, state.aggregator = self._decoded(UPDATE, state.aggregator, message, number, refused=refused)
        if algorithm.method is not None:
            gathered = self._gathered(state, outcome, update, number)
            update, state.method = finished(algorithm.method, gathered)
        if update is not None:
            update = update if pull is None else update + pull.vector
            vector, state.server = algorithm.server.step(state.server, vector, update, number)
        message = outcome.buffers
        if message is None and seen_by_nobody(algorithm.buffers) and self.job.task.average_buffers and len(buffers):
            message = self._nothing(BUFFERS, state, number)
        if message is not None:
            change, state.buffers = self._decoded(BUFFERS, state.buffers, message, number, refused=refused)
            change = change if pull is None else change + pull.buffers
            buffers = (buffers + change).astype(buffers.dtype)
        state.weights = Weights(vector, buffers)

    def _gathered(self, state: RunState, outcome: Outcome, update: Vector | None, number: int) -> Gathered:
        sides = {}
        for name, message in sorted((outcome.sides | self._unsent(state, outcome, number)).items()):
            size = outcome.sizes.get(name) or self._length(state, name)
            kept = dict(state.sides.get(name) or self._first_side(name, size))
            kept.pop(_LENGTH, None)
            sides[name], after = self._decoded(name, kept, message, number, size=size)
            state.sides[name] = after if self._silent(name) else after | {_LENGTH: np.array([size])}
        return Gathered(
            state.method, state.weights.vector, update, sides, outcome.senders, self._population(number), number,
            self.job.algorithm.client.rate(number), len(outcome.clients) - len(outcome.refused),
            self.layout,
        )  # fmt: skip

    # Channels with noise of the server's are decoded in every round: nobody is to see whether anything came in them.

    def _silent(self, channel: str) -> bool:
        """Whether a round in which nothing comes in a channel may show that."""
        return not seen_by_nobody(self.job.algorithm.aggregator_of(channel))

    def _unsent(self, state: RunState, outcome: Outcome, number: int) -> dict[str, Message]:
        """Sums of nothing for the method's channels in which nothing came, where nobody is to see that."""
        channels = self.job.algorithm.sides.keys() - outcome.sides.keys()
        return {
            name: self._nothing(name, state, number, size=self._length(state, name))
            for name in channels
            if not self._silent(name)
        }

    def _length(self, state: RunState, channel: str) -> int:
        """Of the vectors in a channel of the method's: as ever; the model's, as long as nothing has ever come."""
        known = state.sides.get(channel, {}).get(_LENGTH)
        return self.layout.size if known is None else int(known[0])

    def _nothing(self, channel: str, state: RunState, number: int, *, size: int = 0) -> Message:
        """The sum of no messages."""
        rule = self.job.algorithm.aggregator_of(channel)
        return nothing(rule, self._context(channel, number, size=size, told=self.told(state)))

    def _first_side(self, channel: str, size: int) -> State:
        """What the aggregator of a method's own channel keeps at first."""
        return self.job.algorithm.aggregator_of(channel).init(side_layout(channel, size, self.layout))

    def _decoded(
        self, channel: str, state: State, message: Message, number: int, *, size: int = 0, refused: int = 0
    ) -> tuple[Vector, State]:
        rule: Aggregator = self.job.algorithm.aggregator_of(channel)
        layouts = {UPDATE: self.layout, BUFFERS: self.buffer_layout}
        context = self._context(channel, number, size=size)._replace(refused=refused)
        vector, state = rule.decode(state, message, context)
        part = self.travels.get(channel)
        if part is None:
            return vector, state
        scattered = np.zeros(layouts[channel].size, vector.dtype)
        scattered[part.at] = vector
        return scattered, state

    def _population(self, number: int) -> int:
        """How many clients could send something in a round."""
        sizes = self.job.clients.at(number).sizes
        return len(self.job.clients) if sizes is None else int(np.count_nonzero(sizes))

    def _context(
        self, channel: str, number: int, *, size: int = 0, told: Mapping[str, Vectors] | None = None
    ) -> Context:
        """The server's context of a channel."""
        whole = {UPDATE: self.layout, BUFFERS: self.buffer_layout}.get(channel)
        layout = side_layout(channel, size, self.layout) if whole is None else self._own(channel, whole)
        return Context(
            self.job.seed, number, SERVER, layout=layout, size=layout.size, channel=channel,
            told=(told or {}).get(channel, NOTHING), secret=self.secret,
        )  # fmt: skip

    def told(self, state: RunState) -> dict[str, Vectors]:
        """What the aggregators tell clients, by channel, where they tell anything."""
        algorithm = self.job.algorithm
        rules = {UPDATE: (algorithm.aggregator, state.aggregator), BUFFERS: (algorithm.buffers, state.buffers)}
        # As long as nothing has come in a channel, nobody knows how long it is; what is told first is the same for all.
        rules |= {
            name: (rule, state.sides.get(name) or rule.init(self.layout)) for name, rule in algorithm.sides.items()
        }
        return {channel: rule.tell(own) for channel, (rule, own) in rules.items() if rule.tell is not None}

    @property
    def travels(self) -> dict[str, Travels]:
        """What travels of the parameters and of the buffers, where it is not all."""
        parts = travelling(self.job.algorithm.method, (self.layout, self.buffer_layout))
        return {name: part for name, part in zip((UPDATE, BUFFERS), parts, strict=True) if part is not None}

    def _own(self, channel: str, whole: Layout) -> Layout:
        """The layout of what travels in a channel."""
        part = self.travels.get(channel)
        return whole if part is None else part.layout

    def sizes(self, weights: Weights) -> tuple[int, int]:
        """Bytes of the parameters and of the buffers, as far as they travel."""
        both = zip((UPDATE, BUFFERS), weights, strict=True)
        return tuple(  # type: ignore[return-value]
            v.nbytes if (part := self.travels.get(name)) is None else len(part.at) * v.itemsize for name, v in both
        )
