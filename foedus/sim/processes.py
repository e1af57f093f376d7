"""The executor that shares a cohort out over worker processes of this machine.

Workers are fresh interpreters started once (:mod:`foedus.sim.worker`), not forks and not
``multiprocessing``'s spawn: the user's main script is never imported again, so it needs no
``if __name__ == "__main__"``, and cells of a notebook work. They hold the job, map one copy of the data, and
train one client each at a time on one core, which beats any library's own threads on small batches.

A cohort is cut into a few shares per worker, the largest first, and whoever is free takes the next (Graham
1969), so that a slow core or a large client holds nobody up. A worker merges all it does in a round and sends
one partial sum; merging is exact, so neither the number of workers nor who did what can change a bit. A
worker that dies is started again, and all that it had not delivered is done again.

Not here: the worker's side (``worker.py``), how values travel (``parcels.py``), other machines
(``ray_executor.py``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError, WorkerDied
from foedus.sim.parcels import Failure, Line, memory_file, receive, send
from foedus.sim.work import Job, Orders, Outcome, Session, shards, union
from foedus.sim.worker import Begin, Share, Word

SHARES = 4  # of a worker in a round; more would balance better and wait more often
RETRIES = 2  # of a share whose worker died

_START = (
    "import json, sys; path, *handles = json.loads(sys.stdin.buffer.readline()); sys.path[:] = path; "
    "from foedus.sim.worker import main; main(*handles)"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Processes:
    """See :func:`foedus.executors.processes`."""

    workers: int | None = None
    name: str = "processes"

    def __post_init__(self) -> None:
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise ConfigurationError(
                f"workers is a number of processes from 1, or None for one per core; not {self.workers!r}"
            )

    def open(self, job: Job) -> ProcessesSession:
        return ProcessesSession(job, self.workers or cores())


class ProcessesSession(Session):
    """Workers start with the first round, when it is known how many are of use."""

    name = "processes"

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers = job, workers
        self._file = memory_file(job)
        self._crew: list[Worker] = []
        self._end = weakref.finalize(self, _close, self._crew, self._file)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers."""
        return tuple(worker.process.pid for worker in self._crew)

    def run(self, orders: Orders) -> Outcome:
        sizes, count = self._job.clients.sizes, min(self._workers, len(orders.cohort))
        weights = np.ones(len(orders.cohort), np.int64) if sizes is None else sizes[orders.cohort]
        rota = Rota(shards(weights, SHARES * count))
        try:
            return union(self._job, self._outcomes(orders, rota, count))
        except BaseException:
            _dismiss(self._crew, at_once=True)  # what they are doing belongs to no round any more
            raise

    def close(self) -> None:
        self._end()

    def _outcomes(self, orders: Orders, rota: Rota, count: int) -> Iterator[Outcome]:
        self._staff(count)
        for worker in self._crew:
            if worker.ready:
                self._begin(worker, orders, rota)
        while rota.open:
            for worker, answer in self._answers():
                match answer:
                    case Failure():
                        raise answer.again()
                    case Word.READY:
                        worker.ready = True
                        self._begin(worker, orders, rota)
                    case Word.DONE:
                        self._go_on(worker, orders, rota)
                    case Outcome():
                        rota.collected(worker)
                        yield answer
                    case _:
                        self._replace(worker, orders, rota)

    def _staff(self, count: int) -> None:
        """As many live workers as wanted; starting one takes seconds, so they start side by side."""
        dead = [worker for worker in self._crew if worker.process.poll() is not None]
        for worker in dead:
            self._crew.remove(worker)
            worker.end(at_once=True)
        while len(self._crew) < count:
            self._crew.append(Worker(self._file))

    def _begin(self, worker: Worker, orders: Orders, rota: Rota) -> None:
        if rota.waiting:
            worker.tell(Begin(orders.round, orders.start))
            self._go_on(worker, orders, rota)

    def _go_on(self, worker: Worker, orders: Orders, rota: Rota) -> None:
        slots = rota.take(worker)
        if slots is None:
            worker.tell(Word.FINISH)
        else:
            part = orders.only(slots)
            worker.tell(Share(part.cohort, part.kept))

    def _answers(self) -> Iterator[tuple[Worker, Any]]:
        """The next answers, and None from workers that have died."""
        told = wait([worker.connection for worker in self._crew], timeout=1.0)
        for worker in list(self._crew):
            if worker.connection in told:
                yield worker, worker.answer()
            elif worker.process.poll() is not None and not worker.connection.poll():
                yield worker, None  # though a child of its own still holds its connection open

    def _replace(self, worker: Worker, orders: Orders, rota: Rota) -> None:
        """A worker has died: what it had not delivered waits again, and another is started."""
        self._crew.remove(worker)
        worker.end(at_once=False)  # it may not have quite ended, and how it does is of interest
        slots, deaths = rota.lost(worker)
        if deaths > RETRIES:
            raise WorkerDied(self._obituary(worker, orders, slots))
        self._crew.append(Worker(self._file))

    def _obituary(self, worker: Worker, orders: Orders, slots: NDArray[np.int64] | None) -> str:
        how = _ending(worker.process.returncode)
        if slots is None:
            return (
                f"{RETRIES + 1} worker processes ended before they could begin, the last {how}. What they "
                "printed may say why; otherwise use executor=foedus.executors.debug(), which has no workers"
            )
        ids = [self._job.clients.ids[int(c)] for c in orders.cohort[slots[:5]]]
        told = ", ".join(map(repr, ids)) + (f" and {len(slots) - 5} more" if len(slots) > 5 else "")
        return (
            f"{RETRIES + 1} worker processes, one after the other, ended while they trained the same clients "
            f"({told}) in round {orders.round}, the last {how}. If memory ran "
            f"out, use fewer: executor=foedus.executors.processes(workers={max(1, self._workers // 2)}). If the "
            "training code or a library ends the process, executor=foedus.executors.debug() shows where"
        )


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
        self._taken: dict[Hashable, list[int]] = {}
        self._deaths: Counter[int | None] = Counter()

    def take(self, worker: Hashable) -> NDArray[np.int64] | None:
        """The slots of the next share; None if all are taken."""
        if not self.waiting:
            return None
        number = self.waiting.popleft()
        self._taken.setdefault(worker, []).append(number)
        return self._shares[number]

    def collected(self, worker: Hashable) -> None:
        """The worker has delivered all it has taken."""
        self.open -= set(self._taken.pop(worker, ()))

    def lost(self, worker: Hashable) -> tuple[NDArray[np.int64] | None, int]:
        """The worker has died. All that it had taken waits again.

        Returns:
            the slots of the share it was at, or None, and how many workers have died of that one.
        """
        taken = self._taken.pop(worker, [])
        self.waiting.extendleft(reversed(taken))
        last = taken[-1] if taken else None
        self._deaths[last] += 1
        return None if last is None else self._shares[last], self._deaths[last]


class Worker:
    """A worker process, seen from the one that started it."""

    def __init__(self, job: IO[bytes]) -> None:
        self.connection, theirs = Pipe()
        self.ready = False
        self.process = _spawn(theirs, job)
        theirs.close()

    def tell(self, message: Begin | Share | Word) -> None:
        with suppress(ConnectionError):  # it has died, which its silence will tell
            send(self.connection, message)

    def answer(self) -> Any:
        """What it says; None if it is no more."""
        try:
            return receive(self.connection)
        except (EOFError, ConnectionError):
            return None

    def end(self, *, at_once: bool) -> None:
        """End it; one with nothing to do ends by itself when its connection does."""
        self.connection.close()
        if at_once:
            _kill(self.process)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            _kill(self.process)
            self.process.wait()
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()


def _close(crew: list[Worker], file: IO[bytes]) -> None:
    _dismiss(crew, at_once=False)
    file.close()


def _dismiss(crew: list[Worker], *, at_once: bool) -> None:
    for worker in crew:
        worker.connection.close()  # all know before any is waited for
    while crew:
        crew.pop().end(at_once=at_once)


def _ending(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by the signal {signal.Signals(-code).name}"
    except ValueError:
        return f"by the signal {-code}"


def cores() -> int:
    """How many processor cores this process may use: by affinity, and by a container's quota."""
    count = os.cpu_count() or 1
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


# --- the operating system's part ----------------------------------------------------------------------------


def _spawn(connection: Line, job: IO[bytes]) -> subprocess.Popen[bytes]:
    """A fresh interpreter with our options and our ``sys.path``, which inherits a connection and a file."""
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", _START]  # type: ignore[attr-defined]
    process, handles = _inheriting(command, connection, job)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died, which its silence will tell
        path = [p for p in sys.path if isinstance(p, str)]
        process.stdin.write(json.dumps([path, *handles]).encode() + b"\n")
        process.stdin.flush()  # and left open: its end tells the worker that we are gone
    return process


if sys.platform == "win32":

    def _inheriting(
        command: list[str], connection: Line, job: IO[bytes]
    ) -> tuple[subprocess.Popen[bytes], list[int]]:
        import msvcrt

        handles = [connection.fileno(), msvcrt.get_osfhandle(job.fileno())]
        for handle in handles:
            os.set_handle_inheritable(handle, True)
        start = subprocess.STARTUPINFO(lpAttributeList={"handle_list": handles})
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**_ONE_THREAD, **os.environ}, startupinfo=start,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
        )  # fmt: skip
        return process, handles

    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()

else:

    def _inheriting(
        command: list[str], connection: Line, job: IO[bytes]
    ) -> tuple[subprocess.Popen[bytes], list[int]]:
        handles = [connection.fileno(), job.fileno()]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**_ONE_THREAD, **os.environ}, pass_fds=handles,
            process_group=0,  # so that Ctrl-C does not reach it
        )  # fmt: skip
        return process, handles

    def _kill(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
