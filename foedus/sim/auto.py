"""The executor that picks the executor: measures the candidates on the first steps of the real cohort.

Each candidate carries out the first local steps of the coming round on a few of its clients: once to warm up,
then in turn with the best so far, a few times, of which the fastest counts. Whatever else the machine is doing
only ever adds time, and meets both; a busy moment decides nothing. Results are thrown away, so measuring changes
nothing. The fastest runs the whole run, and is stored in the run folder, because executors agree only to rounding
and a resumed run must take the same.

A candidate that cannot run the job (an operator that it does not know, a training loop of the user's own) is
passed by, and the line that tells the choice names the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from foedus.backends.cores import cores
from foedus.errors import ConfigurationError, FoedusError, LoweringMismatch, UnsupportedOperator
from foedus.rounds.work import Executor, Job, Orders, Session

STEPS = 8  # local steps of each client in a rehearsal, at most
LASTING = 24  # the same for slow models, of which fewer clients are rehearsed
CLIENTS = 4  # clients per core in a rehearsal, at least
LONG = 0.02  # seconds that a rehearsal by the plain loop had better take: more clients for quicker models
BUDGET = 0.5  # seconds that it may take: fewer steps for slower models
TURNS = 5  # rehearsals of each candidate on the clock, at most, and no new one once they have taken BUDGET
GAIN = 0.9  # workers are only started if they can be expected to take less than this of the best time so far
STARTING = 6.0  # seconds that starting workers takes, about; they must save more than that

UNSUITED = (
    UnsupportedOperator,
    LoweringMismatch,
    ConfigurationError,
)  # this executor cannot run the job; others may

Timer = Callable[[str, Callable[[], None]], float]  # (executor's name, rehearsal) → seconds


def clock(name: str, rehearsal: Callable[[], None]) -> float:
    """The default timer: seconds of a rehearsal."""
    begin = time.perf_counter()
    rehearsal()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Auto:
    """See :func:`foedus.executors.auto`. Not an executor itself: :func:`choose` opens one."""

    candidates: tuple[Executor, ...]
    timer: Timer = clock
    name: str = "auto"


class Measured(NamedTuple):
    """A candidate's seconds per local step, or why it was passed by."""

    name: str
    seconds: float | None
    reason: str = ""


def choose(auto: Auto, job: Job, orders: Orders, *, rounds: int, say: Callable[[str], None]) -> Session:
    """Open the fastest of the candidates for a job.

    Args:
        auto: candidates and timer.
        job: the job.
        orders: those of the coming round, on whose first clients and steps the candidates are measured.
        rounds: how many rounds there are to run.
        say: told in one line which was chosen and why.

    Raises:
        FoedusError: the error of the first candidate, if none can run the job.
    """
    best: Session | None = None
    measured: list[Measured] = []
    errors: list[Exception] = []
    sample, total = _sample(job, orders), rounds * _steps(job, orders)
    for candidate in auto.candidates:
        if doubt := _hopeless(candidate, measured, auto, total):
            measured.append(Measured(candidate.name, None, doubt))
            continue
        session: Session | None = None
        try:
            session = candidate.open(job)
            sample = sample if measured else affordable(session, sample)
            session.run(sample)  # to warm up: programs are compiled, workers get to know the data
            seconds = _in_turn(auto.timer, [s for s in (best, session) if s is not None], sample)
        except Exception as error:
            if session is not None:
                session.close()
            if best is None and not isinstance(error, UNSUITED):
                raise  # a fault of the model or the data: no executor could train it
            errors.append(error)
            measured.append(Measured(candidate.name, None, _first_line(error)))
            continue
        measured = [m._replace(seconds=seconds[0]) if best and m.name == best.name else m for m in measured]
        measured.append(Measured(candidate.name, seconds[-1]))
        loser, best = (best, session) if best is None or seconds[-1] < seconds[0] else (session, best)
        if loser is not None:
            loser.close()
    if best is None:
        raise errors[0] if errors else ConfigurationError("auto has no candidates")
    say(told(best.name, measured))
    return best


def told(chosen: str, measured: Sequence[Measured]) -> str:
    """The one line about the choice."""
    times = [f"{m.name} {1e3 * m.seconds:.3g}" for m in sorted(measured, key=lambda m: m.seconds or 0) if m.seconds]
    passed = [f"{m.name} passed by: {m.reason}" for m in measured if m.seconds is None]
    line = f"executor {chosen} (ms a local step: {', '.join(times)}"
    return "; ".join([line, *passed]) + ")"


def _in_turn(timer: Timer, sessions: Sequence[Session], sample: Orders) -> list[float]:
    """Seconds per local step of each session, the fastest of a few rehearsals that are taken in turn."""
    fastest = [math.inf] * len(sessions)
    begin = time.perf_counter()
    for _ in range(TURNS):
        fastest = [min(f, _measure(timer, s, sample)) for f, s in zip(fastest, sessions, strict=True)]
        if time.perf_counter() - begin > BUDGET:
            break
    return fastest


def _measure(timer: Timer, session: Session, sample: Orders) -> float:
    steps = 1

    def rehearsal() -> None:
        nonlocal steps
        steps = max(1, sum(session.run(sample).steps))

    return timer(session.name, rehearsal) / steps


def _sample(job: Job, orders: Orders) -> Orders:
    """The first steps of the clients that have data."""
    cohort, sizes = orders.cohort, job.clients.at(orders.round).sizes
    if sizes is not None:
        cohort = cohort[sizes[cohort] > 0]
    if not len(cohort):  # a cohort may be empty; somebody else's data tells as much
        cohort = np.arange(1) if sizes is None or not sizes.any() else np.flatnonzero(sizes)[:1]
    return replace(orders, cohort=cohort, limit=STEPS, limits=None, following=None)


def affordable(session: Session, sample: Orders, now: Callable[[], float] = time.perf_counter) -> Orders:
    """The sample with as many clients and steps as suit the speed of the first candidate.

    A few short steps would tell how long a round, or a client, takes to begin, not how long it takes. Of a slow model
    there is time for one client per core only, and that one makes more steps instead.
    """
    count, most = cores(), STEPS
    least = min(CLIENTS * count, len(sample.cohort))

    def seconds(steps: int) -> float:
        one = replace(sample, cohort=sample.cohort[:1], limit=steps)
        times = []
        for _ in range(3):  # the first warms up
            begin = now()
            session.run(one)
            times.append(now() - begin)
        return min(times[1:])

    one_step = seconds(1)
    if BUDGET / one_step / least < STEPS:
        least, most = min(count, len(sample.cohort)), LASTING
    steps = int(min(max(BUDGET / one_step / least, 1), most))
    clients = int(min(max(LONG / seconds(steps), least), len(sample.cohort)))
    return replace(sample, cohort=sample.cohort[:clients], limit=steps)


def _hopeless(candidate: Executor, measured: Sequence[Measured], auto: Auto, total: float) -> str | None:
    """Why a candidate need not be measured: starting worker processes takes seconds, and at best they are as
    many times faster than the plain loop as there are cores. ``total``: local steps of the whole run."""
    if candidate.name != "processes" or auto.timer is not clock:
        return None
    seconds = {m.name: m.seconds for m in measured if m.seconds is not None}
    if "debug" not in seconds:
        return None
    best, expected = min(seconds.values()), seconds["debug"] / cores()
    if expected >= GAIN * best:
        return f"at best {1e3 * expected:.3g}"
    if total * (best - expected) < STARTING:
        return "the run is too short to start workers for"
    return None


def _steps(job: Job, orders: Orders) -> float:
    """Local steps of one round, about."""
    spec, clients = job.algorithm.client, job.clients.at(orders.round)
    sizes = clients.sizes
    if sizes is None:
        first = int(orders.cohort[0]) if len(orders.cohort) else 0
        sizes = np.array([len(clients.train(first))])
    per_client = -(-float(sizes.mean()) // (spec.batch_size or max(sizes.max(), 1))) * (spec.epochs or 1)
    return len(orders.cohort) * (spec.steps or per_client)


def _first_line(error: Exception) -> str:
    told = str(error).split("\n")[0]
    return told if isinstance(error, FoedusError) else f"{type(error).__name__}: {told}"
