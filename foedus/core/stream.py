"""Data that arrives over rounds: what a population looks like in each of them.

A federation that runs for months does not train on a data set but on a stream: clients see new examples, forget old
ones, and what is to be learned drifts. A streaming population is a function from the round to the population as it is
then; everything else (executors, samplers, evaluation) asks for the population of its round.

Not here: how populations are made (``core/population.py``), drift itself, which the data has or has not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from foedus.core.parts import Part, Rows, resident

if TYPE_CHECKING:
    from foedus.core.population import Clients

_REMEMBERED = 3  # rounds whose populations are kept: this one, the next, and the one evaluated


class ByRound:
    """A function from the round to the population, which remembers its last answers."""

    def __init__(self, function: Callable[[int], Clients], label: str, code: str = "") -> None:
        self._function, self.label = function, label
        self.code = code  # tells functions of one name apart
        self._forget()

    def __call__(self, round: int) -> Clients:
        with self._lock:
            if round not in self._known:
                self._known[round] = self._function(round)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            return self._known[round]

    def instead(self, round: int, clients: Clients) -> Clients:
        """Remember another answer for a round; gives it back."""
        with self._lock:
            self._known[max(1, round)] = clients
        return clients

    def _forget(self) -> None:
        self._known: OrderedDict[int, Clients] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function, "label": self.label, "code": self.code}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def arrived(part: Part, round: int, *, per_round: int, window: int | None) -> Part:
    """What clients hold of a resident part in a round, counted from 1: the examples that have come, ``per_round`` each
    round in the client's own order, or the last ``window`` of them."""
    assert part.pool is not None
    pool, rows = part.pool
    ends = np.minimum(rows.sizes, round * per_round)
    begins = np.zeros_like(ends) if window is None else np.maximum(0, ends - window)
    lengths = ends - begins
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], lengths)
    at = np.repeat(rows.offsets[:-1] + begins, lengths) + inside
    return resident(pool, Rows(rows.values[at], offsets))
