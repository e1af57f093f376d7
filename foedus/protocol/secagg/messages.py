"""What clients and server say to each other for one masked sum: plain values, for any wire format to carry.

A client is known by its *slot*, 0 … clients − 1, for one attempt. Its *mates* are its neighbours in the graph and
itself, in rising order; who is meant among them is told by bits, lowest first in each byte, and what is told of each
follows in that order. Nothing names its sender: that is the transport's to know.

Everything that is derived, sealed or signed names the :class:`Terms` by their digest (``binding``), what it is for, and
sender and receiver, so that nothing of one session, round or attempt is of any use in another.

Not here: who may say what when (``client.py``, ``server.py``).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.errors import ForgedMessage, NoGuarantee, SecureAggregationFailed
from foedus.secure.graph import Withstand, ring
from foedus.secure.planes import packed_bytes, word
from foedus.secure.primitives import KEY, SIGNATURE, TAG, check_signature, digest, identity_key, signed

VERSION = 2
SEALED = 2 * KEY + TAG  # bytes of a client's two shares, sealed
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Slots = NDArray[np.int64]


# --- what an attempt is about -------------------------------------------------------------------------------


class Channel(NamedTuple):
    """One of the vectors that travel together under the same masks: the update, the buffers, a method's own.

    Attributes:
        name: of what travels in it.
        entries, width: how many numbers, and of how many bits each; they are added modulo 2^width.
    """

    name: str
    entries: int
    width: int

    @property
    def bytes(self) -> int:
        """What it takes in a message."""
        return packed_bytes(self.entries, self.width)


def apart(values: NDArray[np.uint8], channels: Sequence[Channel]) -> list[NDArray[np.uint8]]:
    """Packed numbers of all channels, which lie one after the other, by channel.

    Example:
        >>> channels = Channel("update", 3, 8), Channel("sizes", 1, 16)
        >>> [part.tolist() for part in apart(np.arange(5, dtype=np.uint8), channels)]
        [[0, 1, 2], [3, 4]]
    """
    ends = list(itertools.accumulate((channel.bytes for channel in channels), initial=0))
    return [values[begin:end] for begin, end in itertools.pairwise(ends)]


class Terms(NamedTuple):
    """What all clients of an attempt must agree on.

    Attributes:
        session: 16 bytes that tell the run.
        round, attempt: counted from 1; a round that failed is tried again as another attempt.
        model: SHA-256 of what clients received and train from.
        graph: 32 random bytes from which neighbours are dealt.
        clients: how many are asked.
        degree, threshold: see :mod:`foedus.secure.graph`.
        least: fewest clients in a sum.
        channels: what is added up, in this order.
        malicious: whether the server is not trusted to say the same to all.
        version: of this conversation.
    """

    session: bytes
    round: int
    attempt: int
    model: bytes
    graph: bytes
    clients: int
    degree: int
    threshold: int
    least: int
    channels: tuple[Channel, ...]
    malicious: bool = False
    version: int = VERSION

    @property
    def binding(self) -> bytes:
        """The digest that all keys, seals and signatures of the attempt name."""
        numbers = (
            self.version, self.round, self.attempt, self.clients, self.degree, self.threshold, self.least,
            self.malicious,
        )  # fmt: skip
        told = [part for c in self.channels for part in (c.name.encode(), struct.pack("<2Q", c.entries, c.width))]
        same = (self.session, self.model, self.graph, struct.pack("<8Q", *numbers))
        return digest(b"foedus secure aggregation", *same, *told)

    def neighbours(self, slot: int) -> Slots:
        """A client's neighbours, rising."""
        return ring(self.graph, self.clients, self.degree).neighbours(slot)

    def mates(self, slot: int) -> Slots:
        """A client's neighbours and itself, rising."""
        return np.sort(np.append(self.neighbours(slot), slot))


def session_of(server: bytes, run: str) -> bytes:
    """By which a client's memory knows a run: worked out by both sides, so that no server can have a round twice under
    two names.

    Args:
        server: its public key.
        run: its name.
    """
    return digest(b"foedus run", server, run.encode())[:16]


class Promise(NamedTuple):
    """What a client was promised, from the algorithm that its owner approved: terms that say less are refused.

    Attributes:
        withstand: clients, corrupt share, dropouts, ...
        least: fewest clients in a sum.
        channels: all that travels of an update, in this order: one conversation is about all of it.
    """

    withstand: Withstand
    least: int
    channels: tuple[Channel, ...]


def check_terms(terms: Terms, promise: Promise) -> None:
    """Refuse terms that protect less than was promised.

    Raises:
        SecureAggregationFailed: says which.
        NoGuarantee: so few are asked that those who may collude could undo the masks.
    """
    if terms.version != VERSION:
        raise SecureAggregationFailed(f"the server speaks version {terms.version}, and this client version {VERSION}")
    for what, given, size in (("session", terms.session, 16), ("model", terms.model, KEY), ("graph", terms.graph, KEY)):
        check_bytes(given, (size,), f"the terms' {what}")
    if not 3 <= terms.clients <= promise.withstand.clients:
        raise SecureAggregationFailed(
            f"{terms.clients} clients are to take part, and sums have room for {promise.withstand.clients}"
        )
    wanted = promise.withstand.among(terms.clients).parameters
    told = {
        "degree": wanted.degree, "threshold": wanted.threshold, "least": promise.least,
        "channels": promise.channels, "malicious": promise.withstand.malicious,
    }  # fmt: skip
    for name, value in told.items():
        if getattr(terms, name) != value:
            raise SecureAggregationFailed(
                f"the server's terms say {name}={getattr(terms, name)}, and {value} was promised"
            )
    if min(terms.round, terms.attempt) < 1:
        raise SecureAggregationFailed("rounds and attempts are counted from 1")


def terms_for(
    promise: Promise, *, session: bytes, round: int, attempt: int, model: bytes, graph: bytes, clients: int
) -> Terms:
    """The terms of an attempt among so many clients: what a server announces.

    Raises:
        NoGuarantee: so few cannot withstand what was promised.
    """
    degree, threshold = promise.withstand.among(clients).parameters
    return Terms(
        session, round, attempt, model, graph, clients, degree, threshold, promise.least, promise.channels,
        promise.withstand.malicious,
    )  # fmt: skip


# --- who is who, where the server may lie -------------------------------------------------------------------


@dataclass(frozen=True)
class Trust:
    """How a client knows another's identity without asking the server. Made by :func:`pinned` and :func:`certified`."""

    check: Callable[[bytes, bytes], None]
    label: str


def pinned(keys: frozenset[bytes] | set[bytes]) -> Trust:
    """Identities from a list that the clients' owners exchanged among themselves.

    Args:
        keys: Ed25519 public keys of all who may take part.

    Example:
        >>> pinned({bytes(32)}).label
        'pinned(1 identity)'
    """
    known = frozenset(keys)

    def check(identity: bytes, certificate: bytes) -> None:
        if identity not in known:
            raise ForgedMessage("an identity is not on this client's list")

    return Trust(check, f"pinned({len(known)} identit{'y' if len(known) == 1 else 'ies'})")


def certified(authority: bytes) -> Trust:
    """Identities that a third party, who is not the server, has signed (see :func:`certificate`).

    Args:
        authority: its Ed25519 public key.
    """

    def check(identity: bytes, certificate: bytes) -> None:
        check_signature(authority, certificate, _CERTIFIED + identity)

    return Trust(check, f"certified({authority.hex()[:8]})")


def certificate(authority: bytes, identity: bytes) -> bytes:
    """What the third party gives a client: its signature of the client's public key.

    Args:
        authority: the third party's secret key.
        identity: the client's public key.

    Example:
        >>> certified(identity_key(bytes(32))).check(bytes(32), certificate(bytes(32), bytes(32)))
    """
    return signed(authority, _CERTIFIED + identity)


_CERTIFIED = b"foedus identity 1"


@dataclass(frozen=True, repr=False)
class Identity:
    """A client's own identity, and whom it trusts.

    Attributes:
        private: 32 secret bytes of Ed25519.
        trust: how it knows others.
        certificate: where identities are certified, its own; else empty.
    """

    private: bytes
    trust: Trust
    certificate: bytes = b""

    @property
    def public(self) -> bytes:
        return identity_key(self.private)

    def __repr__(self) -> str:
        return f"Identity({self.public.hex()[:8]}, {self.trust.label})"


def check_identity(identity: Identity | None, terms: Terms) -> None:
    """Refuse to face a server that may lie without identities that it did not issue.

    Raises:
        NoGuarantee: there are none.
    """
    if terms.malicious and identity is None:
        raise NoGuarantee(
            "against a server that lies, clients must know each other by identities that it did not issue: with keys "
            f"that come from the server it could play all the others. Give Identity(private, pinned({...})) or "
            "Identity("
            "private, certified(authority), certificate)"
        )


# --- messages, in the order in which they are sent ----------------------------------------------------------


class Keys(NamedTuple):
    """A client's fresh public keys, for masks and for shares, and the digest of its seed. Where the server may lie also
    its identity, the identity's certificate (or nothing), and its signature of both keys."""

    mask: bytes
    share: bytes
    commitment: bytes
    identity: bytes = b""
    certificate: bytes = b""
    signature: bytes = b""


class Roster(NamedTuple):
    """To a client: which of its mates sent keys (itself not told), and these: ``keys`` uint8 [mate, 64], ``proofs``
    uint8 [mate, 96 or 160] of identity, signature and certificate, or [mate, 0]."""

    present: Bytes
    keys: Bytes
    proofs: Bytes


class Parcels(NamedTuple):
    """A client's shares of its secrets, sealed for each mate of the roster: uint8 [mate, 80]."""

    sealed: Bytes


class Delivery(NamedTuple):
    """To a client: which of its mates sent parcels, and those for it: uint8 [mate, 80]."""

    present: Bytes
    sealed: Bytes


class Masked(NamedTuple):
    """A client's numbers under its masks, packed, one channel after the other: see :mod:`foedus.secure.planes`."""

    values: Bytes


class Survivors(NamedTuple):
    """To a client: which of its mates are in the sum, itself included, and how many clients in all. This set is
    frozen: whose numbers come later is not in it."""

    present: Bytes
    number: int


class Vote(NamedTuple):
    """Where the server may lie: a client's signature of the set of survivors that it was shown."""

    signature: bytes


class Votes(NamedTuple):
    """To a client: which of its mates voted (itself included), and their signatures: uint8 [mate, 64]."""

    present: Bytes
    signatures: Bytes


class Shares(NamedTuple):
    """A client's answer: of which mates it has shares, and of each one: of the seed of a survivor, of the mask key of
    one who was lost. uint8 [mate, 32]. Never both."""

    present: Bytes
    shares: Bytes

    def __repr__(self) -> str:
        return f"Shares({len(self.shares)} secrets)"


FromClient = Keys | Parcels | Masked | Vote | Shares
FromServer = Roster | Delivery | Survivors | Votes


def message_size(message: FromClient | FromServer) -> int:
    """Bytes of a message's content.

    Example:
        >>> message_size(Vote(bytes(64)))
        64
    """
    return sum(4 if isinstance(v, int) else len(v) if isinstance(v, bytes) else int(v.nbytes) for v in message)


# --- what is read from them ---------------------------------------------------------------------------------


def bits(flags: Flags) -> Bytes:
    """Flags as bytes."""
    return np.packbits(flags, bitorder="little")


def flags(told: Any, count: int) -> Flags:
    """The inverse of :func:`bits`.

    Raises:
        ForgedMessage: it is none for so many, or bits beyond are set.
    """
    check_array(told, (-(-count // 8),), "who is meant")
    found = np.unpackbits(told, bitorder="little").astype(bool)
    if found[count:].any():
        raise ForgedMessage(f"bits beyond the {count} clients that are meant are set")
    return found[:count]


def check_array(array: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse what are no bytes of a shape.

    Raises:
        ForgedMessage: says what was expected.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        told = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ForgedMessage(f"{what}: bytes of shape {list(shape)} are expected, and {told} came")


def check_bytes(value: Any, sizes: tuple[int, ...], what: str) -> None:
    """Refuse what are no bytes of one of some lengths.

    Raises:
        ForgedMessage: says what was expected.
    """
    if not isinstance(value, bytes) or len(value) not in sizes:
        told = f"{len(value)}" if isinstance(value, bytes) else type(value).__name__
        raise ForgedMessage(f"{what}: {' or '.join(map(str, sizes))} bytes are expected, and {told} came")


def check_keys(keys: Any, terms: Terms) -> None:
    """Refuse what cannot be a client's keys; signatures are the clients' to check."""
    check_bytes(keys.mask, (KEY,), "the key for masks")
    check_bytes(keys.share, (KEY,), "the key for shares")
    check_bytes(keys.commitment, (KEY,), "the commitment")
    signs = terms.malicious
    check_bytes(keys.identity, (KEY * signs,), "the identity")
    check_bytes(keys.signature, (SIGNATURE * signs,), "the signature")
    check_bytes(keys.certificate, (0, SIGNATURE) if signs else (0,), "the certificate")


def check_masked(values: Any, terms: Terms) -> None:
    """Refuse what cannot be masked numbers."""
    check_array(values, (sum(channel.bytes for channel in terms.channels),), "masked numbers")


def check_numbers(values: Sequence[Any], terms: Terms) -> None:
    """Refuse what are not the numbers of all channels.

    Raises:
        SecureAggregationFailed: says what was expected.
    """
    told = ", ".join(f"{v.dtype}{list(v.shape)}" for v in values)
    wanted = ", ".join(f"{word(c.width)}{[c.entries]} of {c.name!r}" for c in terms.channels)
    fits = len(values) == len(terms.channels) and all(
        v.shape == (c.entries,) and v.dtype == word(c.width) for v, c in zip(values, terms.channels, strict=True)
    )
    if not fits:
        raise SecureAggregationFailed(f"{wanted} are to be masked, and there are {told or 'none'}")


# --- what they are bound to ---------------------------------------------------------------------------------


def about(binding: bytes, purpose: str, sender: int, receiver: int) -> bytes:
    """The context of a key or a seal."""
    return binding + struct.pack("<QQ", sender, receiver) + purpose.encode()


def mask_context(binding: bytes, one: int, other: int) -> bytes:
    """The context of the mask of two clients, the same for both."""
    return about(binding, "mask", min(one, other), max(one, other))


def keys_text(binding: bytes, slot: int, mask: bytes, share: bytes) -> bytes:
    """What a client signs of its keys."""
    return digest(b"keys", about(binding, "keys", slot, slot), mask, share)


def survivors_text(binding: bytes, present: Bytes, count: int) -> bytes:
    """What clients sign of the set of survivors."""
    return digest(b"survivors", binding, present.tobytes(), struct.pack("<Q", count))


def commitment(binding: bytes, slot: int, seed: bytes) -> bytes:
    """By what a server knows a seed that shares were put together to."""
    return digest(b"seed", about(binding, "seed", slot, slot), seed)
