"""What a step makes, and what is next: a step, an evaluation on clients, or the end.

A commit is computed once; a disk that is full delays it, and nothing is computed or noised a second time. The model,
its line in the record and who is counted in it are written in one transaction.

Not here: what a sum is made into (``net/learning.py``), when a step ends (``protocol/round.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from foedus.errors import CommitFailed, CountedTwice, FoedusError, StaleEpoch, StorageError
from foedus.net import rings
from foedus.net.coordinator.driver import Driver
from foedus.net.course import EVALUATION, Course
from foedus.net.learning import Gathering
from foedus.net.rings import Ring
from foedus.net.store import Transaction
from foedus.protocol import round as machine
from foedus.protocol.messages import Event, Kind
from foedus.protocol.round import At, Phase
from foedus.record.files import json_line

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
REMEMBERED = 50  # rounds whose seats are kept, so that late askers are told how their uploads stand


class Steps:
    """Begins steps, and commits them.

    Args:
        driver: of the runs.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver, self._ground = driver, driver.ground

    def made(self, course: Course, now: float) -> None:
        """A step's updates are all there: commit it, and begin the next."""
        self.commit(course, now)
        if course.state.phase is Phase.IDLE and course.kind is Kind.TRAIN:
            self.next(course, now)

    def next(self, course: Course, now: float) -> None:
        """Begin what is next: an evaluation, a step, or nothing any more."""
        learning = course.learning
        served = learning.served
        evaluation = self._driver.courses.get(course.name + EVALUATION)
        if evaluation is not None and learning.state is not None and evaluation.state.round < learning.state.round:
            self._evaluate(course, learning.state.round, True, now)  # an earlier process died before it could ask
        if evaluation is not None and evaluation.under_way:
            return
        if why := learning.over:
            self._finish(course, why, now)
            return
        if learning.state is None:
            if learning.population < served.first:
                return
            learning.begin()
        self._begin(course, now)

    def _begin(self, course: Course, now: float) -> None:
        """A step begins: who is wanted is fixed, and the state before it is written."""
        learning, step = course.learning, course.learning.step
        if not course.checkpoint:
            assert learning.state is not None
            course.checkpoint = self._driver.keep(learning.checkpoint(learning.state, {}))
        if not course.rules.flowing and learning.population < course.rules.minimum:  # they may come back
            return
        wanted = course.wanted()
        learning.remember(course.versions())
        skipped = wanted.cohort is not None and len(wanted.cohort) < course.rules.minimum
        course.begun_at = now
        if skipped:  # drawn so small that it may not be summed up: nobody is asked
            course.gathering = Gathering(step)
            course.state = machine.State(Phase.AGGREGATING, step.round, step.part, 1)
            self.commit(course, now)
            return
        attempt = course.state.attempt if (course.state.round, course.state.part) == step else 0
        begin = machine.Begin(now, step.round, wanted.goal, wanted.places, wanted.cohort, step.part)
        self._driver.step(course, begin, now)
        if attempt:
            course.state = replace(course.state, attempt=attempt + 1)
        if course.every is not None:
            course.state = replace(course.state, deadline=now + course.every)
        self._ground.watch("begun", {"run": course.name, "round": step.round, "wanted": wanted.goal})

    def lost(self, course: Course, now: float) -> None:
        """A sum that may have been seen is lost: the round ends without a model, for there is no other of it."""
        state = course.state
        self._ground.watch("sum lost", {"run": course.name, "round": state.round, "reason": state.reason})
        course.gathering = Gathering(course.learning.step, opened=True)
        course.state = replace(state, phase=Phase.AGGREGATING, opening=False)
        self.commit(course, now)

    def hurry(self, course: Course, now: float) -> None:
        """Where the clock decides when a step ends: it goes on to the next tick of it if nothing has come."""
        state = course.state
        if course.every is None or state.phase is not Phase.SELECTING or now < state.deadline:
            return
        if state.seats.count(At.RECEIVED) < course.rules.minimum:
            course.state = replace(state, deadline=now + course.every)

    # --- the end of one

    def commit(self, course: Course, now: float) -> None:
        """Make of the sum what is to be made; what cannot be written now stays as it is, and is tried again."""
        try:
            if course.kind is Kind.EVALUATE:
                self._evaluated(course, now)
            else:
                self._committed(course, now)
        except StorageError as error:
            self._ground.watch("storage failed", {"run": course.name, "error": str(error)})
        except (StaleEpoch, CountedTwice):
            raise
        except FoedusError as error:
            self._ground.watch("failed", {"run": course.name, "round": course.state.round, "error": str(error)})
            told = f"{type(error).__name__}: {error}"[:1000]
            self._driver.step(course, machine.Failed(now, told), now)

    def _committed(self, course: Course, now: float) -> None:
        learning, step = course.learning, course.learning.step
        asked = sorted({s.position for s in course.state.seats.values() if s.attempt == course.state.attempt})
        if course.pending is None:
            with _own_code():
                course.pending = learning.commit(course.gathered(), np.array(asked, np.int64))
        made, counted = course.pending, sorted(course.gathered().counted)
        checkpoint = course.checkpoint
        if made.line is not None:
            checkpoint = self._driver.keep(learning.checkpoint(made.state, made.kept))
        state, actions = machine.step(course.state, machine.Committed(now), course.rules)
        seats = [seat for action in actions if isinstance(action, machine.Save) for seat in action.seats]
        old, before, kept = course.checkpoint, course.written[0], ("", 0)
        if made.line is None and self._ground.memory is not None:
            kept = self._driver.keep(self._ground.memory.seal(learning.between(made), course.name.encode())), 0
        after = replace(course, state=state, checkpoint=checkpoint, written=kept, key=b"")
        with self._ground.store.begin(self._ground.epoch()) as rows:
            rows.put_run(self._driver.row(after, now))
            rows.put_seats([course.row(seat) for seat in seats])
            if made.line is not None:
                self._record(course, rows, made.line, counted, now)
        learning.settle(made)
        course.state, course.checkpoint, course.key = state, checkpoint, b""
        course.ended(now)
        self._driver.take_over(course, state, [action for action in actions if isinstance(action, machine.Drop)], now)
        course.written = kept
        for gone in {old, before} - {"", checkpoint, kept[0]}:
            self._driver.discard(gone)
        self._driver.news.rings.append(rings.committed(course, step.round, asked))
        self._ground.watch(
            "committed", {"run": course.name, "round": step.round, "part": step.part, "counted": len(counted)}
        )  # fmt: skip
        self._evaluate(course, step.round, made.line is not None, now)

    def _record(
        self, course: Course, rows: Transaction, line: Mapping[str, Any], counted: Sequence[int], now: float
    ) -> None:  # fmt: skip
        """A round's lines in the record, who is counted in it, and the audit log."""
        number = line["round"]
        rows.count(course.name, number, counted)
        rows.put_line(course.name, METRICS, number, json_line(dict(line)).decode())
        timing = {"round": number, "seconds": round(max(0.0, now - course.begun_at), 6), "at": round(now, 3)}
        rows.put_line(course.name, TIMINGS, number, json_line(timing).decode())
        rows.note("committed", {"run": course.name, "round": number, "counted": list(counted)}, now)
        rows.forget_seats(course.name, number - REMEMBERED)

    def _finish(self, course: Course, why: str, now: float) -> None:
        """The run is over: everybody is given its model from now on."""
        self._driver.step(course, machine.Stop(now, why), now)
        with self._ground.store.begin(self._ground.epoch()) as rows:
            rows.note("finished", {"run": course.name, "why": why}, now)
        self._driver.news.rings.append(Ring(rings.bell(course, Event.FINISHED)))
        self._ground.watch("finished", {"run": course.name, "why": why})

    # --- evaluation on clients

    def _evaluate(self, course: Course, number: int, whole: bool, now: float) -> None:
        """Ask clients to evaluate the model of a round, if that is due."""
        evaluation = self._driver.courses.get(course.name + EVALUATION)
        if evaluation is None or not whole or not course.learning.due(number):
            return
        wanted = evaluation.wanted()
        evaluation.begun_at, evaluation.figures = now, {}
        evaluation.state = machine.State()
        begin = machine.Begin(now, number, wanted.goal, wanted.places, wanted.cohort)
        self._driver.step(evaluation, begin, now)

    def _evaluated(self, course: Course, now: float) -> None:
        """The figures of an evaluation go into the line of its round; nobody's own are written down."""
        with _own_code():
            figures = course.learning.spread([course.figures[p] for p in sorted(course.figures)])
        number, run = course.state.round, course.learning.served.name
        state, actions = machine.step(course.state, machine.Committed(now), course.rules)
        with self._ground.store.begin(self._ground.epoch()) as rows:
            for at, text in rows.lines(run, METRICS, after=number - 1):
                if at == number:
                    rows.put_line(run, METRICS, number, json_line(json.loads(text) | figures).decode())
            rows.put_run(self._driver.row(replace(course, state=state), now))
            rows.put_seats([course.row(s) for a in actions if isinstance(a, machine.Save) for s in a.seats])
        course.ended(now)
        self._driver.take_over(course, state, [action for action in actions if isinstance(action, machine.Drop)], now)
        self._ground.watch("evaluated", {"run": run, "round": number})


@contextmanager
def _own_code() -> Iterator[None]:
    """Where code runs that came with the task or the algorithm: a mistake in it ends an attempt of its own run, and
    neither the server nor other runs."""
    try:
        yield
    except FoedusError:
        raise
    except Exception as error:
        raise CommitFailed(f"{type(error).__name__}: {error}") from error


__all__ = ["METRICS", "TIMINGS", "Steps"]
