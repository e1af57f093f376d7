"""The server's part of one masked sum, as a pure state machine.

    open_attempt(terms)       ──► KEYS
    KEYS     Keys    (all, or Close) ──► SHARES   → Send(Roster) to each who sent keys
    SHARES   Parcels (all, or Close) ──► NUMBERS  → Send(Delivery) to each who sent parcels
    NUMBERS  Masked  (all, or Close) ──► ANSWERS  → Send(Survivors) to each who is in the sum
    NUMBERS  Masked  (all, or Close) ──► VOTES    → Send(Survivors), where the server may lie
    VOTES    Vote    (all, or Close) ──► ANSWERS  → Send(Votes) to each who voted
    ANSWERS  Shares  (as soon as they suffice) ──► DONE → Revealed
    any      Close   with too few left, or secrets that are not those that were committed to ──► FAILED → Failed

``Close`` is the transport's: time is up for a stage; ``Gone`` says that a client will send nothing more. What comes
when its stage is over, a second time, or malformed, is refused (``Refused``) and changes nothing: a masked vector that
comes after the set is frozen is not looked at. Once the set is frozen there is no way back: an attempt that fails then
reveals nothing, and another one has fresh keys.

``step`` adds to the sums of the state that it is given; use what it returns. A state need not be stored: a round whose
server dies begins anew as another attempt.

Not here: the client (``client.py``), transports, what the sum means (``foedus.secure.masked``).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import FoedusError, ForgedMessage, NotEnoughShares, SecureAggregationFailed
from foedus.protocol.secagg.messages import (
    SEALED,
    Bytes,
    Delivery,
    Flags,
    FromClient,
    FromServer,
    Keys,
    Masked,
    Parcels,
    Roster,
    Shares,
    Slots,
    Survivors,
    Terms,
    Vote,
    Votes,
    about,
    apart,
    bits,
    check_array,
    check_bytes,
    check_keys,
    check_masked,
    commitment,
    flags,
    keys_text,
    mask_context,
    survivors_text,
)
from foedus.secure.planes import Tally
from foedus.secure.primitives import (
    KEY,
    SIGNATURE,
    Agreement,
    add_mask,
    check_public,
    check_signature,
    derived,
    public_key,
)
from foedus.secure.sharing import recovered, recovered_apart


class Phase(Enum):
    """Where an attempt is."""

    KEYS = "waiting for keys"
    SHARES = "waiting for shares"
    NUMBERS = "waiting for masked numbers"
    VOTES = "waiting for votes"
    ANSWERS = "waiting for answers"
    DONE = "the sum is there"
    FAILED = "given up"


# --- events and actions -------------------------------------------------------------------------------------


class From(NamedTuple):
    """A message of a client, by its slot."""

    slot: int
    message: FromClient


class Gone(NamedTuple):
    """A client will send nothing more."""

    slot: int


class Close(NamedTuple):
    """Time is up for this stage."""


Event = From | Gone | Close


class Send(NamedTuple):
    """Send a message to a client."""

    slot: int
    message: FromServer


class Refused(NamedTuple):
    """A client's message was not taken, and why."""

    slot: int
    reason: str


class Revealed(NamedTuple):
    """The sums [entry] of all channels, of the clients of these slots: what the aggregators decode."""

    totals: tuple[NDArray[Any], ...]
    survivors: Slots


class Failed(NamedTuple):
    """The attempt ended without a sum. All clients that are left are to be told."""

    reason: str


Action = Send | Refused | Revealed | Failed


# --- state --------------------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    """Of every client: its mates, int64 [client, mate]; and where it stands among those of each of them."""

    mates: Slots
    place: Slots


class Server(NamedTuple):
    """The state of an attempt.

    Attributes:
        phase: where it is.
        terms: what it is about.
        alive: bool [client], who is still expected to send something.
        came: bool [client], who has sent what the phase waits for.
        keyed, shared, survivors: bool [client], the sets that were frozen so far (Bonawitz's U1, U2, U3).
    """

    phase: Phase
    terms: Terms
    graph: _Graph
    alive: Flags
    came: Flags
    keyed: Flags
    shared: Flags
    survivors: Flags
    keys: Bytes  # [client, 64]
    commitments: Bytes  # [client, 32]
    proofs: Bytes  # [client, 160], or [client, 0]
    sealed: Bytes  # [client, mate, 80], of the first for the second
    tallies: tuple[Tally, ...]  # by channel
    votes: Bytes  # [client, 64]
    have: Flags  # [client, mate], whether the first has told its share of the second
    answers: Bytes  # [client, mate, 32]
    shares: NDArray[np.int64]  # [client], how many have told a share of it
    known: set[bytes]  # all keys so far

    def __repr__(self) -> str:
        return f"Server({self.phase.name}, round={self.terms.round}, attempt={self.terms.attempt})"


Step = tuple[Server, tuple[Action, ...]]


def open_attempt(terms: Terms) -> Server:
    """The state before anybody has sent anything; every client is to be sent the terms, and its slot."""
    count = terms.clients
    mates = _all_mates(terms)
    nobody = np.zeros(count, bool)
    return Server(
        Phase.KEYS, terms, _Graph(mates, _places(mates)), ~nobody, nobody.copy(), nobody, nobody, nobody,
        np.zeros((count, 2 * KEY), np.uint8), np.zeros((count, KEY), np.uint8),
        np.zeros((count, (KEY + 2 * SIGNATURE) * terms.malicious), np.uint8),
        np.zeros((0, mates.shape[1], SEALED), np.uint8), tuple(Tally(c.entries, c.width) for c in terms.channels),
        np.zeros((count * terms.malicious, SIGNATURE), np.uint8), np.zeros((0, mates.shape[1]), bool),
        np.zeros((0, mates.shape[1], KEY), np.uint8), np.zeros(count, np.int64), set(),
    )  # fmt: skip


def _all_mates(terms: Terms) -> Slots:
    """The mates of all clients, int64 [client, mate]."""
    if terms.degree >= terms.clients - 1:
        every: Slots = np.arange(terms.clients)
        return np.broadcast_to(every, (terms.clients, terms.clients))
    return np.stack([terms.mates(slot) for slot in range(terms.clients)])


def _places(mates: Slots) -> Slots:
    """Where a client stands among the mates of each of its mates, int64 [client, mate]."""
    count, width = mates.shape
    own: Slots = np.arange(count)[:, None]
    if width == count:
        return np.broadcast_to(own, mates.shape)
    rows = (mates + np.arange(count)[:, None] * count).reshape(-1)  # rising, since every row is
    found: Slots = np.searchsorted(rows, mates * count + own) - mates * width
    return found


def step(server: Server, event: Event) -> Step:
    """What an event makes of an attempt, and what is to be done."""
    if server.phase in (Phase.DONE, Phase.FAILED):
        late = f"it is too late: {server.phase.value}"
        return server, (Refused(event.slot, late),) if isinstance(event, From) else ()
    if isinstance(event, Close):
        return _closed(server)
    if not 0 <= event.slot < server.terms.clients:
        return server, (Refused(event.slot, f"slot {event.slot} is none of {server.terms.clients}"),)
    if isinstance(event, Gone):
        server.alive[event.slot] = False
        return _closed(server) if _complete(server) else (server, ())
    try:
        _take(server, event)
    except FoedusError as error:
        return server, (Refused(event.slot, str(error)),)
    return _closed(server) if _complete(server) else (server, ())


def _take(server: Server, event: From) -> None:
    """Take a client's message, if it is its turn."""
    kind, _, take = TABLE[server.phase]
    if not isinstance(event.message, kind):
        raise SecureAggregationFailed(f"{type(event.message).__name__} came while {server.phase.value}")
    if not _awaited(server)[event.slot]:
        raise SecureAggregationFailed(f"client {event.slot} has no part in what comes now: it had dropped out")
    if server.came[event.slot]:
        raise SecureAggregationFailed(f"client {event.slot} has sent its {type(event.message).__name__} already")
    take(server, event.slot, event.message)
    server.came[event.slot] = True


def _awaited(server: Server) -> Flags:
    """Who is to send something in this phase."""
    match server.phase:  # every message asks: no table is made for it
        case Phase.KEYS:
            return np.ones(server.terms.clients, bool)
        case Phase.SHARES:
            return server.keyed
        case Phase.NUMBERS:
            return server.shared
        case _:
            return server.survivors


def _complete(server: Server) -> bool:
    """Whether nothing more is to be waited for."""
    came = np.count_nonzero(server.came)
    if server.phase is Phase.ANSWERS and came >= server.terms.threshold and _enough(server):
        return True
    awaited = _awaited(server)
    if np.count_nonzero(server.alive) == server.terms.clients:  # the usual case, and every message asks
        return bool(came == np.count_nonzero(awaited))
    return bool(server.came[awaited & server.alive].all())


def _closed(server: Server) -> Step:
    """Freeze who has come, and go on with them."""
    _, go_on, _ = TABLE[server.phase]
    try:
        return go_on(server)
    except FoedusError as error:
        return _failed(server, str(error))


def _failed(server: Server, reason: str) -> Step:
    """The end without a sum: all that came is forgotten."""
    nothing = np.zeros((0, 0), np.uint8)
    gone = server._replace(phase=Phase.FAILED, sealed=nothing, answers=nothing, tallies=(), have=nothing.astype(bool))
    return gone, (Failed(reason),)


# --- what is taken ------------------------------------------------------------------------------------------


def _take_keys(server: Server, slot: int, keys: Keys) -> None:
    """What the others would have to leave over is not passed on to them."""
    check_keys(keys, server.terms)
    if keys.mask == keys.share or not server.known.isdisjoint((keys.mask, keys.share)):
        raise ForgedMessage(f"client {slot} sent a key that is another's already: every client has two of its own")
    check_public(keys.mask)
    check_public(keys.share)
    if server.terms.malicious:
        check_signature(keys.identity, keys.signature, keys_text(server.terms.binding, slot, keys.mask, keys.share))
    server.known.update((keys.mask, keys.share))
    server.keys[slot] = np.frombuffer(keys.mask + keys.share, np.uint8)
    server.commitments[slot] = np.frombuffer(keys.commitment, np.uint8)
    if server.terms.malicious:
        proof = keys.identity + keys.signature + keys.certificate
        server.proofs[slot, : len(proof)] = np.frombuffer(proof, np.uint8)


def _take_parcels(server: Server, slot: int, parcels: Parcels) -> None:
    others = _present(server, slot, server.keyed)
    check_array(parcels.sealed, (int(others.sum()), SEALED), "sealed shares")
    _cells(server.sealed)[slot][others] = _cells(parcels.sealed)


def _take_masked(server: Server, slot: int, masked: Masked) -> None:
    check_masked(masked.values, server.terms)
    for tally, values in zip(server.tallies, apart(masked.values, server.terms.channels), strict=True):
        tally.add(values)


def _take_vote(server: Server, slot: int, vote: Vote) -> None:
    check_bytes(vote.signature, (SIGNATURE,), "a vote")
    text = survivors_text(server.terms.binding, bits(server.survivors), int(server.survivors.sum()))
    check_signature(server.proofs[slot, :KEY].tobytes(), vote.signature, text)
    server.votes[slot] = np.frombuffer(vote.signature, np.uint8)


def _take_shares(server: Server, slot: int, shares: Shares) -> None:
    mates = server.graph.mates[slot]
    told = flags(shares.present, len(mates))
    if (told & ~server.shared[mates]).any():
        raise ForgedMessage(f"client {slot} tells shares of clients that had shared nothing")
    check_array(shares.shares, (int(told.sum()), KEY), "shares")
    server.have[slot] = told
    _cells(server.answers)[slot][told] = _cells(shares.shares)
    server.shares[mates] += told


def _cells(rows: Bytes) -> NDArray[Any]:
    """Rows of bytes [..., byte] as one value each [...], which are copied and gathered as a whole, not byte by byte."""
    return np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[-1])))[..., 0]


def _bytes(cells: NDArray[Any]) -> Bytes:
    """The inverse, of a row of them."""
    return np.ascontiguousarray(cells)[:, None].view(np.uint8)


def _present(server: Server, slot: int, among: Flags) -> Flags:
    """Which of a client's mates, but itself, are in a set: bool [mate]."""
    mates = server.graph.mates[slot]
    return np.asarray(among[mates] & (mates != slot))


# --- going on -----------------------------------------------------------------------------------------------


def _connected(server: Server, found: Flags) -> Flags:
    """Who of a set can go on: those with enough mates in it, again and again until all that are left have."""
    while True:
        near = found[server.graph.mates].sum(1)
        fine: Flags = found & (near >= server.terms.threshold)
        if (fine == found).all():
            return fine
        found = fine


def _check_many(server: Server, found: Flags, what: str) -> None:
    count = int(found.sum())
    if count < server.terms.least:
        raise NotEnoughShares(
            f"{count} clients have sent {what}, and no sum of fewer than {server.terms.least} is shown"
        )


def _next(server: Server, phase: Phase) -> Server:
    return server._replace(phase=phase, came=np.zeros(server.terms.clients, bool))


def _to_shares(server: Server) -> Step:
    keyed = _connected(server, server.came)
    _check_many(server, keyed, "keys")
    server = _next(server, Phase.SHARES)._replace(
        keyed=keyed, sealed=np.zeros((*server.graph.mates.shape, SEALED), np.uint8)
    )
    return server, tuple(Send(slot, _roster(server, slot)) for slot in np.flatnonzero(keyed).tolist())


def _roster(server: Server, slot: int) -> Roster:
    present = _present(server, slot, server.keyed)
    mates = server.graph.mates[slot][present]
    proofs = server.proofs[mates]
    if server.terms.malicious and not proofs[:, KEY + SIGNATURE :].any():  # identities are pinned: no certificates
        proofs = np.ascontiguousarray(proofs[:, : KEY + SIGNATURE])
    return Roster(bits(present), _bytes(_cells(server.keys)[mates]), proofs)


def _to_numbers(server: Server) -> Step:
    shared = _connected(server, server.came)
    _check_many(server, shared, "shares")
    server = _next(server, Phase.NUMBERS)._replace(shared=shared)
    sends, cells = [], _cells(server.sealed)
    for slot in np.flatnonzero(shared).tolist():
        present = _present(server, slot, shared)
        mates, places = server.graph.mates[slot][present], server.graph.place[slot][present]
        sends.append(Send(slot, Delivery(bits(present), _bytes(cells[mates, places]))))
    return server._replace(sealed=np.zeros((0, 0, SEALED), np.uint8)), tuple(sends)


def _to_unmasking(server: Server) -> Step:
    """Freeze the set of those in the sum, and ask; not if they cannot be enough."""
    survivors = server.came
    _check_many(server, survivors, "masked numbers")
    near = survivors[server.graph.mates].sum(1)
    if (short := server.shared & (near < server.terms.threshold)).any():
        raise NotEnoughShares(
            f"of client {int(np.argmax(short))} {int(near[short][0])} mates are left, and its secrets take "
            f"{server.terms.threshold}"
        )
    shape = server.graph.mates.shape
    server = _next(server, Phase.VOTES if server.terms.malicious else Phase.ANSWERS)._replace(
        survivors=survivors, have=np.zeros(shape, bool), answers=np.zeros((*shape, KEY), np.uint8)
    )
    count = int(survivors.sum())
    asked = np.flatnonzero(survivors).tolist()
    return server, tuple(Send(s, Survivors(bits(survivors[server.graph.mates[s]]), count)) for s in asked)


def _to_answers(server: Server) -> Step:
    voted = server.came
    if int(voted.sum()) < server.terms.threshold:
        raise NotEnoughShares(f"{int(voted.sum())} clients have voted, and it takes {server.terms.threshold}")
    server = _next(server, Phase.ANSWERS)._replace(alive=server.alive & voted)
    sends = []
    for slot in np.flatnonzero(voted).tolist():
        mates = server.graph.mates[slot]
        present = voted[mates]
        sends.append(Send(slot, Votes(bits(present), server.votes[mates[present]])))
    return server, tuple(sends)


# --- unmasking ----------------------------------------------------------------------------------------------


def _enough(server: Server) -> bool:
    return bool((server.shares[server.shared] >= server.terms.threshold).all())


def _to_sum(server: Server) -> Step:
    """Put the secrets together and take the masks off."""
    if not _enough(server):
        fewest = int(server.shares[server.shared].min())
        raise NotEnoughShares(f"of one client's secrets {fewest} shares came, and it takes {server.terms.threshold}")
    terms, survivors = server.terms, server.survivors
    kept, lost = np.flatnonzero(survivors), np.flatnonzero(server.shared & ~survivors)
    seeds, masks = _put_together(server, kept), _put_together(server, lost)
    _check_secrets(server, kept, seeds)
    totals = tuple(tally.total() for tally in server.tallies)
    for slot, seed in zip(kept.tolist(), seeds, strict=True):
        add_mask(totals, derived(seed.tobytes(), about(terms.binding, "seed", slot, slot)), negative=True)
    for slot, mask in zip(lost.tolist(), masks, strict=True):
        _without(server, totals, slot, mask.tobytes())
    for total, channel in zip(totals, terms.channels, strict=True):
        total &= total.dtype.type(2**channel.width - 1)
    done, _ = _failed(server, "")
    return done._replace(phase=Phase.DONE), (Revealed(totals, kept),)


def _put_together(server: Server, slots: Slots) -> Bytes:
    """The secrets of some clients from the first shares that came, uint8 [client, 32]."""
    threshold = server.terms.threshold
    if not len(slots):
        return np.zeros((0, KEY), np.uint8)
    if server.graph.mates.shape[1] == server.terms.clients:  # all hold shares of all, so that the same may tell them
        holders = np.flatnonzero(server.have[:, slots].all(1))[:threshold]
        if len(holders) == threshold:
            return recovered(server.answers[np.ix_(holders, slots)], holders + 1)
    mates, places = server.graph.mates[slots], server.graph.place[slots]
    chosen = np.argsort(~server.have[mates, places], axis=1, kind="stable")[:, :threshold]
    holders, where = np.take_along_axis(mates, chosen, 1), np.take_along_axis(places, chosen, 1)
    return recovered_apart(server.answers[holders, where], holders + 1)


def _check_secrets(server: Server, slots: Slots, seeds: Bytes) -> None:
    """Refuse seeds that are not those committed to."""
    binding = server.terms.binding
    for slot, seed in zip(slots.tolist(), seeds, strict=True):
        if commitment(binding, slot, seed.tobytes()) != server.commitments[slot].tobytes():
            raise ForgedMessage(f"the seed of client {slot} that was put together is not the one it had committed to")


def _without(server: Server, totals: tuple[NDArray[Any], ...], slot: int, mask: bytes) -> None:
    """Take off the masks that survivors share with a client that was lost."""
    if public_key(mask) != server.keys[slot, :KEY].tobytes():
        raise ForgedMessage(
            f"the mask key of client {slot} that was put together is not the one it had told the public of"
        )
    agreement, binding = Agreement(mask), server.terms.binding
    for mate in server.graph.mates[slot].tolist():
        if server.survivors[mate]:
            secret = agreement.secret(server.keys[mate, :KEY].tobytes())
            add_mask(totals, derived(secret, mask_context(binding, slot, mate)), negative=mate < slot)


# The table: what each phase takes, how it ends, and how a message is taken.
_Row = tuple[type, Callable[[Server], Step], Callable[[Server, int, Any], None]]
TABLE: dict[Phase, _Row] = {
    Phase.KEYS: (Keys, _to_shares, _take_keys),
    Phase.SHARES: (Parcels, _to_numbers, _take_parcels),
    Phase.NUMBERS: (Masked, _to_unmasking, _take_masked),
    Phase.VOTES: (Vote, _to_answers, _take_vote),
    Phase.ANSWERS: (Shares, _to_sum, _take_shares),
}
