"""A client's part of one masked sum, as a pure state machine.

    begin(terms, own) ──► KEYED        → Remember, Send(Keys)
    KEYED      Roster     ──► SHARED   → Send(Parcels)
    SHARED     Numbers    ──► SHARED                          the update is ready; before or after the delivery
    SHARED     Delivery   ──► MASKED   → Send(Masked)         once it has both
    MASKED     Survivors  ──► DONE     → Remember, Send(Shares)
    MASKED     Survivors  ──► VOTED    → Send(Vote)           where the server may lie
    VOTED      Votes      ──► DONE     → Remember, Send(Shares)
    any        Abandoned  ──► FAILED                          the server gave the attempt up
    any        anything that is not as it must be ──► FAILED

``FAILED`` and ``DONE`` are ends: whatever comes then changes nothing and is answered with nothing, so that no second
request ever gets a share. A message that comes twice is answered with the same bytes. ``Remember`` has to be carried
out, durably, *before* the message after it is sent: it is what keeps a client that has answered an unmask request out
of every other attempt of that round, also after a crash.

All secrets of an attempt are derived from 32 bytes of the operating system's randomness (``Own.entropy``) and the
terms: the machine itself draws nothing, and no two attempts share a key even if the bytes were the same.

Not here: the server (``server.py``), transports.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.keystream import keystream
from foedus.errors import FoedusError, ForgedMessage, NotEnoughShares, SecureAggregationFailed
from foedus.protocol.secagg.messages import (
    SEALED,
    Bytes,
    Delivery,
    Flags,
    FromServer,
    Identity,
    Keys,
    Masked,
    Parcels,
    Promise,
    Roster,
    Shares,
    Slots,
    Survivors,
    Terms,
    Vote,
    Votes,
    about,
    bits,
    check_array,
    check_identity,
    check_numbers,
    check_terms,
    commitment,
    flags,
    keys_text,
    mask_context,
    survivors_text,
)
from foedus.secure import sharing
from foedus.secure.planes import packed
from foedus.secure.primitives import (
    KEY,
    SIGNATURE,
    Agreement,
    add_mask,
    check_signature,
    derived,
    digest,
    opened,
    public_key,
    sealed,
    signed,
)


class Stage(Enum):
    """Where a client is."""

    KEYED = "its keys are sent"
    SHARED = "its shares are sent"
    MASKED = "its numbers are sent"
    VOTED = "its vote is sent"
    DONE = "it has answered"
    FAILED = "it has left"


class Memory(NamedTuple):
    """What a client keeps of a session, on its disk: the last attempt that it joined, and whether it has answered an
    unmask request in it."""

    session: bytes
    round: int
    attempt: int
    answered: bool = False


class Own(NamedTuple):
    """What a client brings to an attempt.

    Attributes:
        slot: its number in this attempt.
        promise: what its owner approved.
        entropy: 32 bytes of the operating system's randomness, for this attempt only.
        memory: of this session; ``None`` if there is none.
        identity: needed where the server may lie.
        model: SHA-256 of the model that it really received and trains from.
    """

    slot: int
    promise: Promise
    entropy: bytes
    model: bytes
    memory: Memory | None = None
    identity: Identity | None = None

    def __repr__(self) -> str:
        return f"Own(slot={self.slot}, entropy=<secret>, memory={self.memory})"


# --- events and actions -------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What the client adds up is ready, as the aggregators encoded it: of every channel unsigned integers [entry]."""

    values: tuple[NDArray[Any], ...]

    def __repr__(self) -> str:
        return f"Numbers({', '.join(f'{v.dtype}{list(v.shape)}' for v in self.values)})"


class Abandoned(NamedTuple):
    """The server has given this attempt up."""

    reason: str = ""


Event = FromServer | Numbers | Abandoned


class Send(NamedTuple):
    """Send a message to the server; again, the same bytes, until it has arrived."""

    message: Keys | Parcels | Masked | Vote | Shares


class Remember(NamedTuple):
    """Write this to the disk before anything that follows is sent."""

    memory: Memory


class Left(NamedTuple):
    """The client has left the attempt, and why."""

    reason: str


Action = Send | Remember | Left


# --- state --------------------------------------------------------------------------------------------------


class _Secrets(NamedTuple):
    """What nobody else may see."""

    mask: bytes
    share: bytes
    seed: bytes
    polynomials: bytes

    def __repr__(self) -> str:
        return "_Secrets(<secret>)"


class _Roster(NamedTuple):
    """What is known of the mates after the roster: which of them are there, the public keys uint8 [mate, 64] and
    identities uint8 [mate, 32], and what is agreed with each, by place among the mates."""

    present: Flags
    keys: Bytes
    identities: Bytes
    agreed: dict[int, bytes]

    def __repr__(self) -> str:
        return f"_Roster({int(self.present.sum())} mates)"


class _Held(NamedTuple):
    """Shares of the mates' secrets, its own among them: uint8 [mate, 2, 32] of mask key and seed; of whom it has them;
    who is in the masks."""

    shares: Bytes
    have: Flags
    delivered: Flags

    def __repr__(self) -> str:
        return f"_Held({int(self.have.sum())} of {len(self.have)})"


class Client(NamedTuple):
    """The state of a client. Only ``stage``, ``terms`` and ``unopened`` are anybody's business.

    Attributes:
        unopened: slots of mates whose sealed shares did not open; the client has nothing to answer about them.
    """

    stage: Stage
    terms: Terms
    own: Own
    mates: Slots
    secrets: _Secrets
    roster: _Roster | None = None
    numbers: tuple[NDArray[Any], ...] | None = None
    delivery: Delivery | None = None
    held: _Held | None = None
    survivors: Survivors | None = None
    last: tuple[bytes, tuple[Action, ...]] = (b"", ())
    unopened: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Client(slot={self.own.slot}, {self.stage.name}, round={self.terms.round}, attempt={self.terms.attempt})"
        )

    @property
    def place(self) -> int:
        """Where it stands among its mates."""
        return int(np.searchsorted(self.mates, self.own.slot))


Step = tuple[Client, tuple[Action, ...]]


def begin(terms: Terms, own: Own) -> Step:
    """Join an attempt.

    Raises:
        SecureAggregationFailed: the terms are not what was promised, the model is another, or the client has answered
            in another attempt of this round: it must not join.
        NoGuarantee: the server may lie, and there is no identity; or so few clients cannot withstand what was promised.
    """
    check_terms(terms, own.promise)
    check_identity(own.identity, terms)
    _check_own(terms, own)
    secrets = _drawn(terms, own)
    client = Client(Stage.KEYED, terms, own, terms.mates(own.slot), secrets)
    memory = Memory(terms.session, terms.round, terms.attempt)
    return client, (Remember(memory), Send(_keys(client)))


def step(client: Client, event: Event) -> Step:
    """What an event makes of a client, and what is to be done."""
    if client.stage in (Stage.DONE, Stage.FAILED):
        return client, _again(client, event)
    try:
        if repeated := _again(client, event):
            return client, repeated
        move = TABLE.get((client.stage, type(event)))
        if move is None:
            raise SecureAggregationFailed(f"{type(event).__name__} came while {client.stage.value}")
        client, actions = move(client, event)
    except FoedusError as error:
        return _left(client, str(error))
    return (client._replace(last=(_told(event), actions)) if actions else client), actions


def _left(client: Client, reason: str) -> Step:
    """The end without an answer: secrets are forgotten."""
    gone = client._replace(
        stage=Stage.FAILED, secrets=_NOTHING, roster=None, numbers=None, delivery=None, held=None, last=(b"", ())
    )
    return gone, (Left(reason),)


_NOTHING = _Secrets(b"", b"", b"", b"")


def _again(client: Client, event: Event) -> tuple[Action, ...]:
    """What the same message was answered with when it came before; nothing to any other."""
    before, actions = client.last
    return tuple(a for a in actions if isinstance(a, Send)) if before and before == _told(event) else ()


def _told(event: Event) -> bytes:
    """What tells a message of the server's from another."""
    if not isinstance(event, Roster | Delivery | Survivors | Votes):
        return b""
    fields = (f.tobytes() if isinstance(f, np.ndarray) else repr(f).encode() for f in event)
    return digest(type(event).__name__.encode(), *fields)


# --- beginning ----------------------------------------------------------------------------------------------


def _check_own(terms: Terms, own: Own) -> None:
    memory = own.memory
    if not 0 <= own.slot < terms.clients:
        raise SecureAggregationFailed(f"slot {own.slot} is none of {terms.clients}")
    if len(own.entropy) != KEY:
        raise SecureAggregationFailed("an attempt takes 32 bytes of fresh randomness")
    if terms.model != own.model:
        raise SecureAggregationFailed("the server's terms are about another model than this client was sent")
    if memory is None or memory.session != terms.session or memory.round < terms.round:
        return
    if memory.round > terms.round or memory.attempt >= terms.attempt:
        raise SecureAggregationFailed(
            f"attempt {terms.attempt} of round {terms.round} is over: this client has joined attempt "
            f"{memory.attempt} of "
            f"round {memory.round}"
        )
    if memory.answered:
        raise SecureAggregationFailed(
            f"this client has answered an unmask request in attempt {memory.attempt} of round {memory.round}, and "
            "joins no other attempt of it: two sums with different survivors would reveal their difference"
        )


def _drawn(terms: Terms, own: Own) -> _Secrets:
    """The secrets of the attempt."""
    root = derived(own.entropy, about(terms.binding, "entropy", own.slot, own.slot))
    return _Secrets(
        _secret(root, b"mask"), derived(root, b"share"), _secret(root, b"seed"), derived(root, b"polynomials")
    )


def _secret(root: bytes, purpose: bytes) -> bytes:
    """A secret whose words are elements of the field that it is shared over."""
    found = derived(root, purpose)
    while not sharing.shareable(found):  # once in half a billion times
        found = derived(found, purpose)
    return found


def _keys(client: Client) -> Keys:
    terms, own, secrets = client.terms, client.own, client.secrets
    mask, share = public_key(secrets.mask), public_key(secrets.share)
    committed = commitment(terms.binding, own.slot, secrets.seed)
    if own.identity is None or not terms.malicious:
        return Keys(mask, share, committed)
    signature = signed(own.identity.private, keys_text(terms.binding, own.slot, mask, share))
    return Keys(mask, share, committed, own.identity.public, own.identity.certificate, signature)


# --- keys to shares -----------------------------------------------------------------------------------------


def _share(client: Client, roster: Roster) -> Step:
    """Share the secrets among the mates that are there."""
    present = flags(roster.present, len(client.mates))
    if present[client.place]:
        raise ForgedMessage("the roster tells this client its own keys as another's")
    count = int(present.sum())
    if count + 1 < client.terms.threshold:
        raise NotEnoughShares(f"{count + 1} clients are there, and it takes {client.terms.threshold}")
    check_array(roster.keys, (count, 2 * KEY), "the roster's keys")
    identities = _identified(client, roster, present)
    known = _Roster(present, _spread(present, roster.keys), identities, {})
    _check_distinct(client, roster.keys)
    held = _dealt(client, present)
    parcels = np.empty((count, SEALED), np.uint8)
    agreement, binding, slot = Agreement(client.secrets.share), client.terms.binding, client.own.slot
    for row, place in enumerate(np.flatnonzero(present).tolist()):
        mate = int(client.mates[place])
        secret = known.agreed[place] = agreement.secret(known.keys[place, KEY:].tobytes())
        context = about(binding, "share", slot, mate)
        parcels[row] = np.frombuffer(sealed(derived(secret, context), held[place].tobytes(), context), np.uint8)
    shares = np.zeros((len(client.mates), 2, KEY), np.uint8)
    shares[client.place] = held[client.place]
    have = np.arange(len(client.mates)) == client.place
    client = client._replace(stage=Stage.SHARED, roster=known, held=_Held(shares, have, have.copy()))
    return client, (Send(Parcels(parcels)),)


def _spread(present: Flags, rows: Bytes) -> Bytes:
    """Rows of those present, at their places among the mates."""
    found = np.zeros((len(present), *rows.shape[1:]), np.uint8)
    found[present] = rows
    return found


def _check_distinct(client: Client, keys: Bytes) -> None:
    """Refuse a roster in which somebody has another's key, or this client's."""
    own = public_key(client.secrets.mask) + public_key(client.secrets.share)
    every = np.concatenate([keys.reshape(-1, KEY), np.frombuffer(own, np.uint8).reshape(-1, KEY)])
    if len(np.unique(every, axis=0)) < len(every):
        raise ForgedMessage("two keys of the roster are the same: every client has two of its own")


def _identified(client: Client, roster: Roster, present: Flags) -> Bytes:
    """The identities of the mates, uint8 [mate, 32], once all have signed their keys."""
    terms, own = client.terms, client.own
    none: Bytes = np.zeros((len(present), KEY), np.uint8)
    if not terms.malicious:
        check_array(roster.proofs, (len(roster.keys), 0), "the roster's proofs")
        return none
    assert own.identity is not None
    width = roster.proofs.shape[1] if isinstance(roster.proofs, np.ndarray) and roster.proofs.ndim == 2 else 0
    check_array(roster.proofs, (len(roster.keys), width), "the roster's proofs")
    if width not in (KEY + SIGNATURE, KEY + 2 * SIGNATURE):
        raise ForgedMessage("keys in the roster are not signed")
    seen = {own.identity.public}
    for slot, keys, proof in zip(client.mates[present].tolist(), roster.keys, roster.proofs, strict=True):
        who, signature = proof[:KEY].tobytes(), proof[KEY : KEY + SIGNATURE].tobytes()
        own.identity.trust.check(who, proof[KEY + SIGNATURE :].tobytes())
        check_signature(who, signature, keys_text(terms.binding, slot, keys[:KEY].tobytes(), keys[KEY:].tobytes()))
        if who in seen:
            raise ForgedMessage("one identity is in the roster twice")
        seen.add(who)
    return _spread(present, roster.proofs[:, :KEY])


def _dealt(client: Client, present: Flags) -> Bytes:
    """Shares of mask key and seed for every mate that is there, and for itself: uint8 [mate, 2, 32], zeros
    elsewhere.
    """
    there = present.copy()
    there[client.place] = True
    secrets = np.frombuffer(client.secrets.mask + client.secrets.seed, np.uint8).reshape(2, KEY)
    count = (client.terms.threshold - 1) * 2 * sharing.WORDS
    stream = keystream(client.secrets.polynomials, sharing.spare(count))
    points = client.mates[there] + 1
    dealt = sharing.shares(secrets, points, client.terms.threshold, sharing.coefficients(stream, count))
    return _spread(there, dealt)


# --- shares to numbers --------------------------------------------------------------------------------------


def _ready(client: Client, event: Numbers) -> Step:
    """The update is there; it is masked at once if the shares are, too."""
    check_numbers(event.values, client.terms)
    if client.numbers is not None:
        raise SecureAggregationFailed("the numbers of this attempt were given already")
    return _masked_when_ready(client._replace(numbers=event.values))


def _delivered(client: Client, delivery: Delivery) -> Step:
    """Open what the mates have sealed for this client."""
    roster, held = _known(client)
    if client.delivery is not None:
        raise SecureAggregationFailed("another delivery than the first came")
    present = flags(delivery.present, len(client.mates))
    if (present & ~roster.present).any():
        raise ForgedMessage("the delivery holds shares of clients that are not in the roster")
    count = int(present.sum())
    if count + 1 < client.terms.threshold:
        raise NotEnoughShares(f"{count + 1} clients have shared secrets, and it takes {client.terms.threshold}")
    check_array(delivery.sealed, (count, SEALED), "sealed shares")
    binding, slot, unopened = client.terms.binding, client.own.slot, list(client.unopened)
    held = _Held(held.shares.copy(), held.have.copy(), present | held.delivered)
    for row, place in enumerate(np.flatnonzero(present).tolist()):
        mate = int(client.mates[place])
        context = about(binding, "share", mate, slot)
        try:
            plain = opened(derived(roster.agreed[place], context), delivery.sealed[row].tobytes(), context)
        except ForgedMessage:
            unopened.append(mate)
            continue
        held.shares[place] = np.frombuffer(plain, np.uint8).reshape(2, KEY)
        held.have[place] = True
    return _masked_when_ready(client._replace(delivery=delivery, held=held, unopened=tuple(unopened)))


def _known(client: Client) -> tuple[_Roster, _Held]:
    assert client.roster is not None
    assert client.held is not None
    return client.roster, client.held


def _masked_when_ready(client: Client) -> Step:
    """Mask the numbers, once they and the delivery are there."""
    if client.numbers is None or client.delivery is None:
        return client, ()
    roster, held = _known(client)
    binding, slot = client.terms.binding, client.own.slot
    totals = [numbers.copy() for numbers in client.numbers]
    add_mask(totals, derived(client.secrets.seed, about(binding, "seed", slot, slot)))
    agreement = Agreement(client.secrets.mask)
    for place in np.flatnonzero(held.delivered).tolist():
        mate = int(client.mates[place])
        if mate == slot:
            continue
        secret = agreement.secret(roster.keys[place, :KEY].tobytes())
        add_mask(totals, derived(secret, mask_context(binding, slot, mate)), negative=mate < slot)
    client = client._replace(stage=Stage.MASKED, numbers=None, secrets=_NOTHING)
    widths = (channel.width for channel in client.terms.channels)
    parts = [packed(total, width) for total, width in zip(totals, widths, strict=True)]
    return client, (Send(Masked(np.concatenate(parts))),)


# --- unmasking ----------------------------------------------------------------------------------------------


def _asked(client: Client, survivors: Survivors) -> Step:
    """The set of survivors is shown: answer, or vote first."""
    terms, (_, held) = client.terms, _known(client)
    present = flags(survivors.present, len(client.mates))
    mates = int(present.sum())
    if (present & ~held.delivered).any():
        raise ForgedMessage("survivors are named who had shared no secrets with this client")
    if not present[client.place]:
        raise SecureAggregationFailed("this client's numbers are not in the sum: there is nothing for it to answer")
    if not isinstance(survivors.number, int) or not mates <= survivors.number <= terms.clients:
        raise ForgedMessage(f"{mates} survivors are named, and {survivors.number} are said to be")
    if len(client.mates) == terms.clients and survivors.number != mates:
        raise ForgedMessage(f"all survivors are named, {mates}, and {survivors.number} are said to be")
    if mates < terms.threshold or survivors.number < terms.least:
        raise NotEnoughShares(
            f"{survivors.number} clients are left, {mates} of them near; sums are shown of {terms.least} or more, with "
            f"{terms.threshold} near"
        )
    client = client._replace(survivors=survivors)
    if not terms.malicious:
        return _answered(client)
    assert client.own.identity is not None
    text = survivors_text(terms.binding, survivors.present, survivors.number)
    return client._replace(stage=Stage.VOTED), (Send(Vote(signed(client.own.identity.private, text))),)


def _counted(client: Client, votes: Votes) -> Step:
    """Answer if enough others were shown the same set."""
    roster, _ = _known(client)
    assert client.survivors is not None
    assert client.own.identity is not None
    voted = flags(votes.present, len(client.mates))
    if (voted & ~flags(client.survivors.present, len(client.mates))).any():
        raise ForgedMessage("votes are told of clients that are no survivors")
    check_array(votes.signatures, (int(voted.sum()), SIGNATURE), "votes")
    text = survivors_text(client.terms.binding, client.survivors.present, client.survivors.number)
    for place, signature in zip(np.flatnonzero(voted).tolist(), votes.signatures, strict=True):
        who = client.own.identity.public if place == client.place else roster.identities[place].tobytes()
        check_signature(who, signature.tobytes(), text)
    agreeing = int((voted | (np.arange(len(voted)) == client.place)).sum())
    if agreeing < client.terms.threshold:
        raise NotEnoughShares(
            f"{agreeing} clients have signed the set of survivors, and it takes {client.terms.threshold}"
        )
    return _answered(client)


def _answered(client: Client) -> Step:
    """Of each survivor the share of its seed, of each who was lost the share of its mask key; then nothing more."""
    _, held = _known(client)
    assert client.survivors is not None
    survived = flags(client.survivors.present, len(client.mates))
    chosen = held.shares[np.arange(len(survived)), survived.astype(int)]
    shares = Shares(bits(held.have), np.ascontiguousarray(chosen[held.have]))
    terms = client.terms
    client = client._replace(stage=Stage.DONE, held=None, roster=None, delivery=None)
    memory = Memory(terms.session, terms.round, terms.attempt, answered=True)
    return client, (Remember(memory), Send(shares))


def _abandoned(client: Client, event: Abandoned) -> Step:
    raise SecureAggregationFailed(f"the server gave the attempt up{': ' * bool(event.reason)}{event.reason}")


# The table: what may happen when. Whatever is not in it ends the client's part.
TABLE: dict[tuple[Stage, type], Callable[[Client, Any], Step]] = {
    (Stage.KEYED, Roster): _share,
    (Stage.SHARED, Numbers): _ready,
    (Stage.SHARED, Delivery): _delivered,
    (Stage.MASKED, Survivors): _asked,
    (Stage.VOTED, Votes): _counted,
    **{(stage, Abandoned): _abandoned for stage in (Stage.KEYED, Stage.SHARED, Stage.MASKED, Stage.VOTED)},
}
