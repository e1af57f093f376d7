"""Faults planted on purpose: each is one that somebody makes one day, and each has to be found within 200 seeds.

``planted(name)`` makes the fault as long as it lasts. The number beside a fault is a seed that finds it, tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

from foedus.errors import StorageError
from foedus.net import leases
from foedus.net.coordinator import unsealing
from foedus.net.coordinator.driver import Driver
from foedus.net.coordinator.giving import Giving, _Given
from foedus.net.coordinator.recovery import Recovery
from foedus.net.coordinator.steps import Steps
from foedus.net.coordinator.unsealing import Unsealing
from foedus.net.course import Course
from foedus.net.learning import Learning
from foedus.net.store import Lease, SqlTransaction
from foedus.protocol import blob, session
from foedus.protocol import round as machine
from foedus.protocol.messages import Blob, Received, Stands
from foedus.protocol.round import At, Phase, Seats

from . import simulation


class Bug(NamedTuple):
    """What is patched, and a seed that finds it."""

    seed: int
    patches: Callable[[], list[Any]]


def rows(*changed: machine.Row) -> Any:
    """The round's table with other rows."""
    return patch.dict(machine._ROWS, {(row.phase, row.event): row for row in changed})


def every(event: type, move: Callable[..., Any]) -> Any:
    """The round's table with another move for an event, wherever it may happen."""
    found = [row._replace(move=move, to=tuple(Phase)) for row in machine.TABLE if row.event is event]
    return rows(*found)


# --- servers


def twice() -> list[Any]:
    started, take = machine._started, Learning.take

    def let_go(state: Any, event: Any, rules: Any) -> Any:
        seat = state.seats.get(event.key)
        if seat is not None and seat.at is At.RECEIVED:
            return state, (machine.Go(seat),)
        return started(state, event, rules)

    def add_again(self: Any, gathering: Any, position: int, parcel: Any, **how: Any) -> None:
        gathering.counted.pop(position, None)
        for intake in gathering.intakes.values():
            intake.counted.discard(position)
        take(self, gathering, position, parcel, **how)

    return [every(machine.Started, let_go), patch.object(Learning, "take", add_again)]


def told_too_early() -> list[Any]:
    stands = machine.stands
    early = lambda seat, state: Stands.COUNTED if seat.at is At.RECEIVED else stands(seat, state)  # noqa: E731
    return [patch.object(machine, "stands", early)]


def written_by_whom() -> list[Any]:
    return [patch.object(SqlTransaction, "fence", lambda self, epoch: None)]


def same_epoch() -> list[Any]:
    def lead(store: Any, holder: str, address: str, now: float, *, seconds: float = 6.0, **_: Any) -> Lease:
        with store.begin() as found:
            lease = found.lease("coordinator")
            if lease is not None and lease.holder != holder and lease.expires_at > now:
                return lease
            taken = Lease("coordinator", holder, address, 1, now + seconds)
            found.put_lease(taken)
            return taken

    return [patch.object(leases, "lead", lead)]


def epoch_back() -> list[Any]:
    lead = leases.lead

    def from_the_start(store: Any, holder: str, address: str, now: float, **how: Any) -> Lease:
        lease = lead(store, holder, address, now, **how)
        if lease.holder == holder and lease.epoch > 2:
            lease = lease._replace(epoch=1)
            with store.begin() as found:
                found.put_lease(lease)
        return lease

    return [patch.object(leases, "lead", from_the_start)]


def memory_survives() -> list[Any]:
    restarted = machine._restarted

    def believe(state: Any, event: Any, rules: Any) -> Any:
        engaged = frozenset(seat.position for seat in state.at(*machine.ENGAGED))
        return restarted(state, event._replace(summed=engaged), rules)

    return [every(machine.Restarted, lambda s, e, r: believe(s, e, r) if s.phase in _BUSY else (s, ()))]


_BUSY = (Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING)


def sum_of_a_failed_attempt() -> list[Any]:
    forget = Driver.forget

    def keep(self: Any, course: Any) -> None:
        if course.state.phase is not Phase.FAILED:
            forget(self, course)

    return [patch.object(Driver, "forget", keep)]


def too_few() -> list[Any]:
    finished = machine._finished
    return [
        patch.object(machine, "_finished", lambda s, now, rules, why: finished(s, now, replace(rules, minimum=1), why))
    ]


def no_deadline() -> list[Any]:
    ticked = machine._ticked

    def late(state: Any, event: Any, rules: Any) -> Any:
        return (state, ()) if event.now >= state.deadline else ticked(state, event, rules)

    return [every(machine.Tick, lambda s, e, r: _TICKS[s.phase](s, e, r) if s.phase in _TICKS else late(s, e, r))]


_TICKS: dict[Phase, Any] = {Phase.AGGREGATING: machine._aggregating, Phase.FAILED: machine._retried}


def said_before_written() -> list[Any]:
    step = Driver.step

    def unsaved(self: Any, course: Any, event: Any, now: float) -> Any:
        if not isinstance(event, machine.Came):
            return step(self, course, event, now)
        state, actions = machine.step(course.state, event, course.rules)
        self.take_over(course, state, actions, now)
        return actions

    return [patch.object(Driver, "step", unsaved)]


def removed_too_early() -> list[Any]:
    committed = Steps._committed

    def remove_first(self: Any, course: Any, now: float) -> None:
        self._ground.blobs.remove(course.checkpoint)
        committed(self, course, now)

    return [patch.object(Steps, "_committed", remove_first)]


def full_disk() -> list[Any]:
    """The update is in the sum, the write fails, and the client is told that all went wrong."""
    return [patch.object(Driver, "ahead", Driver.step)]


def after_the_goal() -> list[Any]:
    def received(state: Any, event: Any, rules: Any) -> Any:
        return machine._with(state, state.seats[event.key]._replace(at=At.RECEIVED)), ()

    aggregating, to = Phase.AGGREGATING, (Phase.AGGREGATING,)
    return [
        rows(
            machine.Row(aggregating, machine.Started, to, machine._started),
            machine.Row(aggregating, machine.Received, to, received),
        )
    ]


def two_seats() -> list[Any]:
    came = machine._came

    def anew(state: Any, event: Any, rules: Any) -> Any:
        mine = [k for k, s in state.seats.items() if s.position == event.position and s.at is not At.RECEIVED]
        others = replace(state, seats=Seats(s for k, s in state.seats.items() if k not in mine))
        after, actions = came(others, event, rules)
        return replace(after, seats=state.seats.moved(*after.seats.values())), actions

    return [every(machine.Came, lambda s, e, r: anew(s, e, r) if s.phase in _BUSY[:2] else _CAME[s.phase](s, e, r))]


_CAME: dict[Phase, Any] = {
    Phase.IDLE: machine._soon, Phase.AGGREGATING: machine._soon, Phase.FAILED: machine._soon, Phase.OVER: machine._over,
}  # fmt: skip


def error_is_swallowed() -> list[Any]:
    write = Driver.write

    def ignore(self: Any, course: Any, seats: Any, now: float) -> None:
        try:
            write(self, course, seats, now)
        except StorageError:
            return

    return [patch.object(Driver, "write", ignore)]


# --- those that were ours


def late_models_forgotten() -> list[Any]:
    load = Recovery._load

    def forgetful(self: Any, course: Any, now: float) -> None:
        with patch.object(Learning, "remember", lambda self, versions: None):
            load(self, course, now)

    return [patch.object(Recovery, "_load", forgetful)]


def told_apart_by_address() -> list[Any]:
    def give(self: Any, content: bytes, course: Any) -> Blob:
        digest = self._digests.get(id(content))
        if digest is None or digest not in self._given:
            digest = blob.digest_of(content)
            self._given[digest] = _Given(content, course.name)
            self._digests[id(content)] = digest
        return Blob(digest=digest, size=len(content))

    return [patch.object(Giving, "give", give)]


def earlier_rounds_not_read() -> list[Any]:
    read = Course.read

    def some(self: Any, state: bytes, found: Any) -> Any:
        bare = machine.read(state, ())
        here = lambda row: (row.round, row.part) == (bare.round, bare.part)  # noqa: E731
        return read(self, state, [row for row in found if here(row) or row.state in machine.OPEN])

    return [patch.object(Course, "read", some)]


def seat_given_anew() -> list[Any]:
    came = machine._came

    def anew(state: Any, event: Any, rules: Any) -> Any:
        gone = (At.LAPSED, At.DECLINED, At.REFUSED)
        mine = {k: s for k, s in state.seats.items() if s.position == event.position and s.at in gone}
        if not rules.flowing or not mine:
            return came(state, event, rules)
        others = replace(state, seats=Seats(s for k, s in state.seats.items() if k not in mine))
        after, actions = came(others, event, rules)
        return replace(after, seats=Seats({**mine, **after.seats}.values())), actions

    return [every(machine.Came, lambda s, e, r: anew(s, e, r) if s.phase in _BUSY[:2] else _CAME[s.phase](s, e, r))]


# --- encrypted sums


def one_is_believed() -> list[Any]:
    return [patch.object(unsealing, "TWO", 1)]


def opened_before_written() -> list[Any]:
    step = Driver.step

    def unsaved(self: Any, course: Any, event: Any, now: float) -> Any:
        if not isinstance(event, machine.Opening):
            return step(self, course, event, now)
        course.state, actions = machine.step(course.state, event, course.rules)
        return actions

    return [patch.object(Driver, "step", unsaved)]


def opened_for_the_next() -> list[Any]:
    """Ours, too: a disk is full when the round is committed, and its sum's answers commit the next one."""
    answered = Unsealing.answered

    def whichever(self: Any, decryption: Any, now: float) -> None:
        with patch.object(unsealing, "_waits", lambda course, decryption: True):
            answered(self, decryption, now)

    return [patch.object(Unsealing, "answered", whichever)]


# --- clients


def deleted_on_received() -> list[Any]:
    submitted = session._submitted

    def delete(state: Any, event: Any) -> Any:
        after, actions = submitted(state, event)
        if not isinstance(event.answer, Received):
            return after, actions
        rest = {k: h for k, h in after.held.items() if k != state.key}
        return replace(after, held=rest), (session.Settle(state.key, False), *actions[1:])

    return [_client_row(session.Phase.SUBMITTING, session.Heard, delete)]


def old_bytes() -> list[Any]:
    accepted = session._accepted

    def whatever(state: Any, answer: Any) -> Any:
        return accepted(state, replace(answer, held=next(iter(state.held), None)))

    return [patch.object(session, "_accepted", whatever)]


def forgets() -> list[Any]:
    perished = simulation.World._perished

    def all_gone(self: Any, client: Any) -> None:
        client.disk.clear()
        perished(self, client)

    return [patch.object(simulation.World, "_perished", all_gone)]


def _client_row(phase: session.Phase, event: type, move: Callable[..., Any]) -> Any:
    row = session._ROWS[phase, event]  # type: ignore[index]
    return patch.dict(session._ROWS, {(phase, event): row._replace(move=move)})


BUGS: dict[str, Bug] = {
    "an update that is sent again is added again": Bug(2, twice),
    "a client is told 'counted' before the model is written": Bug(0, told_too_early),
    "whoever has lost the lease still writes": Bug(50, written_by_whom),
    "a new leader has the epoch of the old one": Bug(50, same_epoch),
    "the epoch begins anew": Bug(0, epoch_back),
    "after a restart the sum is thought to be whole": Bug(0, memory_survives),
    "the sum of a failed attempt goes on": Bug(32, sum_of_a_failed_attempt),
    "a round of fewer than the minimum is committed": Bug(0, too_few),
    "deadlines pass unnoticed": Bug(0, no_deadline),
    "a key is told before it is written": Bug(3, said_before_written),
    "the old model is removed before the new one is named": Bug(8, removed_too_early),
    "a full disk loses track of what is in the sum": Bug(35, full_disk),
    "what comes while the model is made is taken": Bug(31, after_the_goal),
    "a client has two seats in an attempt": Bug(13, two_seats),
    "a write that failed is thought to be done": Bug(21, error_is_swallowed),
    "after a restart the models of late updates are forgotten": Bug(55, late_models_forgotten),
    "blobs are told apart by their address": Bug(91, told_apart_by_address),
    "received updates of earlier rounds are not read back": Bug(191, earlier_rounds_not_read),
    "a seat that lapsed is given anew under its old row": Bug(157, seat_given_anew),
    "what one client says of an encrypted sum is believed": Bug(11, one_is_believed),
    "an encrypted sum is opened before that is written": Bug(83, opened_before_written),
    "what a sum opens to is taken for the next round's": Bug(11, opened_for_the_next),
    "a client deletes what is only received": Bug(0, deleted_on_received),
    "a client sends old bytes for new orders": Bug(3, old_bytes),
    "a client that dies forgets what it has sent": Bug(9, forgets),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The fault is there as long as this lasts."""
    with ExitStack() as stack:
        for change in BUGS[name].patches():
            stack.enter_context(change)
        yield
