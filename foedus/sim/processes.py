"""The executor that shares a cohort out over worker processes of this machine.

Workers are fresh interpreters started once (:mod:`foedus.sim.worker`), not forks and not
``multiprocessing``'s spawn: the user's main script is never imported again, so it needs no
``if __name__ == "__main__"``, and cells of a notebook work. They hold the job, map one copy of the data, and
train one client each at a time on one core, which beats any library's own threads on small batches.

Not here: who is given what, and what if a worker dies (``crew.py``); the worker's side (``worker.py``); how
values travel (``parcels.py``); other machines (``ray_executor.py``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import IO, Any

from foedus.backends.cores import cores
from foedus.rounds.work import Job
from foedus.sim.crew import CrewSession, check_workers, dismiss
from foedus.sim.parcels import Line, memory_file, receive, send
from foedus.sim.worker import Begin, Share, Word

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
        check_workers(self.workers)

    def open(self, job: Job) -> ProcessesSession:
        return ProcessesSession(job, int(self.workers or cores()))


class ProcessesSession(CrewSession["Process"]):
    """See :class:`foedus.sim.crew.CrewSession`."""

    name = "processes"

    def __init__(self, job: Job, workers: int) -> None:
        super().__init__(job, workers)
        self._file = memory_file(job)
        self._end = weakref.finalize(self, _close, self._crew, self._file)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers."""
        return tuple(worker.process.pid for worker in self._crew)

    def close(self) -> None:
        self._end()

    def _hire(self) -> Process:
        return Process(self._file)

    def _answers(self) -> Iterator[tuple[Process, Any]]:
        told = wait([worker.connection for worker in self._crew], timeout=1.0)
        for worker in list(self._crew):
            if worker.connection in told:
                yield worker, worker.answer()
            elif not worker.alive() and not worker.connection.poll():
                yield worker, None  # though a child of its own still holds its connection open


class Process:
    """A worker process, seen from the one that started it; see :class:`foedus.sim.crew.Worker`."""

    def __init__(self, job: IO[bytes]) -> None:
        self.connection, theirs = Pipe()
        self.ready = False
        self.process = _spawn(theirs, job)
        theirs.close()

    def tell(self, message: Begin | Share | Word) -> None:
        with suppress(ConnectionError):
            send(self.connection, message)

    def answer(self) -> Any:
        """What it says; None if it is no more."""
        try:
            return receive(self.connection)
        except (EOFError, ConnectionError):
            return None

    def alive(self) -> bool:
        return self.process.poll() is None

    def ended(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"with exit code {code}"
        known = {s.value: s.name for s in signal.Signals}
        return f"by the signal {known.get(-code, -code)}"

    def end(self, *, at_once: bool) -> None:
        self.connection.close()  # one with nothing to do ends by itself when its connection does
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


def _close(crew: list[Process], file: IO[bytes]) -> None:
    for worker in crew:
        worker.connection.close()  # all know before any is waited for
    dismiss(crew, at_once=False)
    file.close()


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

    def _inheriting(command: list[str], connection: Line, job: IO[bytes]) -> tuple[subprocess.Popen[bytes], list[int]]:
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

    def _inheriting(command: list[str], connection: Line, job: IO[bytes]) -> tuple[subprocess.Popen[bytes], list[int]]:
        handles = [connection.fileno(), job.fileno()]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**_ONE_THREAD, **os.environ}, pass_fds=handles,
            process_group=0,  # so that Ctrl-C does not reach it
        )  # fmt: skip
        return process, handles

    def _kill(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
