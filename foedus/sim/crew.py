"""A round shared out over workers, whatever they are: processes of this machine, or actors of a cluster.

A cohort is cut into a few shares per worker, the largest first, and whoever is free takes the next (Graham
1969), so that a slow core or a large client holds nobody up. A worker merges all it does in a round and sends
one partial sum; merging is exact, so neither the number of workers nor who did what can change a bit. A
worker that dies is replaced, and all that it had not delivered is done again.

Not here: what a worker is and how one talks to it (``processes.py``, ``ray_executor.py``), and what it does
(``worker.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_whole
from foedus.errors import ConfigurationError, WorkerDied
from foedus.rounds.work import Job, Orders, Outcome, Session, shards, union
from foedus.sim.parcels import Failure
from foedus.sim.worker import Begin, Share, Word

SHARES = 4  # of a worker in a round; more would balance better and wait more often
RETRIES = 2  # of a share whose worker died


@runtime_checkable
class Worker(Protocol):
    """A worker, seen from the session that hired it."""

    ready: bool

    def tell(self, message: Begin | Share | Word) -> None:
        """Send a message. If the worker has died, its silence will tell."""

    def alive(self) -> bool:
        """Whether it can still be given work."""

    def ended(self) -> str:
        """How it ended, e.g. ``"with exit code 3"``."""

    def end(self, *, at_once: bool) -> None:
        """End it; at once, though it may be in the middle of its work, or as it likes."""


W = TypeVar("W", bound=Worker)


class CrewSession(Session, Generic[W]):
    """Workers are hired with the first round, when it is known how many are of use, and stay."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers = job, workers
        self._crew: list[W] = []

    @abstractmethod
    def _hire(self) -> W:
        """A new worker, which says READY when it is. Does not wait for it.

        Raises:
            ConfigurationError: there is no room for one.
        """

    @abstractmethod
    def _answers(self) -> Iterator[tuple[W, Any]]:
        """Wait for the next answers; None from workers that have died."""

    def run(self, orders: Orders) -> Outcome:
        sizes, count = self._job.clients.at(orders.round).sizes, min(self._workers, len(orders.cohort))
        weights = np.ones(len(orders.cohort), np.int64) if sizes is None else sizes[orders.cohort]
        rota = Rota(shards(weights, SHARES * count))
        try:
            return union(self._job, self._outcomes(orders, rota, count))
        except BaseException:
            dismiss(self._crew, at_once=True)  # what they are doing belongs to no round any more
            raise

    def _outcomes(self, orders: Orders, rota: Rota, count: int) -> Iterator[Outcome]:
        self._staff(count)
        for worker in self._crew:
            if worker.ready:
                _begin(worker, orders, rota)
        while rota.open:
            for worker, answer in self._answers():
                match answer:
                    case Failure():
                        raise answer.again()
                    case Word.READY:
                        worker.ready = True
                        _begin(worker, orders, rota)
                    case Word.DONE:
                        _go_on(worker, orders, rota)
                    case Outcome():
                        rota.collected(worker)
                        yield answer
                    case _:
                        self._replace(worker, orders, rota)

    def _staff(self, count: int) -> None:
        """As many live workers as wanted; starting one takes seconds, so they start side by side."""
        for worker in [worker for worker in self._crew if not worker.alive()]:
            self._crew.remove(worker)
            worker.end(at_once=True)
        while len(self._crew) < count:
            self._crew.append(self._hire())

    def _replace(self, worker: W, orders: Orders, rota: Rota) -> None:
        """A worker has died: what it had not delivered is for whoever has nothing to do, and another is hired."""
        self._crew.remove(worker)
        worker.end(at_once=False)  # it may not have quite ended, and how it does is of interest
        slots, deaths = rota.lost(worker)
        if deaths > RETRIES:
            raise WorkerDied(self._obituary(worker, orders, slots))
        for other in self._crew:
            if other.ready and rota.idle(other):
                _begin(other, orders, rota)
        try:
            self._crew.append(self._hire())
        except ConfigurationError:  # no room for another any more
            if not self._crew:
                raise

    def _obituary(self, worker: W, orders: Orders, slots: NDArray[np.int64] | None) -> str:
        how = worker.ended()
        if slots is None:
            return (
                f"{RETRIES + 1} workers ended before they could begin, the last {how}. What they "
                "printed may say why; otherwise use executor=foedus.executors.debug(), which has no workers"
            )
        ids = [self._job.clients.ids[int(c)] for c in orders.cohort[slots[:5]]]
        told = ", ".join(map(repr, ids)) + (f" and {len(slots) - 5} more" if len(slots) > 5 else "")
        fewer = f"executor=foedus.executors.{self.name}(workers={max(1, self._workers // 2)})"
        return (
            f"{RETRIES + 1} workers, one after the other, ended while they trained the same clients "
            f"({told}) in round {orders.round}, the last {how}. If memory ran out, use fewer: {fewer}. If the "
            "training code or a library ends the process, executor=foedus.executors.debug() shows where"
        )


def _begin(worker: Worker, orders: Orders, rota: Rota) -> None:
    if rota.waiting:
        worker.tell(Begin(orders.only(np.zeros(0, np.int64))))
        _go_on(worker, orders, rota)


def _go_on(worker: Worker, orders: Orders, rota: Rota) -> None:
    slots = rota.take(worker)
    if slots is None:
        worker.tell(Word.FINISH)
    else:
        part = orders.only(slots)
        worker.tell(Share(part.cohort, part.kept, part.limits))


def dismiss(crew: list[W], *, at_once: bool) -> None:
    """End all workers, and forget them."""
    while crew:
        crew.pop().end(at_once=at_once)


def check_workers(workers: int | None) -> None:
    """Refuse what is not a number of workers, with None for the default."""
    if workers is not None:
        check_whole("workers", workers, also=", or None for one per core")


class Rota:
    """Who trains which share of a round. It knows no processes: a worker is anything that can be a key.

    Attributes:
        waiting: numbers of the shares that nobody has taken.
        open: numbers of the shares whose outcome has not been collected.
    """

    def __init__(self, shares: Sequence[NDArray[np.int64]]) -> None:
        self._shares = shares  # slots of the cohort [slot], largest share first
        self.waiting = deque(range(len(shares)))
        self.open = set(self.waiting)
        self._taken: dict[object, list[int]] = {}
        self._deaths: Counter[int | None] = Counter()

    def take(self, worker: object) -> NDArray[np.int64] | None:
        """The slots of the next share; None if all are taken."""
        if not self.waiting:
            return None
        number = self.waiting.popleft()
        self._taken.setdefault(worker, []).append(number)
        return self._shares[number]

    def idle(self, worker: object) -> bool:
        """Whether the worker has nothing left to deliver."""
        return worker not in self._taken

    def collected(self, worker: object) -> None:
        """The worker has delivered all it has taken."""
        self.open -= set(self._taken.pop(worker, ()))

    def lost(self, worker: object) -> tuple[NDArray[np.int64] | None, int]:
        """The worker has died. All that it had taken waits again.

        Returns:
            the slots of the share it was at, or None, and how many workers have died of that one.
        """
        taken = self._taken.pop(worker, [])
        self.waiting.extendleft(reversed(taken))
        last = taken[-1] if taken else None
        self._deaths[last] += 1
        return None if last is None else self._shares[last], self._deaths[last]
