"""The model on its way down: what clients are sent before a round.

Not here: what methods and aggregators send beside it (``commit.py``, ``brought.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from foedus.backends import Weights
from foedus.core.aggregate import message_bytes
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError
from foedus.rounds.commit import Server
from foedus.rounds.state import RunState


class Sent(NamedTuple):
    """The model as clients receive it, and how many bytes each is sent for it."""

    weights: Weights
    bytes: int


class Sender:
    """Sends the model to clients: as it is, or through the algorithm's downlink."""

    def __init__(self, server: Server) -> None:
        self._server, self._last = server, (-1, Sent(Weights(np.empty(0), np.empty(0)), 0))
        if server.job.algorithm.downlink is not None and server.travels:
            raise ConfigurationError(
                "downlink= compresses whole models, and here parts of the model stay with the clients. Leave out one "
                "of the two"
            )

    def sent(self, state: RunState) -> Sent:
        """What clients are sent before the next round; the same for all of them."""
        if self._last[0] != state.round:
            self._last = state.round, self._made(state)
        return self._last[1]

    def _made(self, state: RunState) -> Sent:
        rule, (vector, buffers) = self._server.job.algorithm.downlink, state.weights
        if rule is None:
            return Sent(state.weights, sum(self._server.sizes(state.weights)))
        seed, layout = self._server.job.seed, self._server.layout
        context = Context(seed, state.round + 1, SERVER, layout=layout, size=layout.size, channel="model")
        message = rule.encode(Update(vector, 1.0), context)
        found, _ = rule.decode(rule.init(layout), rule.admit(message, context), context)
        return Sent(Weights(found.astype(vector.dtype), buffers), message_bytes(message) + buffers.nbytes)
