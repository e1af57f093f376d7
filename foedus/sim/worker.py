"""A worker process: what it is told, what it answers, and the loop it lives in.

It is a fresh interpreter that never imports the user's main script. The conversation, as the worker sees it
(→ it hears, ← it says):

    ← Ready                          the job is open
    → Begin(round, start)            a round's weights
    → Share(cohort, kept)  ← Done    any number of times; results are merged here
    → Finish               ← Outcome everything since Begin
    ← Failure                        instead of any answer; then it ends

A worker ends when its connection does, and at once when the process that started it is gone, even in the
middle of its work: its standard input is a pipe that nobody writes to, and a thread waits for its end.

Not here: who is given what, and what happens if a worker dies (``crew.py``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from foedus.core.method import Vectors
from foedus.rounds.debug import Debug
from foedus.rounds.work import Job, Orders, Outcome, union
from foedus.sim.parcels import Failure, Line, mapped, receive, send

A = TypeVar("A")
R = TypeVar("R")


class Begin(NamedTuple):
    """A round begins: its orders, without clients."""

    orders: Orders


class Share(NamedTuple):
    """Clients to train: positions int64 [client], what they kept, and how many steps each may make."""

    cohort: NDArray[np.int64]
    kept: Mapping[int, Vectors]
    limits: NDArray[np.int64] | None


class Word(Enum):
    """The messages that say nothing more."""

    READY = auto()
    DONE = auto()
    FINISH = auto()


def main(connection_handle: int, job_handle: int) -> None:
    """The life of a worker. The handles are those that it inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    threading.Thread(target=_end_with, args=(_lifeline(),), daemon=True).start()
    connection, file = _adopted(connection_handle, job_handle)
    with suppress(EOFError, ConnectionError):  # the session was closed
        trainee = caught(_opened, file)
        send(connection, trainee if isinstance(trainee, Failure) else Word.READY)
        while isinstance(trainee, Trainee):
            answer = caught(trainee.hear, receive(connection))
            if answer is not None:
                send(connection, answer)


class Trainee:
    """A worker's side of the conversation, without the connection."""

    def __init__(self, job: Job) -> None:
        self._job, self._session = job, Debug().open(job)
        self._begun: Begin | None = None
        self._total = Outcome()

    def hear(self, message: Begin | Share | Word) -> Word | Outcome | None:
        """Do as told; the answer, if there is one."""
        match message:
            case Begin():
                self._begun, self._total = message, Outcome()
                return None
            case Share(cohort, kept, limits):
                assert self._begun is not None
                orders = replace(self._begun.orders, cohort=cohort, kept=kept, limits=limits)
                part = self._session.run(orders)
                self._total = union(self._job, [self._total, part])
                return Word.DONE
            case _:
                return self._total


def caught(work: Callable[[A], R], argument: A) -> R | Failure:
    """``work(argument)``, or how it failed."""
    try:
        return work(argument)
    except Exception as error:
        return Failure.of(error)


def _opened(file: IO[bytes]) -> Trainee:
    with file:
        return Trainee(mapped(file))


def _lifeline() -> int:
    """Standard input under another number, and an empty one in its place for the user's code to read."""
    lifeline, empty = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return lifeline


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns when the process at the other end has ended, however it did
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # and whatever the user's code has started here
    os._exit(1)


if sys.platform == "win32":

    def _adopted(connection: int, file: int) -> tuple[Line, IO[bytes]]:
        import msvcrt

        return Line(connection), os.fdopen(msvcrt.open_osfhandle(file, os.O_RDWR), "r+b")

else:

    def _adopted(connection: int, file: int) -> tuple[Line, IO[bytes]]:
        return Line(connection), os.fdopen(file, "r+b")
