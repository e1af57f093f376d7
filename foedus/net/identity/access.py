"""The door of a server: who is let in, as whom, and what they are given there.

`Access` joins authority, directory, challenges and tickets. It knows no HTTP: the server's routes hand it what came
(``routes.py``), and any other transport can. Every answer to a request that is not let in is a typed error.

A silo's ticket must come over a connection that proves its certificate, whenever this server ends TLS itself. Revoking
takes hold at the next `reload`, which a server calls every few seconds; nothing else here but joining and beginning
a session reads the database, so that letting a request in costs microseconds.

A member that asks too often is told so (``limits.py``); how often an address may knock is the routes' business.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from foedus.errors import EnrolmentRefused, SignatureInvalid, Unauthenticated
from foedus.net.identity.authority import Authority, fingerprint
from foedus.net.identity.callers import Caller, read, token_digest
from foedus.net.identity.directory import Directory, invitation
from foedus.net.identity.keys import PublicKey
from foedus.net.identity.limits import Rate
from foedus.net.identity.sessions import TICKET_S, Challenges, Proof, Ticket, Tickets
from foedus.net.store import Enrolled, Store

__all__ = ["Access"]

_CACHED = 20_000  # tickets whose signature has been verified


class Access:
    """Who may come in; one for each server process.

    Example:
        >>> access = Access(Authority.kept(folder, now=0.0), store)  # doctest: +SKIP
        >>> token = access.invite(now=0.0)  # doctest: +SKIP
        >>> access.caller(authorization, now=1.0)  # doctest: +SKIP
        Caller(position=0, name='clinic', scope=frozenset({<Scope.TRAIN: 'train'>}))

    Args:
        authority: the federation's.
        store: where members and invitations are kept.
        channel: SHA-256 of the certificate that this server shows, in hexadecimal; empty for plain HTTP on loopback,
            None if a proxy before it ends TLS, so that neither channels nor client certificates can be seen.
        rate: how often one member may ask.
    """

    def __init__(
        self, authority: Authority, store: Store, *, channel: str | None = "", rate: Rate | None = None
    ) -> None:
        self.authority, self.directory = authority, Directory(store)
        self._rate = rate or Rate(per_s=50.0, burst=500)
        self._channels: tuple[str, ...] | None = None if channel is None else (channel,)
        self._challenges = Challenges(hashlib.sha256(authority.signing.sign("challenge key")).digest())
        self._tickets = Tickets(authority.signing, server=authority.pin)
        self._known: OrderedDict[bytes, Ticket] = OrderedDict()
        self._revoked: frozenset[str] = frozenset()

    def invite(
        self, *, now: float, hours: float = 24.0, uses: int = 1, silo: bool = True, name: str = "", population: str = ""
    ) -> str:  # fmt: skip
        """A join token for a client, kept as a digest; shown once."""
        token, kept = invitation(now=now, hours=hours, uses=uses, silo=silo, name=name, population=population)
        self.directory.invite(kept)
        return token

    def reload(self) -> None:
        """Read who is revoked; a server calls it every few seconds, beside its event loop."""
        self._revoked = self.directory.revoked()

    def shows(self, channel: str) -> None:
        """The server's certificate was renewed: take proofs over it, and over the one before, for connections open."""
        if self._channels is not None and channel not in self._channels:
            self._channels = (channel, *self._channels)[:2]

    def document(self, *, now: float) -> bytes:
        """What anybody may fetch and check against the pin."""
        return self.authority.document(now=now)

    def challenge(self, *, now: float) -> bytes:
        """A challenge to sign."""
        return self._challenges.make(now=now)

    def enrol(self, token: str, name: str, key: bytes, *, signature: bytes, now: float) -> tuple[Enrolled, bytes]:
        """Let a client in that shows a join token; its certificate, or nothing for a device.

        Args:
            token: as shown once by `invite`.
            name: what it wants to be called.
            key: its public key, 32 bytes.
            signature: by that key, for the purpose ``enrol``, over server, token's digest and name.
            now: seconds since 1970.
        """
        digest, public = token_digest(token), PublicKey(key)
        try:
            public.verify(signature, "enrol", self.authority.pin.encode(), digest, name.encode())
        except SignatureInvalid as error:
            raise EnrolmentRefused(f"{name!r} showed a key and did not sign with it; join again") from error
        member = self.directory.enrol(token, name, key, now=now)
        return member, self._certificate(member, now=now)

    def certificate(self, proof: Proof, *, now: float) -> bytes:
        """A new certificate for a silo whose old one runs out."""
        return self._certificate(self._proven(proof, "certificate", now=now), now=now)

    def session(self, proof: Proof, *, peer: bytes | None, now: float) -> tuple[str, float]:
        """A ticket for a client that proves its key, and how many seconds it is good.

        Args:
            proof: signed by the client's key for the purpose ``session``.
            peer: the client certificate that the connection has proven, in DER form; None if there is none.
            now: seconds since 1970.
        """
        member = self._proven(proof, "session", now=now)
        caller = Caller(member.position, member.name, read(member.scope))
        bound = "" if peer is None else fingerprint(peer)
        if self._sees_tls and member.silo and (peer is None or _key_of(peer) != member.key):
            raise Unauthenticated(
                f"{member.name!r} is a silo, and this connection does not show its certificate. If the certificate has "
                "run out, the client renews it by itself; if a proxy between ends TLS, the server must be told so"
            )
        return self._tickets.issue(caller, now=now, bound=bound), TICKET_S

    def mint(self, caller: Caller, *, now: float, lifetime_s: float) -> str:
        """A ticket for somebody who has no key of their own: an operator, or a device known to an application."""
        return self._tickets.issue(caller, now=now, lifetime_s=lifetime_s)

    def caller(self, authorization: str | None, *, peer: bytes | None = None, now: float) -> Caller:
        """Whose request this is.

        Args:
            authorization: the header of that name, ``Bearer TICKET``.
            peer: the client certificate that the connection has proven, in DER form.
            now: seconds since 1970.

        Errors: `Unauthenticated`; `TooFast`.
        """
        kind, _, text = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not text:
            raise Unauthenticated(
                "the request shows no ticket; begin a session, then send 'Authorization: Bearer TICKET'"
            )
        ticket = self._ticket(text.strip(), now)
        if ticket.bound and self._sees_tls and (peer is None or fingerprint(peer) != ticket.bound):
            raise Unauthenticated("the ticket is bound to a client certificate, and this connection does not show it")
        if ticket.caller.name in self._revoked:
            raise Unauthenticated(f"{ticket.caller.name!r} was revoked; ask whoever runs the server")
        if ticket.caller.position >= 0:  # the federation's own processes ask as often as they must
            self._rate.take(ticket.caller.name, now=now)
        return ticket.caller

    @property
    def _sees_tls(self) -> bool:
        """Whether this server ends TLS itself, and so sees certificates."""
        return bool(self._channels and self._channels[0])

    def _certificate(self, member: Enrolled, *, now: float) -> bytes:
        if not member.silo:
            return b""
        return self.authority.client_certificate(member.name, PublicKey(member.key), now=now)

    def _proven(self, proof: Proof, purpose: str, *, now: float) -> Enrolled:
        """The member who made a proof; the challenge is spent whether it holds or not."""
        self._challenges.spend(proof.challenge, now=now)
        member = self.directory.member(proof.name)
        if member is None:
            raise Unauthenticated(f"nobody is called {proof.name[:80]!r} here; join with a token first")
        if member.revoked_at is not None:
            raise Unauthenticated(f"{member.name!r} was revoked; ask whoever runs the server")
        proof.check(PublicKey(member.key), purpose, server=self.authority.pin)
        if self._channels is not None and proof.channel not in self._channels:
            raise Unauthenticated(
                "the client saw another certificate than this server shows: somebody between ends TLS. If that is a "
                "proxy of yours, tell the server so (foedus serve --behind-proxy)"
            )
        return member

    def _ticket(self, text: str, now: float) -> Ticket:
        """A ticket, whose signature is verified once."""
        digest = hashlib.sha256(text.encode()).digest()
        ticket = self._known.get(digest)
        if ticket is None:
            ticket = self._tickets.read(text, now=now)
            self._known[digest] = ticket
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
        if now > ticket.expires:
            raise Unauthenticated("the ticket has expired; begin a new session")
        return ticket


def _key_of(certificate: bytes) -> bytes:
    """The raw public key in a client's certificate; the connection has checked who signed it."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else b""
