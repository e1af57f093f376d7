"""What clients and servers say to each other: one frozen value per message.

A *device session*: :class:`CheckIn` is answered by :class:`Accepted`, :class:`Later` or :class:`Finished`. A client
that was accepted fetches bundle and orders, trains, and asks for a place (:class:`StartUpload` → :class:`Place`), sends
its bytes there, and ends with :class:`Submit` → :class:`Received`. What was received is counted once the round is
committed; :class:`Ask` → :class:`Standings` says how it stands. Any request may be answered by :class:`Problem`.

No message says who sends it: the transport has authenticated the caller. Bounds stand in the types (:class:`Within`,
:class:`Long`) and hold for whoever writes and whoever reads. After C. 5 of Bonawitz et al. (2019), "Towards federated
learning at scale".

Not here: bytes (``wire.py``, ``blob.py``), what is answered when (``round.py``, ``session.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, NamedTuple

from foedus.errors import Code, NotNow, ProtocolError


class Within(NamedTuple):
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float


class Long(NamedTuple):
    """From ``low`` to ``high`` characters (bytes, entries)."""

    low: int
    high: int


SECURE = "secure-aggregation"  # a protection: updates are seen in masked sums only
ENCRYPTED = "encrypted-sums"  # a protection: updates are encrypted under a key that clients share
WHOLE = 2**53  # whole numbers up to here survive any reader, JavaScript's too

Name = Annotated[str, Long(0, 128)]  # of a run, an algorithm's protection, a package
Told = Annotated[str, Long(0, 1000)]  # a sentence for a person to read
Target = Annotated[str, Long(0, 256)]  # "module:object"
Key = Annotated[bytes, Long(16, 16)]  # a client's key for one attempt of a round; its upload
Digest = Annotated[bytes, Long(32, 32)]  # SHA-256
Signature = Annotated[bytes, Long(0, 128)]
Count = Annotated[int, Within(0, WHOLE)]
Size = Annotated[int, Within(0, 2**40)]  # bytes
Seconds = Annotated[float, Within(0, 10**9)]
Seed = Annotated[int, Within(-(2**63), 2**64 - 1)]
Factor = Annotated[float, Within(0, 1)]
Names = Annotated[tuple[Name, ...], Long(0, 64)]
Versions = Annotated[Mapping[Name, Name], Long(0, 64)]
Keys = Annotated[tuple[Key, ...], Long(0, 1000)]


class Kind(StrEnum):
    """What a client is asked to do."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    DECRYPT = "decrypt"  # the sum of a round's encrypted updates, of which its own is one


class Why(StrEnum):
    """Why an upload is no longer wanted. None of them is the client's fault."""

    GOAL_REACHED = "goal-reached"
    LATE = "late"
    ATTEMPT_OVER = "attempt-over"
    RUN_OVER = "run-over"


class Stands(StrEnum):
    """How an upload stands.

    ``PENDING``: keep the bytes. ``COUNTED``: it is in a committed round; delete them. ``AGAIN``: send the same bytes
    once more. ``DISCARDED``: it will never count; delete them.
    """

    PENDING = "pending"
    COUNTED = "counted"
    AGAIN = "again"
    DISCARDED = "discarded"


class Event(StrEnum):
    """What the doorbell rings for."""

    OFFER = "offer"
    CANCELLED = "cancelled"
    COMMITTED = "committed"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Bytes that are fetched by themselves. Whoever fetches them MUST check size and digest before reading them.

    Attributes:
        digest: SHA-256 of the bytes.
        size: how many they are.
    """

    digest: Digest
    size: Size


@dataclass(frozen=True, kw_only=True)
class Window:
    """When to come back: seconds from the moment that this arrives.

    A client SHOULD draw its own moment, evenly, between both, and MUST NOT come earlier than ``after_s`` unless the
    doorbell rings.
    """

    after_s: Seconds
    until_s: Seconds


@dataclass(frozen=True, kw_only=True)
class CheckIn:
    """Client → server: here I am. Answered by Accepted, Later or Finished.

    Attributes:
        run: the run it wants to take part in; empty for any that is offered to it.
        kinds: what it is ready to do; at least one.
        examples: how many examples it has; ``None``: some, it does not say how many, since a run may have to hide
            that; 0: nothing to train on.
        software: versions by package, e.g. ``{"foedus": "0.1.0", "torch": "2.13.0"}``.
        protections: what its owner demands, e.g. ``"secure-aggregation"``; the server MUST NOT accept it for less.
        pending: keys of which it still holds bytes. The server MUST say of none of them that they are unknown only
            because they are old: how they stand comes by Ask.
    """

    run: Name = ""
    kinds: Annotated[tuple[Kind, ...], Long(1, 3)] = (Kind.TRAIN,)
    examples: Count | None = None
    software: Versions = field(default_factory=dict)
    protections: Names = ()
    pending: Keys = ()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Server → client: take part. The client MUST check ``signature`` before it reads anything that blobs hold.

    Attributes:
        run, round, attempt: round and attempt are counted from 1.
        kind: what it is asked to do.
        key: this client's for this attempt; whoever else has it can do nothing with it.
        orders: the round's weights and what goes with them, the same for all clients.
        bundle: the signed source bundle; ``None`` if the client needs none (a portable plan, or code of its own).
        target: what to read in the bundle, ``"module:object"``.
        position: this client's, from 0, fixed for ever; all counted randomness uses it.
        seed: the run's, known to all.
        limit: at most so many local steps; 0 for all that the algorithm asks.
        closes_s: seconds until uploads are no longer taken.
        minimum: fewer contributors than this are never summed up and shown.
        protections: what the server promises, e.g. ``"secure-aggregation"``, ``"privacy-budget"``.
        held: a key of which the client said that it still holds bytes, for the same orders: it MUST send those bytes
            under the new key and MUST NOT train anew.
        plan: a portable plan (an ONNX graph that trains), instead of a bundle.
        signature: the server's, over run, round and the digests of orders, bundle and plan (docs/protocol.md).
    """

    run: Name
    round: Count
    attempt: Count
    kind: Kind
    key: Key
    orders: Blob
    bundle: Blob | None = None
    target: Target = ""
    position: Count
    seed: Seed
    limit: Count = 0
    closes_s: Seconds
    minimum: Count = 1
    protections: Names = ()
    held: Key | None = None
    plan: Blob | None = None
    signature: Signature = b""


@dataclass(frozen=True, kw_only=True)
class Later:
    """Server → client: not now; come back between ``after_s`` and ``until_s`` (see :class:`Window`)."""

    after_s: Seconds
    until_s: Seconds
    reason: Told = ""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Server → client: the run is over, and this is its model.

    Attributes:
        run: which one.
        model: the final weights, as orders are; ``None`` if the run ended without one.
        personal: whether the client SHOULD make its own model of it at once (``Method.personal``).
        rounds: how many rounds were committed.
        bundle, target, seed, position: as in Accepted, for a client that makes its own model.
        signature: the server's, over run, rounds and the digests of model and bundle.
    """

    run: Name
    model: Blob | None
    personal: bool = False
    rounds: Count = 0
    bundle: Blob | None = None
    target: Target = ""
    seed: Seed = 0
    position: Count = 0
    signature: Signature = b""


REASONS = (
    "rules",  # the owner's say no
    "approval",  # the owner has not approved the task, or has denied it
    "data",  # there is no example
    "training",  # it failed
    "spent",  # its budget for single examples, for good
    "secure-aggregation",  # masks or encryption: something was not as it must be
    "signature",  # the orders, or the source, are not what the server signed
    "interrupted",  # it was restarted in the middle, and what it would have sent is gone
    "too large",  # for what the server takes at a time
)


@dataclass(frozen=True, kw_only=True)
class Decline:
    """Client → server: I was accepted, and will send nothing. Answered by Later. The seat is free at once.

    Attributes:
        key: from Accepted.
        reason: one of ``REASONS``; a server takes any other for a word that it does not know. Never anything about the
            data itself.
    """

    key: Key
    reason: Name = ""


@dataclass(frozen=True, kw_only=True)
class StartUpload:
    """Client → server: I have something to send. Answered by Place or Closed.

    The same request again MUST be given the same place, with the offset up to which bytes have come. In buffered runs
    a client asks before it encodes (``size`` 0, no digest), since the place says how much its update counts.

    Attributes:
        key: from Accepted.
        size: of the whole upload; 0 if it is not encoded yet.
        digest: SHA-256 of the whole upload; ``None`` if it is not encoded yet.
        version: the round whose orders it trained from.
    """

    key: Key
    size: Size = 0
    digest: Digest | None = None
    version: Count = 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Server → client: send your bytes here. Bytes go to (upload, offset), in order, in pieces of at most ``chunk``.

    Attributes:
        upload: the place's name.
        offset: send from here on; the bytes before it have arrived.
        scale: multiply the update by it before encoding; less than 1 for stale ones in buffered runs.
        chunk: most bytes in one piece; at least 1.
        most: most bytes in all.
    """

    upload: Key
    offset: Size = 0
    scale: Factor = 1.0
    chunk: Annotated[int, Within(1, 2**40)] = 2**22
    most: Size = 2**40


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Client → server: all bytes are there. Answered by Received, Refused or Closed; the same answer if asked again.

    Attributes:
        key: from Accepted.
        upload: from Place.
        size, digest: of the whole upload; the server MUST compare both with what came.
    """

    key: Key
    upload: Key
    size: Size
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class Received:
    """Server → client: your update is in the sum of this attempt.

    That is *not* counted: the client MUST keep its bytes until it is told ``COUNTED`` or ``DISCARDED``.
    """

    later: Window


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Server → client: your update was looked at and left out; it changed nothing. Delete the bytes.

    Attributes:
        code: why.
        told: why, for a person to read.
        later: when to come back.
    """

    code: Code
    told: Told
    later: Window


@dataclass(frozen=True, kw_only=True)
class Closed:
    """Server → client: this upload is no longer wanted; not an error. How the bytes stand is told by Ask."""

    why: Why
    later: Window


@dataclass(frozen=True, kw_only=True)
class Confer:
    """Client → server, where sums are masked: my part of the conversation (``secagg``) so far. Answered by Turn, by
    Later (others are awaited; the same Confer again), by Received (nothing more is wanted) or Closed.

    Attributes:
        key: from Accepted.
        turn: the last of the server's turns that it has, from 1; 0 before the first.
        upload, size, digest: where its answer to that turn was sent to; ``None`` and 0 if there is none (yet). The
            same answer MAY be told of again, and is taken once.
    """

    key: Key
    turn: Count = 0
    upload: Key | None = None
    size: Size = 0
    digest: Digest | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Server → client: its next turn in the conversation. It is for this client alone.

    Attributes:
        turn: counted from 1, which names the terms and the client's slot.
        body: what is said.
        closes_s: seconds until those who have not answered are taken for lost.
    """

    turn: Count
    body: Blob
    closes_s: Seconds


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Client → server: how do these stand? Answered by Standings."""

    keys: Keys


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How one upload stands. A key that the server does not know (any more) is ``DISCARDED``."""

    key: Key
    state: Stands


@dataclass(frozen=True, kw_only=True)
class Standings:
    """Server → client: one entry for every key that was asked for, in the same order."""

    entries: Annotated[tuple[Standing, ...], Long(0, 1000)]
    later: Window


@dataclass(frozen=True, kw_only=True)
class Bell:
    """Server → client, over the doorbell: something happened, come and see. It may be lost, and says nothing that has
    to be known: a client that hears it MAY check in at once, and MUST believe only the answer.

    Attributes:
        run, round: what it is about.
        event: what happened.
        progress: how much of the round has come in, from 0 to 1.
    """

    run: Name
    event: Event
    round: Count = 0
    progress: Factor = 0.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Either → either: this request cannot be served; nothing of it was done.

    Attributes:
        code: which of the listed reasons; metrics count by it.
        told: what happened, and what to do instead; for a person to read.
        fatal: the same request will never be served. If not, the client SHOULD ask again after ``after_s``.
        after_s: seconds to wait before asking again.
        offset: with ``WRONG_OFFSET``, where to go on.
    """

    code: Code
    told: Told = ""
    fatal: bool = False
    after_s: Seconds = 0.0
    offset: Size = 0


Request = CheckIn | Decline | StartUpload | Submit | Confer | Ask
Answer = Accepted | Later | Finished | Place | Received | Refused | Closed | Turn | Standings | Problem
Message = Request | Answer | Bell

KINDS: dict[str, type[Message]] = {
    "check-in": CheckIn,
    "accepted": Accepted,
    "later": Later,
    "finished": Finished,
    "decline": Decline,
    "start-upload": StartUpload,
    "place": Place,
    "submit": Submit,
    "received": Received,
    "refused": Refused,
    "closed": Closed,
    "confer": Confer,
    "turn": Turn,
    "ask": Ask,
    "standings": Standings,
    "bell": Bell,
    "problem": Problem,
}

# What may answer what; a Problem may answer anything.
ANSWERS: dict[type[Message], tuple[type[Message], ...]] = {
    CheckIn: (Accepted, Later, Finished),
    Decline: (Later,),
    StartUpload: (Place, Closed),
    Submit: (Received, Refused, Closed),
    Confer: (Turn, Later, Received, Closed),
    Ask: (Standings,),
}


def sentence(text: str) -> str:
    """A text as messages carry it: one line, printable, and not too long.

    Example:
        >>> sentence("the first line\\nand the second")
        'the first line and the second'
    """
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= 1000 else clean[:999] + "…"


def problem(error: ProtocolError, *, offset: int = 0) -> Problem:
    """What is answered where a request failed with an error."""
    after_s = error.after_s if isinstance(error, NotNow) else 0.0
    return Problem(code=error.code, told=sentence(str(error)), fatal=error.fatal, after_s=after_s, offset=offset)


def raised(answer: Problem) -> ProtocolError:
    """The error that a client raises on a problem, of the code's own class.

    Example:
        >>> raise raised(Problem(code=Code.RATE, told="ask once a minute"))
        Traceback (most recent call last):
        foedus.errors.TooFast: ask once a minute
    """
    error = ProtocolError.of(answer.code, answer.told, fatal=answer.fatal)
    if isinstance(error, NotNow) and answer.after_s:
        error.after_s = answer.after_s
    return error
