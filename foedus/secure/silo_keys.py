"""How silos come by a common key that nobody between them sees: agreed end to end, relayed by the server.

Every silo has an identity, an Ed25519 key, and knows the others' public ones from elsewhere: a contract, a call, a page
that the server does not write. Then, in three messages that the server passes on:

1. every silo makes a fresh X25519 key and signs its public half: an :class:`Offer`;
2. one silo, the first by name, makes the key (``silo_key()``) and wraps it for each of the others under what their two
   X25519 keys agree on, signed: a :class:`Wrapped`;
3. every silo unwraps it, and signs the key's id: a :class:`Receipt`. A silo uses the key only when it has a receipt of
   every other for the same id, so that no two of them were given different ones.

All is bound to the session, the list of identities and all offers, so that nothing of another session, and no offer by
anybody else, is of use. Randomness is an argument; the key itself is drawn by SEAL.

Not here: encryption with the key (``secure/homomorphic.py``), transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from foedus.errors import ConfigurationError, ForgedMessage, SecureAggregationFailed
from foedus.secure.homomorphic import SiloKey
from foedus.secure.primitives import (
    KEY,
    Agreement,
    check_signature,
    derived,
    digest,
    identity_key,
    opened,
    public_key,
    sealed,
    signed,
)

VERSION = b"foedus silo keys 1"


class Offer(NamedTuple):
    """A silo's fresh public key: X25519, 32 bytes; signed."""

    silo: str
    public: bytes
    signature: bytes


class Wrapped(NamedTuple):
    """The common key, sealed for one silo by another; signed."""

    maker: str
    silo: str
    body: bytes
    signature: bytes


class Receipt(NamedTuple):
    """Which key a silo has; signed."""

    silo: str
    id: bytes
    signature: bytes


class Silo:
    """One silo's part of agreeing on a key.

    Args:
        name: its own.
        identity: its 32 secret bytes of Ed25519.
        roster: the public identity of every silo by name, its own too, as told by somebody other than the server.
        session: tells this agreement from any other, and is the same for all.
        fresh: 32 secret random bytes, used for nothing else and never again.

    Example: three silos, of which "a" makes the key:

        >>> from foedus.secure.homomorphic import silo_key
        >>> secrets = {name: bytes([i]) * 32 for i, name in enumerate("abc", 1)}  # in earnest: secrets.token_bytes(32)
        >>> roster = {name: identity_key(secret) for name, secret in secrets.items()}
        >>> silos = {
        ...     n: Silo(n, identity=s, roster=roster, session=b"2026", fresh=bytes([9]) + s[1:])
        ...     for n, s in secrets.items()
        ... }
        >>> offers = {n: silo.offer() for n, silo in silos.items()}
        >>> made = silo_key()
        >>> wrapped = silos["a"].wrap(made, offers)
        >>> keys = {n: made if n == "a" else silos[n].unwrap(wrapped[n], offers) for n in silos}
        >>> receipts = {n: silo.receipt(keys[n], offers) for n, silo in silos.items()}
        >>> for n, silo in silos.items():
        ...     silo.check(keys[n], receipts, offers)
        >>> len({key.id for key in keys.values()})
        1
    """

    def __init__(
        self, name: str, *, identity: bytes, roster: Mapping[str, bytes], session: bytes, fresh: bytes
    ) -> None:
        if roster.get(name) != identity_key(identity):
            raise ConfigurationError(
                f"the roster has another identity for {name!r} than the secret that is given, or none: the others "
                "would refuse whatever it signs"
            )
        if len(roster) < 3 or len(set(roster.values())) < len(roster):
            raise ConfigurationError("a roster has three silos at least, each with an identity of its own")
        if len(fresh) != KEY:
            raise ConfigurationError(f"fresh is {KEY} random bytes, e.g. secrets.token_bytes({KEY}); not {len(fresh)}")
        self.name, self._identity, self._roster = name, identity, dict(roster)
        self._agreement, self._public = Agreement(fresh), public_key(fresh)
        parts = [part for silo in sorted(roster) for part in (silo.encode(), roster[silo])]
        self._about = digest(VERSION, session, *parts)
        self._given: bytes | None = None

    def __repr__(self) -> str:
        return f"Silo({self.name!r})"

    @property
    def maker(self) -> str:
        """Who makes the key."""
        return min(self._roster)

    def offer(self) -> Offer:
        """The first message."""
        told = self._told("offer", self.name, self._public)
        return Offer(self.name, self._public, signed(self._identity, told))

    def wrap(self, key: SiloKey, offers: Mapping[str, Offer]) -> dict[str, Wrapped]:
        """The second message, for each of the others: by the one who makes the key.

        Raises:
            ForgedMessage: an offer is not by whom it says.
        """
        if self.name != self.maker:
            raise ConfigurationError(f"the key is made by {self.maker!r}, the first by name, and this is {self.name!r}")
        about = self._offered(offers)
        if self._given not in (None, digest(about, key.id)):
            raise ConfigurationError(
                "another key, or the same for other offers, was wrapped in this session already: what seals one must "
                "not seal another. Begin a session with fresh bytes"
            )
        self._given = digest(about, key.id)
        found = {}
        for silo in sorted(set(self._roster) - {self.name}):
            body = sealed(self._shared(offers[silo], silo, about), bytes(key), about)
            told = self._told("wrapped", silo, about, body)
            found[silo] = Wrapped(self.name, silo, body, signed(self._identity, told))
        return found

    def unwrap(self, wrapped: Wrapped, offers: Mapping[str, Offer]) -> SiloKey:
        """The key that was made, at any other silo.

        Raises:
            ForgedMessage: it, or an offer, is not by whom it says, or was meant for another silo or session.
        """
        about = self._offered(offers)
        if (wrapped.maker, wrapped.silo) != (self.maker, self.name):
            raise ForgedMessage(
                f"a key made by {wrapped.maker!r} for {wrapped.silo!r} reached {self.name!r}, whose key is made by "
                f"{self.maker!r}"
            )
        told = self._told("wrapped", self.name, about, wrapped.body)
        self._check("wrapped key for", self.name, self.maker, wrapped.signature, told)
        return SiloKey(opened(self._shared(offers[self.maker], self.name, about), wrapped.body, about))

    def receipt(self, key: SiloKey, offers: Mapping[str, Offer]) -> Receipt:
        """The third message."""
        told = self._told("receipt", self.name, self._offered(offers), key.id)
        return Receipt(self.name, key.id, signed(self._identity, told))

    def check(self, key: SiloKey, receipts: Mapping[str, Receipt], offers: Mapping[str, Offer]) -> None:
        """Whether every silo has this key; before the first update is encrypted.

        Raises:
            SecureAggregationFailed: one has another, or has not said so.
            ForgedMessage: a receipt is not by whom it says.
        """
        about = self._offered(offers)
        if missing := sorted(set(self._roster) - set(receipts)):
            raise SecureAggregationFailed(f"no receipt has come from {', '.join(missing)}")
        for silo in self._roster:
            receipt = receipts[silo]
            self._check("receipt of", silo, silo, receipt.signature, self._told("receipt", silo, about, receipt.id))
            if receipt.id != key.id:
                raise SecureAggregationFailed(
                    f"{silo!r} has another key than {self.name!r}: whoever made it gave out two. Do not use it"
                )

    def _offered(self, offers: Mapping[str, Offer]) -> bytes:
        """What all offers come to, once they are found to be by whom they say."""
        if offers.keys() != self._roster.keys():
            strange = sorted(offers.keys() ^ self._roster.keys())
            raise SecureAggregationFailed(f"offers and roster do not name the same silos: {', '.join(strange)}")
        for silo in self._roster:
            told = self._told("offer", silo, offers[silo].public)
            self._check("offer of", silo, silo, offers[silo].signature, told)
        if offers[self.name].public != self._public:
            raise ForgedMessage(f"the offers hold another of {self.name!r} than it made in this session")
        return digest(self._about, *(offers[silo].public for silo in sorted(offers)))

    def _check(self, what: str, silo: str, signer: str, signature: bytes, told: bytes) -> None:
        """Refuse what was not signed by a silo of the roster; says which message it is."""
        try:
            check_signature(self._roster[signer], signature, told)
        except ForgedMessage:
            raise ForgedMessage(
                f"the {what} {silo!r} is not signed by the identity that the roster has for {signer!r}, or was made "
                "for other offers, another session or another roster"
            ) from None

    def _told(self, what: str, silo: str, *parts: bytes) -> bytes:
        """What is signed."""
        return digest(self._about, what.encode(), silo.encode(), *parts)

    def _shared(self, offer: Offer, receiver: str, about: bytes) -> bytes:
        """What the key for one silo is sealed with, at either end."""
        return derived(self._agreement.secret(offer.public), self._told("wrap", receiver, about))
