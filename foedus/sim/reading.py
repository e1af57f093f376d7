"""Reading clients' data in threads, the next round's while this round trains.

Who takes part in the next round does not depend on how this one ends, so the time that a user's function takes
to make or fetch data need not be added to the time that training takes. A fault in data that was read ahead is
told when its own round comes, and never if that round does not.

Not here: which clients those are (the engine says, `Orders.following`), and resident populations, whose examples
lie in memory already.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.examples import Examples
from foedus.core.population import Clients
from foedus.rounds.work import read

__all__ = ["Reading"]

CHUNKS = 16  # pieces of a cohort for each thread: few enough to cost nothing, many enough to end together

Cohort = NDArray[np.int64]


class _Begun(NamedTuple):
    cohort: Cohort
    clients: Clients
    pieces: list[Future[list[Examples]]]
    given_up: Event  # between two clients a thread looks whether anybody still wants the rest


class Reading:
    """The training examples of cohorts, read by some threads.

    Example:
        >>> clients = Clients.generated(lambda i: ([[float(i)]], [i]), 100)
        >>> reading = Reading(threads=2)
        >>> reading.begin(np.array([3, 4]), clients)  # and meanwhile ...
        >>> [e.targets.tolist() for e in reading.take(np.array([3, 4]), clients)]
        [[3], [4]]
        >>> reading.close()
    """

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "reading")
        self._ahead: _Begun | None = None

    def begin(self, cohort: Cohort, clients: Clients) -> None:
        """Start to read the data of the clients at these positions [C], to be taken later."""
        self._give_up()
        self._ahead = self._submit(cohort, clients)

    def take(self, cohort: Cohort, clients: Clients) -> list[Examples]:
        """The examples of the clients at these positions [C], read now if they have not been begun.

        Raises:
            FoedusError: the data of a client could not be read; says whose.
        """
        begun = self._ahead
        if begun is None or begun.clients is not clients or not np.array_equal(begun.cohort, cohort):
            self.begin(cohort, clients)
        assert self._ahead is not None
        begun, self._ahead = self._ahead, None
        try:
            return [examples for piece in begun.pieces for examples in piece.result()]
        finally:
            begun.given_up.set()  # if one piece failed, the others are of no use

    def close(self) -> None:
        """Give up what was begun, and end the threads."""
        self._give_up()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, cohort: Cohort, clients: Clients) -> _Begun:
        cut, given_up = np.array_split(cohort, max(1, min(len(cohort), CHUNKS * self._threads))), Event()
        return _Begun(
            cohort,
            clients,
            [self._pool.submit(self._piece, clients, part.tolist(), given_up) for part in cut],
            given_up,
        )

    def _piece(self, clients: Clients, positions: Sequence[int], given_up: Event) -> list[Examples]:
        return [read(clients, position) for position in positions if not given_up.is_set()]

    def _give_up(self) -> None:
        if self._ahead is not None:
            self._ahead.given_up.set()
            self._ahead = None
