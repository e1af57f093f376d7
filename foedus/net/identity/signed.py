"""What a server signs and a client checks: source bundles, orders of a round, models.

A signature names what it is for, the run, the round and the digest, so that yesterday's model cannot be shown as
today's, nor one run's as another's. The digest is of the bytes as they travel; whoever has checked it may read them.

Not here: keys (``keys.py``); what a bundle holds (``net/bundle.py``).
"""

from __future__ import annotations

import hashlib
import hmac

from foedus.errors import SignatureInvalid
from foedus.net.identity.keys import PublicKey, SigningKey

__all__ = ["check_blob", "sign_blob"]


def sign_blob(key: SigningKey, what: str, *, run: str, round: int, digest: bytes) -> bytes:
    """A server's signature over bytes of a digest.

    Args:
        key: the server's.
        what: ``orders``, ``model`` or ``bundle``.
        run: the run's name.
        round: counted from 1; 0 for what is of no round.
        digest: SHA-256 of the bytes.
    """
    return key.sign(what, run.encode(), round.to_bytes(8, "big"), digest)


def check_blob(
    key: PublicKey, what: str, content: bytes | memoryview, *, signature: bytes, run: str, round: int, digest: bytes
) -> None:
    """Return if the content is what the server signed; raise `SignatureInvalid` otherwise.

    Args:
        key: the server's, as the pinned authority vouches for it.
        what: as it was signed.
        content: the bytes, as they came.
        signature: the server's.
        run, round: where the client believes it is.
        digest: SHA-256 that was told.

    Example:
        >>> key = SigningKey.generate()
        >>> digest = hashlib.sha256(b"weights").digest()
        >>> signature = sign_blob(key, "orders", run="heart", round=3, digest=digest)
        >>> check_blob(key.public, "orders", b"weights", signature=signature, run="heart", round=3, digest=digest)
        >>> check_blob(key.public, "orders", b"weights", signature=signature, run="heart", round=4, digest=digest)
        Traceback (most recent call last):
        foedus.errors.SignatureInvalid: the signature for 'orders' is not of the key ...
    """
    found = hashlib.sha256(content).digest()
    if not hmac.compare_digest(found, digest):
        raise SignatureInvalid(
            f"the {what} of run {run!r}, round {round}, have the digest {found.hex()[:16]}… and {digest.hex()[:16]}… "
            "was told: bytes were lost or changed on their way; nothing was used, and they are fetched again"
        )
    key.verify(signature, what, run.encode(), round.to_bytes(8, "big"), digest)
