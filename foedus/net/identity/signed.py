"""What a server signs and a client checks before it reads a byte: what it is accepted for, and the final model.

One signature covers everything that decides what a client will run and send: run, round and attempt, its own key and
position, the digests of orders, bundle and plan, the object in the bundle, and what the server promises about the sum.
So yesterday's model cannot be shown as today's, nor one run's as another's, nor can somebody who ends TLS in between
take a protection away or put other code in.

Blobs are then checked against the digests (`check_content`), which are those of the bytes as they travel.

Not here: keys (``keys.py``); what a bundle holds (``net/bundle.py``); the agent's own rules, which come on top.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from typing import TypeVar

from foedus.errors import SignatureInvalid
from foedus.net.identity.keys import PublicKey, SigningKey
from foedus.protocol.messages import Accepted, Blob, Finished

__all__ = ["check", "check_content", "sign"]

Signed = TypeVar("Signed", Accepted, Finished)


def sign(key: SigningKey, message: Signed) -> Signed:
    """The same message with the server's signature.

    Example:
        >>> key = SigningKey.generate()
        >>> told = sign(key, Finished(run="heart", model=None, rounds=3))
        >>> check(key.public, told)
        >>> check(key.public, replace(told, rounds=4))
        Traceback (most recent call last):
        foedus.errors.SignatureInvalid: the signature for 'finished' is not of the key ...
    """
    purpose, parts = _told(message)
    return replace(message, signature=key.sign(purpose, *parts))


def check(key: PublicKey, message: Accepted | Finished) -> None:
    """Return if the pinned server signed what this message says; raise `SignatureInvalid` otherwise."""
    purpose, parts = _told(message)
    key.verify(message.signature, purpose, *parts)


def check_content(blob: Blob, content: bytes | memoryview) -> None:
    """Return if bytes are those that a signed message named; raise `SignatureInvalid` otherwise."""
    if len(content) != blob.size or not hmac.compare_digest(hashlib.sha256(content).digest(), blob.digest):
        raise SignatureInvalid(
            f"{len(content)} bytes came where {blob.size} of the digest {blob.digest.hex()[:16]}… were signed for: "
            "they were cut or changed on their way; nothing of them was used"
        )


def _told(message: Accepted | Finished) -> tuple[str, tuple[bytes, ...]]:
    """Purpose and parts, in an order that never changes; texts and numbers as text."""
    if isinstance(message, Finished):
        return "finished", _parts(
            message.run, message.rounds, message.personal, message.target, message.seed, message.position,
            _digest(message.model), _digest(message.bundle),
        )  # fmt: skip
    return "accepted", _parts(
        message.run, message.round, message.attempt, message.kind, message.key, message.position, message.seed,
        message.limit, message.minimum, message.target, _digest(message.orders), _digest(message.bundle),
        _digest(message.plan), message.held or b"", *sorted(message.protections),
    )  # fmt: skip


def _parts(*values: object) -> tuple[bytes, ...]:
    return tuple(v if isinstance(v, bytes) else str(v).encode() for v in values)


def _digest(blob: Blob | None) -> bytes:
    return b"" if blob is None else blob.digest + blob.size.to_bytes(8, "big")
