"""A visit's beginning: a client proves its key once, and is given a ticket that lasts for minutes.

    client                                   server
      ├── challenge? ───────────────────────▶│  nonce ‖ expiry ‖ mac: nothing is kept
      │◀──────────────────────── challenge ──┤
      ├── proof: name, challenge, channel, ─▶│  the name's key signed it; the challenge is this server's,
      │          signature                   │  fresh and unused; the channel is the one that it came by
      │◀─────────────────────────── ticket ──┤

What is signed names the server (its pin), the challenge and the *channel*: the digest of the certificate that the
server showed, as the client saw it (RFC 5929, tls-server-end-point). So a proof cannot be shown to another server, nor
twice, nor be passed on by somebody who sits between with a certificate of their own. A server that does not end
TLS itself (``channel=None``) cannot compare it, and says so in its settings.

A ticket is a JSON Web Token signed with Ed25519 (RFC 7519, RFC 8037), good for a quarter of an hour. A silo's ticket
is bound to its client certificate (RFC 8705): shown over a connection that does not prove that certificate's key, it
opens nothing.

Not here: HTTP (``routes.py``, ``visits.py``), rate limits (``limits.py``).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt

from foedus.errors import SignatureInvalid, Unauthenticated
from foedus.net.identity.callers import Caller, read, written
from foedus.net.identity.keys import PublicKey, SigningKey

__all__ = ["Challenges", "Proof", "Ticket", "Tickets"]

CHALLENGE_S = 60.0
TICKET_S = 900.0
_LONGEST = 2048  # characters of a ticket
_REMEMBERED = 100_000  # challenges used in the last minute; more cannot come through the limits


@dataclass(frozen=True)
class Proof:
    """What a client shows to begin a session, or to have its certificate renewed.

    Example:
        >>> key = SigningKey.generate()
        >>> proof = Proof.signed(key, "session", server="a1", name="clinic", challenge=b"c", channel="ff")
        >>> proof.check(key.public, "session", server="a1")
        >>> proof.check(key.public, "session", server="b2")
        Traceback (most recent call last):
        foedus.errors.Unauthenticated: 'clinic' did not prove its key: ...

    Attributes:
        name: who it says it is.
        challenge: the server's.
        channel: SHA-256 of the certificate that the server showed, in hexadecimal; empty on plain HTTP.
        signature: over all of these, the server and the purpose.
    """

    name: str
    challenge: bytes = field(repr=False)
    channel: str
    signature: bytes = field(repr=False)

    @classmethod
    def signed(cls, key: SigningKey, purpose: str, *, server: str, name: str, challenge: bytes, channel: str) -> Proof:
        """A proof by a client's key."""
        parts = (server.encode(), name.encode(), challenge, channel.encode())
        return cls(name, challenge, channel, key.sign(purpose, *parts))

    def check(self, key: PublicKey, purpose: str, *, server: str) -> None:
        """Return if the key signed it for this purpose and server; raise `Unauthenticated` otherwise."""
        parts = (server.encode(), self.name.encode(), self.challenge, self.channel.encode())
        try:
            key.verify(self.signature, purpose, *parts)
        except SignatureInvalid as error:
            raise Unauthenticated(
                f"{self.name!r} did not prove its key: the signature is not the enrolled key's over this server's "
                "challenge. Join again in the folder where the key lies, or with a new token"
            ) from error


class Challenges:
    """Challenges that are this server's, fresh, and used once; nothing is kept of those that nobody answers.

    Example:
        >>> challenges = Challenges(b"secret")
        >>> once = challenges.make(now=0.0)
        >>> challenges.spend(once, now=1.0)
        >>> challenges.spend(once, now=2.0)
        Traceback (most recent call last):
        foedus.errors.Unauthenticated: this challenge has been answered already; ask for a new one

    Args:
        secret: shared by the servers of a federation, so that any of them takes what another gave.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._used: OrderedDict[bytes, float] = OrderedDict()  # nonce → when it expires, oldest first

    def make(self, *, now: float) -> bytes:
        """A new challenge of 56 bytes."""
        told = secrets.token_bytes(16) + int(now + CHALLENGE_S).to_bytes(8, "big")
        return told + self._mac(told)

    def spend(self, challenge: bytes, *, now: float) -> None:
        """Accept a challenge once; raise `Unauthenticated` if it is another's, too old, or used."""
        told, mac = challenge[:24], challenge[24:]
        if len(challenge) != 56 or not hmac.compare_digest(mac, self._mac(told)):
            raise Unauthenticated("this challenge is not of this server; ask for a new one")
        nonce, expires = told[:16], float(int.from_bytes(told[16:], "big"))
        if now > expires:
            raise Unauthenticated(f"this challenge is older than {CHALLENGE_S:.0f} s; ask for a new one")
        if nonce in self._used:
            raise Unauthenticated("this challenge has been answered already; ask for a new one")
        self._forget(now)
        self._used[nonce] = expires

    def _mac(self, told: bytes) -> bytes:
        return hmac.digest(self._secret, b"challenge" + told, hashlib.sha256)

    def _forget(self, now: float) -> None:
        while self._used and (len(self._used) >= _REMEMBERED or next(iter(self._used.values())) < now):
            self._used.popitem(last=False)


@dataclass(frozen=True)
class Ticket:
    """What a valid ticket says.

    Attributes:
        caller: whose it is.
        expires: seconds since 1970.
        bound: SHA-256 of the client certificate it is bound to, or empty.
    """

    caller: Caller
    expires: float
    bound: str


class Tickets:
    """Tickets of one server: made with its signing key, read with the public half.

    Example:
        >>> from foedus.net.identity.callers import TRAIN
        >>> tickets = Tickets(SigningKey.generate(), server="a1")
        >>> text = tickets.issue(Caller(0, "clinic", TRAIN), now=0.0)
        >>> tickets.read(text, now=10.0).caller.name
        'clinic'

    Args:
        key: the server's signing key.
        server: its pin; a ticket of another server is none.
    """

    def __init__(self, key: SigningKey, *, server: str) -> None:
        self._key, self._server = key, server

    def issue(self, caller: Caller, *, now: float, lifetime_s: float = TICKET_S, bound: str = "") -> str:
        """A ticket for a caller.

        Args:
            caller: who, and what they may.
            now: seconds since 1970.
            lifetime_s: how long it is good.
            bound: SHA-256 of the client certificate that must be shown with it.
        """
        claims: dict[str, Any] = {
            "iss": self._server,
            "sub": caller.name,
            "pos": caller.position,
            "scope": written(caller.scope),
            "iat": int(now),
            "exp": int(now + lifetime_s),
        }
        if bound:
            claims["cnf"] = {"x5t#S256": bound}
        return jwt.encode(claims, self._key.native, algorithm="EdDSA")

    def read(self, text: str, *, now: float) -> Ticket:
        """What a ticket says, if this server made it and it is still good; raises `Unauthenticated` otherwise."""
        if len(text) > _LONGEST:
            raise Unauthenticated(f"a ticket has at most {_LONGEST} characters; this one has {len(text)}")
        try:
            claims = jwt.decode(
                text,
                self._key.public.native,
                algorithms=["EdDSA"],
                issuer=self._server,
                options={"require": ["iss", "sub", "exp"], "verify_exp": False, "verify_iat": False},
            )
            ticket = _ticket(claims)
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError) as error:
            raise Unauthenticated("the ticket is not one of this server; begin a new session") from error
        if now > ticket.expires:
            raise Unauthenticated("the ticket has expired; begin a new session")
        return ticket


def _ticket(claims: Mapping[str, Any]) -> Ticket:
    caller = Caller(int(claims["pos"]), str(claims["sub"]), read(str(claims["scope"])))
    return Ticket(caller, float(claims["exp"]), str(claims.get("cnf", {}).get("x5t#S256", "")))
