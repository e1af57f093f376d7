"""A client's conversation with a server, as a pure state machine: what to say next, and what to keep.

``state, actions = step(state, event)``. ``TABLE`` is the machine, and the diagram in docs/protocol.md is drawn from it.
Whoever drives it (``net/agent.py``) carries out the actions in their order, each for certain before the next: what is
to be kept is on the disk before anything is said of it.

* Encoded bytes are held from before the first of them leaves until the server says that they are counted, or never
  will be. Sent again, they are these very bytes, never noised anew.
* Whatever cannot be reached is tried again later and later, at moments that the client draws for itself.
* One thing at a time: bytes that wait to be sent go first, then standings are asked for, then comes the check-in.

A session is logged by its shape, one sign a step, as in Bonawitz et al. (2019): ``-`` check-in, ``v`` orders and code
fetched, ``[`` ``]`` training, ``+`` upload, ``^`` received, ``#`` turned away, ``!`` interrupted. Most are ``-v[]+^``.

Not here: rules of the owner, training, files, connections (``foedus/net``); the server's side (``round.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from foedus.errors import Code
from foedus.protocol.messages import (
    Accepted,
    Answer,
    Ask,
    CheckIn,
    Closed,
    Decline,
    Finished,
    Later,
    Place,
    Problem,
    Received,
    Refused,
    Request,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Window,
)

FIRST_S, LONGEST_S = 1.0, 300.0  # waiting after the first failure in a row, and at most


class Phase(StrEnum):
    """What the client is at."""

    RESTING = "resting"
    ASKING = "asking"
    CHECKING_IN = "checking in"
    FETCHING = "fetching"
    TRAINING = "training"
    PLACING = "placing"  # asks for a place
    ENCODING = "encoding"  # encodes anew, since the place says that the update counts for less
    SENDING = "sending"
    SUBMITTING = "submitting"
    FINISHING = "finishing"  # fetches the final model
    OVER = "over"


class Held(NamedTuple):
    """Bytes that are held.

    Attributes:
        key: under which they are, or were last, to be sent.
        round: whose orders they answer.
        size, digest: of the bytes.
        scale: what the update was multiplied by before it was encoded.
        waits: nothing is to be sent at the moment; how they stand is asked.
    """

    key: bytes
    round: int
    size: int
    digest: bytes
    scale: float = 1.0
    waits: bool = False


@dataclass(frozen=True)
class State:
    """All that the machine knows. ``held`` is what must survive a restart: begin anew with ``State(hello, held)``.

    Attributes:
        hello: what is said at every check-in; keys are added.
        held: by key, in the order in which they came to be.
        phase: what the client is at.
        accepted: the seat it has; ``fresh``: its update is at hand and could be encoded anew.
        key: of the bytes that are being sent; ``place``: where to.
        failures: in a row.
        finished: runs whose final model it has.
        shape: of the session so far.
    """

    hello: CheckIn
    held: Mapping[bytes, Held] = field(default_factory=dict)
    phase: Phase = Phase.RESTING
    accepted: Accepted | None = None
    fresh: bool = False
    key: bytes = b""
    place: Place | None = None
    failures: int = 0
    finished: frozenset[str] = frozenset()
    shape: str = ""


# --- events ---------------------------------------------------------------------------------------------------
# ``draw`` is a number from 0 to 1 that the client drew for itself.


class Woke(NamedTuple):
    """It is time, or the doorbell rang."""

    now: float
    draw: float = 0.0


class Heard(NamedTuple):
    """The server's answer to what was said last."""

    now: float
    answer: Answer
    draw: float = 0.0


class Lost(NamedTuple):
    """No answer came; nobody knows whether the server heard it. Also: a blob could not be fetched."""

    now: float
    draw: float = 0.0


class Fetched(NamedTuple):
    """Orders and code are there, signatures are good, and the owner agrees."""

    now: float


class Made(NamedTuple):
    """Training, or encoding anew, gave these bytes."""

    now: float
    size: int
    digest: bytes


class Masked(NamedTuple):
    """What it adds to a masked sum is about to leave: from now on it may count, whatever is heard of it."""


class Conferred(NamedTuple):
    """Its part in a masked sum is over: whether it counts is told later. Nothing is held that could be sent again."""

    now: float
    later: Window
    draw: float = 0.0


class GaveUp(NamedTuple):
    """The client will send nothing: its owner's rules say no, or training failed. See ``Decline.reason``."""

    now: float
    reason: str


class Went(NamedTuple):
    """A piece has arrived; ``offset`` is where to go on."""

    now: float
    offset: int


Event = Woke | Heard | Lost | Fetched | Made | Masked | Conferred | GaveUp | Went


# --- actions --------------------------------------------------------------------------------------------------


class Say(NamedTuple):
    """Say this to the server; then comes Heard or Lost."""

    request: Request


class Fetch(NamedTuple):
    """Fetch what is not there yet, verify it, ask the owner's rules; then comes Fetched, GaveUp or Lost."""

    accepted: Accepted


class Train(NamedTuple):
    """Train or evaluate, and encode with scale 1; then comes Made or GaveUp. Where sums are masked: train, and take
    part in the conversation; then comes Masked, if it gets so far, and Conferred, GaveUp or Lost."""

    accepted: Accepted


class Encode(NamedTuple):
    """Encode the same update anew, multiplied by a factor first; then comes Made."""

    scale: float


class Keep(NamedTuple):
    """Write these bytes, and what is known of them, to the disk."""

    held: Held


class Rename(NamedTuple):
    """The bytes of ``old`` are those of ``held`` from now on."""

    old: bytes
    held: Held


class Settle(NamedTuple):
    """The bytes are of no more use: delete them. ``counted``: what the client keeps for its next visit now holds."""

    key: bytes
    counted: bool


class Piece(NamedTuple):
    """Send these bytes of the upload; then comes Went, Heard (a problem) or Lost."""

    key: bytes
    upload: bytes
    offset: int
    length: int


class Rest(NamedTuple):
    """Do nothing until then, unless the doorbell rings; then comes Woke."""

    until: float


class Publish(NamedTuple):
    """Fetch and verify the final model, make a personal one if asked; then comes Fetched, GaveUp or Lost."""

    finished: Finished


class Log(NamedTuple):
    """A session has ended; its shape."""

    shape: str


Action = Say | Fetch | Train | Encode | Keep | Rename | Settle | Piece | Rest | Publish | Log
Stepped = tuple[State, tuple[Action, ...]]
Move = Callable[[State, Any], Stepped]


def step(state: State, event: Event) -> Stepped:
    """What an event makes of a state, and what is to be done.

    Example:
        >>> state, (say,) = step(State(CheckIn(run="study")), Woke(0.0))
        >>> say.request.run, state.phase.value
        ('study', 'checking in')
        >>> state, actions = step(state, Heard(1.0, Later(after_s=10.0, until_s=20.0), draw=0.5))
        >>> actions
        (Log(shape='-#'), Rest(until=16.0))
    """
    row = _ROWS.get((state.phase, type(event)))
    if row is None:
        return state, ()
    after, actions = row.move(state, event)
    assert after.phase in row.to, f"{state.phase} --{type(event).__name__}--> {after.phase} is not in the table"
    return after, actions


# --- moves ----------------------------------------------------------------------------------------------------


def _woke(state: State, event: Woke) -> Stepped:
    """Bytes that wait to be sent go first, then standings, then the check-in."""
    ready = next((held for held in state.held.values() if not held.waits), None)
    if ready is not None:
        return _placing(state, ready)
    return _asking(state) if state.held else _checking_in(state)


def _asking(state: State) -> Stepped:
    return replace(state, phase=Phase.ASKING), (Say(Ask(keys=tuple(state.held)[:1000])),)


def _checking_in(state: State) -> Stepped:
    hello = replace(state.hello, pending=tuple(state.held)[:1000])
    return replace(state, phase=Phase.CHECKING_IN, shape="-", accepted=None, fresh=False), (Say(hello),)


def _placing(state: State, held: Held) -> Stepped:
    after = replace(state, phase=Phase.PLACING, key=held.key, place=None)
    return after, (Say(StartUpload(key=held.key, size=held.size, digest=held.digest, version=held.round)),)


def _asked(state: State, event: Heard) -> Stepped:
    """How bytes stand."""
    if not isinstance(event.answer, Standings):
        return _troubled(state, event)
    held = dict(state.held)
    actions: list[Action] = []
    for entry in event.answer.entries:
        own = held.get(entry.key)
        if own is None or entry.state is Stands.PENDING:
            continue
        if entry.state is Stands.AGAIN and own.size:
            held[entry.key] = own._replace(waits=False)
            actions.append(Keep(held[entry.key]))
        else:
            del held[entry.key]
            actions.append(Settle(entry.key, entry.state is Stands.COUNTED))
    after = replace(state, held=held, failures=0)
    ready = next((h for h in held.values() if not h.waits), None)
    after, more = _checking_in(after) if ready is None else _placing(after, ready)
    return after, (*actions, *more)


def _checked_in(state: State, event: Heard) -> Stepped:
    answer = event.answer
    if isinstance(answer, Accepted):
        return _accepted(replace(state, failures=0), answer)
    if isinstance(answer, Later):
        window = Window(after_s=answer.after_s, until_s=answer.until_s)
        return _resting(state, event, window, "#")
    if isinstance(answer, Finished):
        return _finishing(replace(state, failures=0), answer, event)
    return _troubled(state, event)


def _accepted(state: State, answer: Accepted) -> Stepped:
    """Train, or send what is held already for the same orders."""
    known = state.held.get(answer.key)
    if known is not None and not known.size:  # it may be in the sum, and what would take its masks off is forgotten
        after = replace(state, phase=Phase.CHECKING_IN, shape=state.shape + "!")
        return after, (Say(Decline(key=answer.key, reason="interrupted")),)
    held = state.held.get(answer.held) if answer.held is not None else None
    if held is None or not held.size:  # of a masked sum there is nothing that could be sent again
        return replace(state, phase=Phase.FETCHING, accepted=answer), (Fetch(answer),)
    renamed = held._replace(key=answer.key, waits=False)
    others = {k: h for k, h in state.held.items() if k != held.key}
    after, actions = _placing(replace(state, held={**others, renamed.key: renamed}), renamed)
    return after, (Rename(held.key, renamed), *actions)


def _finishing(state: State, answer: Finished, event: Heard) -> Stepped:
    """The run is over: have its model, once."""
    if answer.model is None or answer.run in state.finished:
        return _finished(state, answer.run, event.now, event.draw)
    name = replace(state, phase=Phase.FINISHING, hello=state.hello, finished=state.finished | {answer.run})
    return name, (Publish(answer),)


def _finished(state: State, run: str, now: float, draw: float) -> Stepped:
    """A client of one run is done; another looks for the next one now and then."""
    shape = state.shape + "^"
    after = replace(state, finished=state.finished | {run}, shape="")
    if state.hello.run and not state.held:
        return replace(after, phase=Phase.OVER), (Log(shape),)
    return replace(after, phase=Phase.RESTING), (Log(shape), Rest(now + LONGEST_S * (0.5 + draw / 2)))


def _published(state: State, event: Fetched | GaveUp) -> Stepped:
    """Whoever still holds bytes asks at once how they stand: the server may soon be gone."""
    if state.held:
        return _asking(state)
    return _finished(state, state.hello.run, event.now, 0.5)


def _unpublished(state: State, event: Lost) -> Stepped:
    """The model could not be fetched: it is asked for again."""
    return _backed_off(replace(state, finished=frozenset()), event.now, event.draw, 0.0)


def _fetched(state: State, event: Fetched) -> Stepped:
    assert state.accepted is not None
    return replace(state, phase=Phase.TRAINING, shape=state.shape + "v["), (Train(state.accepted),)


def _gave_up(state: State, event: GaveUp) -> Stepped:
    """Say so: the seat is free for another."""
    assert state.accepted is not None
    after = replace(state, phase=Phase.CHECKING_IN, shape=state.shape + "!")
    return after, (Say(Decline(key=state.accepted.key, reason=event.reason)),)


def _made(state: State, event: Made) -> Stepped:
    assert state.accepted is not None
    held = Held(state.accepted.key, state.accepted.round, event.size, event.digest)
    after = replace(state, held={**state.held, held.key: held}, fresh=True, shape=state.shape + "]")
    after, actions = _placing(after, held)
    return after, (Keep(held), *actions)


def _masked(state: State, event: Masked) -> Stepped:
    """What is held has no bytes: it stands for what the client keeps if it counts."""
    assert state.accepted is not None
    held = Held(state.accepted.key, state.accepted.round, 0, bytes(32), waits=True)
    return replace(state, held={**state.held, held.key: held}), (Keep(held),)


def _conferred(state: State, event: Conferred) -> Stepped:
    until = event.now + event.later.after_s + event.draw * max(0.0, event.later.until_s - event.later.after_s)
    after = replace(state, phase=Phase.RESTING, accepted=None, failures=0, shape="")
    return after, (Log(state.shape + "]+^"), Rest(until))


def _encoded(state: State, event: Made) -> Stepped:
    assert state.place is not None
    held = state.held[state.key]._replace(size=event.size, digest=event.digest, scale=state.place.scale)
    after, actions = _placing(replace(state, held={**state.held, held.key: held}), held)
    return after, (Keep(held), *actions)


def _not_encoded(state: State, event: GaveUp) -> Stepped:
    return _dropped(state, event.reason)


def _placed(state: State, event: Heard) -> Stepped:
    if isinstance(event.answer, Closed):
        return _waiting(state, event, event.answer.later, "#")
    if not isinstance(event.answer, Place):
        return _troubled(state, event)
    held, place = state.held[state.key], event.answer
    after = replace(state, place=place)  # a place that takes nothing is a failure, however often it is given
    if place.scale != held.scale:
        if state.fresh and state.accepted is not None and state.accepted.key == held.key:
            return replace(after, phase=Phase.ENCODING), (Encode(place.scale),)
        # The update is gone, its bytes count for something else than the server takes them for: they must not be sent.
        return _dropped(after, "interrupted")
    if held.size > place.most:
        return _dropped(after, "too large")
    return _sending(replace(after, shape=after.shape + "+"), place.offset)


def _sending(state: State, offset: int) -> Stepped:
    """The next piece, or that all is there."""
    held, place = state.held[state.key], state.place
    assert place is not None
    if offset < held.size:
        length = min(place.chunk, held.size - offset)
        return replace(state, phase=Phase.SENDING), (Piece(held.key, place.upload, offset, length),)
    submit = Submit(key=held.key, upload=place.upload, size=held.size, digest=held.digest)
    return replace(state, phase=Phase.SUBMITTING), (Say(submit),)


def _went(state: State, event: Went) -> Stepped:
    return _sending(replace(state, failures=0), event.offset)


def _submitted(state: State, event: Heard) -> Stepped:
    answer = event.answer
    if isinstance(answer, Received | Closed):
        return _waiting(state, event, answer.later, "^" if isinstance(answer, Received) else "#")
    if isinstance(answer, Refused):
        after, settle = _settled(state, state.key)
        after, actions = _resting(after, event, answer.later, "#")
        return after, (*settle, *actions)
    return _troubled(state, event)


def _waiting(state: State, event: Heard, later: Window, sign: str) -> Stepped:
    """Keep the bytes; ask later how they stand."""
    held = state.held[state.key]._replace(waits=True)
    after, actions = _resting(replace(state, held={**state.held, held.key: held}), event, later, sign)
    return after, (Keep(held), *actions)


def _settled(state: State, key: bytes) -> Stepped:
    """Bytes that will never count."""
    return replace(state, held={k: h for k, h in state.held.items() if k != key}), (Settle(key, False),)


def _dropped(state: State, reason: str) -> Stepped:
    """Give a seat back whose bytes cannot be sent."""
    key = state.key
    after, settle = _settled(state, key)
    after = replace(after, phase=Phase.CHECKING_IN, shape=state.shape + "!")
    return after, (*settle, Say(Decline(key=key, reason=reason)))


def _resting(state: State, event: Heard, later: Window, sign: str) -> Stepped:
    """The session is over; the client draws its own moment for the next."""
    until = event.now + later.after_s + event.draw * max(0.0, later.until_s - later.after_s)
    after = replace(state, phase=Phase.RESTING, accepted=None, fresh=False, place=None, failures=0, shape="")
    return after, (Log(state.shape + sign), Rest(until))


def _lost(state: State, event: Lost) -> Stepped:
    """Nobody knows what the server heard: everything that was said may be said again."""
    return _backed_off(state, event.now, event.draw, 0.0)


def _backed_off(state: State, now: float, draw: float, least: float) -> Stepped:
    wait = max(least, min(LONGEST_S, FIRST_S * 2.0 ** min(state.failures, 20)) * (0.5 + draw / 2))
    log = (Log(state.shape + "!"),) if state.shape else ()
    after = replace(state, phase=Phase.RESTING, place=None, failures=state.failures + 1, shape="")
    return after, (*log, Rest(now + wait))


def _troubled(state: State, event: Heard) -> Stepped:
    """A problem, or an answer that makes no sense here."""
    answer = event.answer
    if not isinstance(answer, Problem):
        return _backed_off(state, event.now, event.draw, LONGEST_S / 2)
    sending = state.phase in (Phase.PLACING, Phase.SENDING, Phase.SUBMITTING)
    if (
        sending
        and answer.code is Code.WRONG_OFFSET
        and answer.offset <= state.held[state.key].size
        and not answer.fatal
    ):
        if state.place is not None and state.failures < 5:
            return _sending(replace(state, failures=state.failures + 1), answer.offset)
    elif sending and answer.code is Code.UNKNOWN_UPLOAD and state.failures < 5:
        return _placing(replace(state, failures=state.failures + 1), state.held[state.key])
    elif sending and (answer.fatal or answer.code is Code.UNKNOWN_KEY):
        after, settle = _settled(state, state.key)
        after, actions = _backed_off(after, event.now, event.draw, answer.after_s)
        return after, (*settle, *actions)
    return _backed_off(state, event.now, event.draw, max(answer.after_s, LONGEST_S / 2 if answer.fatal else 0.0))


# --- the table ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """In a phase, an event leads to one of these phases; what is not listed changes nothing."""

    phase: Phase
    event: type[Event]
    to: tuple[Phase, ...]
    move: Move


_R, _K, _C, _F, _T, _P, _E, _S, _U, _H, _O = Phase

TABLE: tuple[Row, ...] = (
    Row(_R, Woke,    (_P, _K, _C),         _woke),
    Row(_K, Heard,   (_C, _P, _R),         _asked),
    Row(_K, Lost,    (_R,),                _lost),
    Row(_C, Heard,   (_F, _P, _R, _H, _O, _C), _checked_in),
    Row(_C, Lost,    (_R,),                _lost),
    Row(_F, Fetched, (_T,),                _fetched),
    Row(_F, GaveUp,  (_C,),                _gave_up),
    Row(_F, Lost,    (_R,),                _lost),
    Row(_T, Made,    (_P,),                _made),
    Row(_T, Masked,  (_T,),                _masked),
    Row(_T, Conferred, (_R,),              _conferred),
    Row(_T, Lost,    (_R,),                _lost),
    Row(_T, GaveUp,  (_C,),                _gave_up),
    Row(_P, Heard,   (_S, _U, _E, _R, _C, _P), _placed),
    Row(_P, Lost,    (_R,),                _lost),
    Row(_E, Made,    (_P,),                _encoded),
    Row(_E, GaveUp,  (_C,),                _not_encoded),
    Row(_S, Went,    (_S, _U),             _went),
    Row(_S, Heard,   (_S, _U, _P, _R),     _troubled),
    Row(_S, Lost,    (_R,),                _lost),
    Row(_U, Heard,   (_R, _S, _U, _P),     _submitted),
    Row(_U, Lost,    (_R,),                _lost),
    Row(_H, Fetched, (_O, _R, _K),         _published),
    Row(_H, GaveUp,  (_O, _R, _K),         _published),
    Row(_H, Lost,    (_R,),                _unpublished),
)  # fmt: skip

_ROWS = {(row.phase, row.event): row for row in TABLE}
