"""A round on the server, as a pure state machine: who is let in, when it ends, and what becomes of everybody's upload.

``state, actions = step(state, event, rules)``. ``TABLE`` is the machine: what may happen in which phase, and which
phases it may lead to; the diagram in docs/protocol.md is drawn from it. Whoever drives it (``net/coordinator``)
writes down the new state before it does what the actions say, and only then answers: *persist, then act*.

* A client has a *seat* for one attempt of one round; its key is the seat's name. It is seated once in an attempt: asked
  again, it is told the same key.
* A round whose attempt fails is tried again with the next attempt number and fresh keys; whoever holds bytes for the
  same orders sends them again under the new key.
* *Received* (it is in the sum, in memory) is not *counted* (the round is committed with it). After a restart, whoever
  is not in the sum that was written down is asked to send ``AGAIN``, with the same key.
* Where updates *flow* (buffered rounds), seats outlive the round that they were taken in, and a round ends when so many
  updates have come.

Time is seconds on the server's clock, given with every event. The phases are those of Bonawitz et al. (2019) and of
xaynet; failure is a phase like any other.

Not here: sums and models (``net/learning.py``), what is written where (``net/coordinator``), when clients come back
(``pacing.py``), the client's side (``session.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from foedus.protocol.messages import REASONS, Stands, Why


class Phase(StrEnum):
    """Where a run is."""

    IDLE = "idle"  # between two rounds, or waiting for clients to enrol
    SELECTING = "selecting"  # clients are let in; those that were may train and send
    TRAINING = "training"  # nobody else is let in
    AGGREGATING = "aggregating"  # enough has come; nothing more is taken
    FAILED = "failed"  # too little came; the next attempt begins after a while
    OVER = "over"  # there is no further round


class At(StrEnum):
    """Where a seat is."""

    TRAINING = "training"  # let in
    SENDING = "sending"  # has a place for its upload
    RECEIVED = "received"  # its update is in the sum, in memory
    AGAIN = "again"  # its update was in a sum that was lost: to be sent again
    REFUSED = "refused"  # its update was looked at and left out
    DECLINED = "declined"  # said that it will send nothing
    LAPSED = "lapsed"  # the attempt, or its own time, is over
    COUNTED = "counted"  # its update is in a committed round


OPEN = (At.TRAINING, At.SENDING, At.AGAIN)  # something may still come
ENGAGED = (*OPEN, At.RECEIVED)  # takes up a place of the attempt


class Seat(NamedTuple):
    """A client's seat: its key, whose it is, for what, and where it is.

    ``scale`` is what its update counts, once it has asked for a place: then it is in its bytes. ``since`` is when it
    was let in. ``why`` is what it said when it declined.
    """

    key: bytes
    position: int
    round: int
    attempt: int
    at: At = At.TRAINING
    since: float = 0.0
    scale: float | None = None
    part: int = 0
    why: str = ""


class Seats(Mapping[bytes, Seat]):
    """Seats by key, as a value. What is asked with every message takes no look at every seat: who has which, and how
    many are where.

    Example:
        >>> seats = Seats([Seat(b"a", 7, 1, 1), Seat(b"b", 8, 1, 1)])
        >>> after = seats.moved(seats[b"a"]._replace(at=At.RECEIVED))
        >>> seats.count(At.TRAINING), after.count(At.TRAINING), after.of(7)[0].at.value
        (2, 1, 'received')
    """

    __slots__ = ("_all", "_keys", "_tally")

    def __init__(self, seats: Iterable[Seat] = ()) -> None:
        self._all: dict[bytes, Seat] = {}
        self._keys: dict[int, tuple[bytes, ...]] = {}  # by position
        self._tally: dict[tuple[int, At], int] = {}  # by attempt and where they are
        self._put(seats)

    def _put(self, seats: Iterable[Seat]) -> None:
        for seat in seats:
            if (before := self._all.get(seat.key)) is None:
                self._keys[seat.position] = (*self._keys.get(seat.position, ()), seat.key)
            else:
                self._tally[before.attempt, before.at] -= 1
            self._all[seat.key] = seat
            self._tally[seat.attempt, seat.at] = self._tally.get((seat.attempt, seat.at), 0) + 1

    def moved(self, *seats: Seat) -> Seats:
        """With these seats as they are now, or new; a client's seat stays its own."""
        after = Seats()
        after._all, after._keys, after._tally = dict(self._all), dict(self._keys), dict(self._tally)
        after._put(seats)
        return after

    def of(self, position: int) -> list[Seat]:
        """A client's seats, in the order in which it got them."""
        return [self._all[key] for key in self._keys.get(position, ())]

    def count(self, *states: At) -> int:
        """How many are in one of these states."""
        return sum(count for (_, at), count in self._tally.items() if at in states)

    def taken(self, attempt: int) -> int:
        """How many of an attempt have not lapsed."""
        return sum(count for (own, at), count in self._tally.items() if own == attempt and at is not At.LAPSED)

    def __getitem__(self, key: bytes) -> Seat:
        return self._all[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __repr__(self) -> str:
        return f"Seats({list(self._all.values())!r})"


@dataclass(frozen=True)
class Rules:
    """What holds for all rounds of a run.

    Attributes:
        minimum: fewer contributors than this are never summed up and shown.
        window_s: clients are let in for so long.
        deadline_s: uploads are taken for so long, from the beginning.
        retry_s: between a failure and the next attempt.
        attempts: failures of one round after which the run is over.
        flowing: whether seats outlive rounds (buffered).
    """

    minimum: int = 1
    window_s: float = 300.0
    deadline_s: float = 3600.0
    retry_s: float = 5.0
    attempts: int = 100
    flowing: bool = False


@dataclass(frozen=True)
class State:
    """All that the machine knows. A value: :func:`step` gives a new one.

    Attributes:
        phase: where the run is.
        round, part, attempt: round and attempt are counted from 1; parts, for rounds within a round, from 0.
        goal: the round ends when so many were received.
        places: so many may be seated at a time.
        cohort: who may be seated; ``None``: whoever comes first.
        window_ends, deadline: on the server's clock; in FAILED, ``deadline`` is when the next attempt begins.
        reason: why the attempt before failed, or why it is over.
        opening: the sum may have been opened: there is no other attempt of this round.
        seats: by key, of this round (of all its attempts), and those that flow.
        minimum: fewest contributors to the round, for whoever looks.
    """

    phase: Phase = Phase.IDLE
    round: int = 0
    part: int = 0
    attempt: int = 0
    goal: int = 0
    places: int = 0
    cohort: frozenset[int] | None = None
    window_ends: float = 0.0
    deadline: float = 0.0
    reason: str = ""
    opening: bool = False
    seats: Seats = field(default_factory=Seats)
    minimum: int = 0

    def at(self, *states: At) -> list[Seat]:
        """The seats of this attempt (of all that flow) that are in one of these states."""
        return [s for s in self.seats.values() if s.at in states] if self.seats.count(*states) else []

    @property
    def received(self) -> frozenset[int]:
        """Positions of those whose updates are in the sum."""
        return frozenset(s.position for s in self.at(At.RECEIVED))

    @property
    def told(self) -> str:
        """The phase, for people: also that a masked or encrypted sum is being opened, which those in it have to do."""
        opens = self.opening and self.phase in (Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING)
        return "opening" if opens else str(self.phase)

    def declined(self) -> dict[str, int]:
        """How many of the round's clients declined when they were last asked, by reason."""
        last = {seat.position: seat for seat in sorted(self.seats.values(), key=lambda seat: seat.attempt)}
        said = Counter(
            seat.why if seat.why in REASONS else "other" for seat in last.values() if seat.at is At.DECLINED
        )  # fmt: skip
        return dict(said.most_common())


# --- events ---------------------------------------------------------------------------------------------------


class Begin(NamedTuple):
    """The coordinator begins a round (or a part of one). ``cohort`` None: whoever comes first."""

    now: float
    round: int
    goal: int
    places: int
    cohort: frozenset[int] | None = None
    part: int = 0


class Came(NamedTuple):
    """A client is there that may take part; ``key`` is a fresh one, for a new seat; ``pending`` what it holds."""

    now: float
    position: int
    key: bytes
    pending: tuple[bytes, ...] = ()


class Declined(NamedTuple):
    """A client will send nothing."""

    now: float
    key: bytes
    why: str = ""


class Started(NamedTuple):
    """A client asks for a place, or says that all is there: may it? ``scale`` is what its update would count now."""

    now: float
    key: bytes
    scale: float = 1.0


class Received(NamedTuple):
    """A client's update was merged into the sum."""

    now: float
    key: bytes


class Opening(NamedTuple):
    """The sum is about to be opened, masks are asked for or it is given to be decrypted: from now on a round that fails
    ends without a model, since no client helps to open another sum of it, which would show the difference."""

    now: float


class Summed(NamedTuple):
    """A masked sum has been opened: these seats are in it, and nothing more will come."""

    now: float
    keys: tuple[bytes, ...]


class Refused(NamedTuple):
    """A client's update was refused."""

    now: float
    key: bytes


class Tick(NamedTuple):
    """Time has passed."""

    now: float


class Committed(NamedTuple):
    """The sum became the next model. Written down in the same transaction as the model."""

    now: float


class Failed(NamedTuple):
    """The sum cannot become a model; or somebody stops the attempt."""

    now: float
    reason: str


class Restarted(NamedTuple):
    """Another process goes on from what was written down; ``summed`` are the positions in the sum that it found."""

    now: float
    summed: frozenset[int] = frozenset()


class Stop(NamedTuple):
    """There is no further round."""

    now: float
    reason: str


Event = (
    Begin
    | Came
    | Declined
    | Started
    | Received
    | Opening
    | Summed
    | Refused
    | Tick
    | Committed
    | Failed
    | Restarted
    | Stop
)


# --- actions --------------------------------------------------------------------------------------------------


class Save(NamedTuple):
    """Write the state, and these seats, before anything else of this step is done."""

    seats: tuple[Seat, ...] = ()


class Seated(NamedTuple):
    """Accept the client. ``held``: a key whose bytes it is to send under this one, instead of training."""

    seat: Seat
    held: bytes | None = None


class Away(NamedTuple):
    """Tell the client when to come back."""

    reason: str


class Go(NamedTuple):
    """The upload may go on."""

    seat: Seat


class Known(NamedTuple):
    """The update of this seat is in the sum already: say Received again."""

    seat: Seat


class Shut(NamedTuple):
    """The upload is no longer wanted."""

    why: Why


class Commit(NamedTuple):
    """Make the next model of the sum; then comes :class:`Committed` or :class:`Failed`."""


class Drop(NamedTuple):
    """Forget the sum, and all uploads under way that are not of an open seat."""


class Over(NamedTuple):
    """The run is over: tell the client so."""

    reason: str


Action = Save | Seated | Away | Go | Known | Shut | Commit | Drop | Over
Stepped = tuple[State, tuple[Action, ...]]
Move = Callable[[State, Any, Rules], Stepped]


def step(state: State, event: Event, rules: Rules) -> Stepped:
    """What an event makes of a state, and what is to be done.

    Example, a round of one client:
        >>> rules = Rules(minimum=1)
        >>> state, _ = step(State(), Begin(0.0, round=1, goal=1, places=1), rules)
        >>> state, (save, seated) = step(state, Came(1.0, position=7, key=b"k" * 16), rules)
        >>> seated.seat.position, state.phase.value
        (7, 'training')
        >>> state, actions = step(state, Received(2.0, b"k" * 16), rules)
        >>> state.phase.value, actions[-1]
        ('aggregating', Commit())
        >>> state, _ = step(state, Committed(3.0), rules)
        >>> state.phase.value, standing(state, b"k" * 16).value
        ('idle', 'counted')
    """
    row = _ROWS.get((state.phase, type(event)))
    if row is None:
        return state, ()
    after, actions = row.move(state, event, rules)
    assert after.phase in row.to, f"{state.phase} --{type(event).__name__}--> {after.phase} is not in the table"
    return after, actions


def standing(state: State, key: bytes) -> Stands | None:
    """How an upload stands; ``None`` for keys that are not of this round.

    A seat of a failed attempt is ``PENDING``: its client keeps the bytes, and is told by its next check-in to send them
    under another key. That changes once the round is committed without it.
    """
    seat = state.seats.get(key)
    return None if seat is None else stands(seat, state)


def stands(seat: Seat, state: State) -> Stands:
    """As :func:`standing`, of a seat that may be of an earlier round."""
    if seat.at is At.COUNTED:
        return Stands.COUNTED
    alive = seat.at in ENGAGED and seat.key in state.seats
    gone = (seat.round, seat.part) != (state.round, state.part) and not alive
    if gone or (state.phase in (Phase.IDLE, Phase.OVER) and not alive):
        return Stands.DISCARDED
    if seat.at in (At.REFUSED, At.DECLINED):
        return Stands.DISCARDED
    return Stands.AGAIN if seat.at is At.AGAIN else Stands.PENDING


def worthwhile_s(state: State, now: float) -> float:
    """Seconds until it is worth while to check in again, as far as the machine knows; see ``pacing.py``."""
    if state.phase is Phase.SELECTING:
        return 0.0 if state.seats.count(*ENGAGED) < state.places else max(0.0, state.window_ends - now)
    return max(0.0, state.deadline - now) if state.phase in (Phase.TRAINING, Phase.FAILED) else 0.0


# --- moves ----------------------------------------------------------------------------------------------------


def _begin(state: State, event: Begin, rules: Rules) -> Stepped:
    """A round begins; only seats that flow stay."""
    kept = Seats(state.at(*OPEN) if rules.flowing else ())
    begun = State(
        Phase.SELECTING, event.round, event.part, 1, event.goal, event.places, event.cohort,
        event.now + rules.window_s, event.now + rules.deadline_s, "", False, kept, rules.minimum,
    )  # fmt: skip
    return begun, (Save(),)


def _came(state: State, event: Came, rules: Rules) -> Stepped:
    """Give the client its seat, or a new one, or none."""
    mine = [s for s in state.seats.of(event.position) if _current(s, state, rules)]
    if (own := next((s for s in mine if s.at in OPEN), None)) is not None:
        return state, (Seated(own, own.key if own.key in event.pending else None),)
    gone = (At.LAPSED, At.DECLINED) if rules.flowing else (At.LAPSED,)
    if any(s.at not in gone for s in mine):
        return state, (Away("this round has had your answer"),)
    if state.cohort is not None and event.position not in state.cohort:
        return state, (Away("others were drawn for this round"),)
    if state.phase is not Phase.SELECTING or (event.now >= state.window_ends and not rules.flowing):
        return state, (Away("this round lets nobody else in"),)
    if state.seats.count(*ENGAGED) >= state.places:
        return state, (Away("this round is full"),)
    seat = Seat(event.key, event.position, state.round, state.attempt, since=event.now, part=state.part)
    if mine:  # where updates flow, a seat that lapsed is taken up again: a client has one key in an attempt
        seat = mine[0]._replace(at=At.TRAINING, since=event.now)
    held = next((k for k in event.pending if _same_orders(state.seats.get(k), seat)), None)
    after = _with(state, seat)
    if not rules.flowing and _full(after):
        after = replace(after, phase=Phase.TRAINING)
    return after, (Save((seat,)), Seated(seat, held))


def _current(seat: Seat, state: State, rules: Rules) -> bool:
    """Whether a seat is of the present attempt; where updates flow, or whether it can still come into it."""
    present = (seat.round, seat.part, seat.attempt) == (state.round, state.part, state.attempt)
    return present or (rules.flowing and seat.at in ENGAGED)


def _same_orders(held: Seat | None, seat: Seat) -> bool:
    return held is not None and (held.position, held.round, held.part) == (seat.position, seat.round, seat.part)


def _full(state: State) -> bool:
    """Whether nobody else can be let in."""
    if state.seats.count(*ENGAGED) >= state.places:
        return True
    # Whoever has a seat was drawn, and has one in an attempt: as many seats as were drawn are everybody's.
    return state.cohort is not None and state.seats.taken(state.attempt) >= len(state.cohort)


def _declined(state: State, event: Declined, rules: Rules) -> Stepped:
    seat = state.seats.get(event.key)
    if seat is None or seat.at not in OPEN:
        return state, ()
    return _moved(state, seat._replace(at=At.DECLINED, why=event.why), event.now, rules, write=True)


def _started(state: State, event: Started, rules: Rules) -> Stepped:
    """Whether a seat may send."""
    seat = state.seats.get(event.key)
    if seat is None:
        return state, (Shut(Why.LATE),)
    if seat.at is At.RECEIVED:
        return state, (Known(seat),)
    if seat.at not in OPEN:
        return state, (Shut(Why.ATTEMPT_OVER if seat.at is At.LAPSED else Why.LATE),)
    if seat.scale is not None:
        return state, (Go(seat),)
    seat = seat._replace(at=At.SENDING if seat.at is At.TRAINING else seat.at, scale=event.scale)
    # What an update counts for must be known after a restart, too, when it is in the bytes already.
    save = (Save((seat,)),) if rules.flowing else ()
    return _with(state, seat), (*save, Go(seat))


def _shut(state: State, event: Started, rules: Rules) -> Stepped:
    """Nothing is taken in this phase; what is in the sum is known all the same."""
    seat = state.seats.get(event.key)
    if seat is not None and seat.at is At.RECEIVED:
        return state, (Known(seat),)
    if rules.flowing and seat is not None and seat.at in OPEN and state.phase is not Phase.OVER:
        return state, (Away("the model is being made"),)
    return state, (Shut(_SHUT[state.phase]),)


_SHUT = {
    Phase.IDLE: Why.LATE, Phase.AGGREGATING: Why.GOAL_REACHED, Phase.FAILED: Why.ATTEMPT_OVER, Phase.OVER: Why.RUN_OVER,
}  # fmt: skip


def _received(state: State, event: Received, rules: Rules) -> Stepped:
    seat = state.seats[event.key]
    return _moved(state, seat._replace(at=At.RECEIVED), event.now, rules)


def _opening(state: State, event: Opening, rules: Rules) -> Stepped:
    """Written down before anybody is asked, with who is in the sum: it must be known after a restart, too."""
    return replace(state, opening=True), (Save(tuple(state.at(At.RECEIVED))),)


def _summed(state: State, event: Summed, rules: Rules) -> Stepped:
    seats = [state.seats[key]._replace(at=At.RECEIVED) for key in event.keys]
    return _finished(_with(state, *seats), event.now, rules, "a masked sum was opened")


def _refused(state: State, event: Refused, rules: Rules) -> Stepped:
    seat = state.seats[event.key]
    return _moved(state, seat._replace(at=At.REFUSED), event.now, rules, write=True)


def _moved(state: State, seat: Seat, now: float, rules: Rules, *, write: bool = False) -> Stepped:
    """A seat moved on; that may end the round."""
    after = _with(state, seat)
    if after.seats.count(At.RECEIVED) >= after.goal:
        return _ended(after, (seat,))
    if not rules.flowing:
        if after.phase is Phase.TRAINING and now < after.window_ends and not _full(after):
            after = replace(after, phase=Phase.SELECTING)
        elif after.phase is Phase.SELECTING and _full(after):
            after = replace(after, phase=Phase.TRAINING)
        if after.phase is Phase.TRAINING and not after.seats.count(*OPEN):
            ended, actions = _finished(after, now, rules, "nobody is left to send anything")
            if not write:
                return ended, actions
            lapsed = [each for action in actions if isinstance(action, Save) for each in action.seats]
            return ended, (Save((seat, *lapsed)), *(action for action in actions if not isinstance(action, Save)))
    save = (Save((seat,)),) if write or after.phase is not state.phase else ()
    return after, save


def _ticked(state: State, event: Tick, rules: Rules) -> Stepped:
    """Windows and deadlines."""
    if rules.flowing:
        return _flowed(state, event, rules)
    if event.now >= state.deadline:
        return _finished(state, event.now, rules, "the deadline has passed")
    if state.phase is not Phase.SELECTING or event.now < state.window_ends:
        return state, ()
    engaged = state.seats.count(*ENGAGED)
    if engaged < rules.minimum:
        came = f"{_many(engaged, 'client')} came, and {rules.minimum} are needed"
        return _failed(state, Failed(event.now, came), rules)
    after = replace(state, phase=Phase.TRAINING)
    if not after.seats.count(*OPEN):
        return _finished(after, event.now, rules, "nobody is left to send anything")
    return after, (Save(),)


def _flowed(state: State, event: Tick, rules: Rules) -> Stepped:
    """Where updates flow, seats lapse by themselves, and a round that brought too little goes on."""
    late = [s._replace(at=At.LAPSED) for s in state.at(*OPEN, At.REFUSED) if event.now >= s.since + rules.deadline_s]
    after = _with(state, *late)
    if event.now >= state.deadline:
        if after.seats.count(At.RECEIVED) >= rules.minimum:
            return _ended(after, tuple(late))
        after = replace(after, deadline=event.now + rules.deadline_s)
    return after, ((Save(tuple(late)),) if after is not state and after != state else ())


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def _finished(state: State, now: float, rules: Rules, why: str) -> Stepped:
    """Nothing more will come: is it enough?"""
    count = state.seats.count(At.RECEIVED)
    if count >= rules.minimum:
        return _ended(state, ())
    return _failed(state, Failed(now, f"{why}: {_many(count, 'update')} came, and {rules.minimum} are needed"), rules)


def _ended(state: State, changed: tuple[Seat, ...]) -> Stepped:
    """Enough has come. Written down only with the model: if the process dies now, the round goes on."""
    return replace(state, phase=Phase.AGGREGATING), (*((Save(changed),) if changed else ()), Commit())


def _aggregating(state: State, event: Tick, rules: Rules) -> Stepped:
    """The commit did not come to an end (a disk was full, say): try again."""
    return state, (Commit(),)


def _committed(state: State, event: Committed, rules: Rules) -> Stepped:
    """What was received is counted; the others' seats lapse, unless they flow."""
    changed = [s._replace(at=At.COUNTED) for s in state.at(At.RECEIVED)]
    if not rules.flowing:
        changed += [s._replace(at=At.LAPSED) for s in state.at(*OPEN)]
    after = replace(_with(state, *changed), phase=Phase.IDLE, reason="")
    return after, (Save(tuple(changed)), Drop())


def _failed(state: State, event: Failed, rules: Rules) -> Stepped:
    """The attempt is over. What was received is lost with the sum; its clients still hold the bytes."""
    changed = [s._replace(at=At.LAPSED) for s in state.at(*ENGAGED)]
    after = replace(_with(state, *changed), phase=Phase.FAILED, reason=event.reason, deadline=event.now + rules.retry_s)
    if state.attempt >= rules.attempts:
        reason = f"round {state.round} failed {state.attempt} times; the last time: {event.reason}"
        after = replace(after, phase=Phase.OVER, reason=reason)
    return after, (Save(tuple(changed)), Drop())


def _retried(state: State, event: Tick, rules: Rules) -> Stepped:
    """The next attempt of the same round, with fresh keys; none where the sum may have been opened."""
    if event.now < state.deadline or state.opening:
        return state, ()
    after = replace(
        state, phase=Phase.SELECTING, attempt=state.attempt + 1, window_ends=event.now + rules.window_s,
        deadline=event.now + rules.deadline_s,
    )  # fmt: skip
    return after, (Save(),)


def _restarted(state: State, event: Restarted, rules: Rules) -> Stepped:
    """Go on: whoever is not in the sum that was found is to send again; all have some time for it."""
    # Whether a seat had been received before the process died was not written down; a client that still trains does
    # not ask, and goes on.
    changed = []
    for seat in state.at(*ENGAGED):
        found = At.RECEIVED if seat.position in event.summed else At.AGAIN
        changed += [seat._replace(at=found)] if seat.at is not found else []
    phase = state.phase
    if phase is Phase.AGGREGATING:
        phase = Phase.SELECTING if rules.flowing else Phase.TRAINING
    after = replace(_with(state, *changed), phase=phase, deadline=max(state.deadline, event.now + rules.window_s))
    if after.seats.count(At.RECEIVED) >= after.goal:
        return _ended(after, tuple(changed))
    return after, (Save(tuple(changed)),)


def _stopped(state: State, event: Stop, rules: Rules) -> Stepped:
    changed = [s._replace(at=At.LAPSED) for s in state.at(*ENGAGED)]
    return replace(_with(state, *changed), phase=Phase.OVER, reason=event.reason), (Save(tuple(changed)), Drop())


def _soon(state: State, event: Came, rules: Rules) -> Stepped:
    return state, (
        Away({Phase.FAILED: "the round is tried again in a moment"}.get(state.phase, "come back in a moment")),
    )


def _over(state: State, event: Came, rules: Rules) -> Stepped:
    return state, (Over(state.reason),)


def _with(state: State, *seats: Seat) -> State:
    return replace(state, seats=state.seats.moved(*seats)) if seats else state


# --- the table ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """In a phase, an event leads to one of these phases; what is not listed changes nothing."""

    phase: Phase
    event: type[Event]
    to: tuple[Phase, ...]
    move: Move


_I, _S, _T, _A, _F, _O = Phase
_LIVE = (_S, _T, _A, _F, _O)

TABLE: tuple[Row, ...] = (
    Row(_I, Begin,     (_S,),      _begin),
    Row(_I, Came,      (_I,),      _soon),
    Row(_I, Started,   (_I,),      _shut),
    Row(_I, Restarted, (_I,),      lambda state, event, rules: (state, ())),
    Row(_I, Stop,      (_O,),      _stopped),
    Row(_S, Came,      (_S, _T),   _came),
    Row(_S, Declined,  _LIVE,      _declined),
    Row(_S, Started,   (_S,),      _started),
    Row(_S, Received,  _LIVE,      _received),
    Row(_S, Opening,   (_S,),      _opening),
    Row(_S, Summed,    _LIVE,      _summed),
    Row(_S, Refused,   _LIVE,      _refused),
    Row(_S, Tick,      _LIVE,      _ticked),
    Row(_S, Failed,    (_F, _O),   _failed),
    Row(_S, Restarted, (_S, _A),   _restarted),
    Row(_S, Stop,      (_O,),      _stopped),
    Row(_T, Came,      (_T,),      _came),
    Row(_T, Declined,  _LIVE,      _declined),
    Row(_T, Started,   (_T,),      _started),
    Row(_T, Received,  _LIVE,      _received),
    Row(_T, Opening,   (_T,),      _opening),
    Row(_T, Summed,    _LIVE,      _summed),
    Row(_T, Refused,   _LIVE,      _refused),
    Row(_T, Tick,      _LIVE,      _ticked),
    Row(_T, Failed,    (_F, _O),   _failed),
    Row(_T, Restarted, (_T, _A),   _restarted),
    Row(_T, Stop,      (_O,),      _stopped),
    Row(_A, Came,      (_A,),      _soon),
    Row(_A, Started,   (_A,),      _shut),
    Row(_A, Tick,      (_A,),      _aggregating),
    Row(_A, Opening,   (_A,),      _opening),
    Row(_A, Committed, (_I,),      _committed),
    Row(_A, Failed,    (_F, _O),   _failed),
    Row(_A, Restarted, (_S, _T, _A), _restarted),
    Row(_A, Stop,      (_O,),      _stopped),
    Row(_F, Came,      (_F,),      _soon),
    Row(_F, Started,   (_F,),      _shut),
    Row(_F, Tick,      (_S, _F),   _retried),
    Row(_F, Restarted, (_F,),      lambda state, event, rules: (state, ())),
    Row(_F, Stop,      (_O,),      _stopped),
    Row(_O, Came,      (_O,),      _over),
    Row(_O, Started,   (_O,),      _shut),
)  # fmt: skip

_ROWS = {(row.phase, row.event): row for row in TABLE}


# --- written down ---------------------------------------------------------------------------------------------


def written(state: State) -> bytes:
    """A state without its seats, which are rows of their own; the same bytes for the same state.

    Example:
        >>> read(written(State(round=3)), ()).round
        3
    """
    plain = {name: getattr(state, name) for name in State.__dataclass_fields__ if name != "seats"}
    plain["cohort"] = None if state.cohort is None else sorted(state.cohort)
    return json.dumps(plain, sort_keys=True).encode()


def read(data: bytes, seats: Iterable[Seat]) -> State:
    """The state of what was written, with its seats: those of the round, and those that flow."""
    plain = json.loads(data)
    cohort = plain.pop("cohort")
    state = State(**plain | {"phase": Phase(plain["phase"])})
    return replace(state, cohort=None if cohort is None else frozenset(cohort), seats=Seats(seats))
