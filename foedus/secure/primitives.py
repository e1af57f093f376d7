"""The cryptography that secure aggregation rests on, all of it from pyca/cryptography: nothing here is our own.

Key agreement by X25519 (RFC 7748), keys from it by HKDF-SHA256 (RFC 5869), masks as the keystream of AES-256 in counter
mode (``core/keystream.py``), sealed shares by AES-256-GCM (NIST SP 800-38D), signatures by Ed25519 (RFC 8032).

Every derived key is for one purpose: its ``context`` names session, round, attempt, sender and receiver
(``foedus.protocol.secagg``). A key seals one message or makes one keystream, never two, so that nonce and counter
may start at zero. No randomness is drawn here: who calls brings it.

Not here: sharing secrets (``secure/sharing.py``), what is agreed with whom (``foedus.protocol.secagg``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.keystream import CHUNK, ZEROS, stream
from foedus.errors import ForgedMessage, MissingExtra

KEY = 32  # bytes of every key, public or private, and of every seed
TAG = 16  # bytes by which a sealed message is longer
SIGNATURE = 64  # bytes


class _Library(NamedTuple):
    """What is used of pyca/cryptography."""

    x25519: Any
    ed25519: Any
    hkdf: Any
    sha256: Any
    gcm: Any
    bad_signature: type[Exception]
    bad_tag: type[Exception]


@lru_cache(maxsize=1)
def _library() -> _Library:
    """Imported on first use."""
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise MissingExtra("cryptography", "secure", "secure aggregation") from None
    wrong = exceptions.InvalidSignature, exceptions.InvalidTag
    return _Library(x25519, ed25519, HKDF, hashes.SHA256(), AESGCM, *wrong)


# --- keys ---------------------------------------------------------------------------------------------------


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes.

    Example:
        >>> public_key(bytes(range(32))).hex()[:16]
        '8f40c5adb68f2562'
    """
    key: bytes = _library().x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return key


class Agreement:
    """One's own half of key agreements: parsed once, used with every neighbour.

    Example:
        >>> one, other = bytes(range(32)), bytes(range(32, 64))
        >>> Agreement(one).secret(public_key(other)) == Agreement(other).secret(public_key(one))
        True
    """

    def __init__(self, private: bytes) -> None:
        self._own = _library().x25519.X25519PrivateKey.from_private_bytes(private)

    def secret(self, public: bytes) -> bytes:
        """What both ends know; to be put into :func:`derived`, once for every purpose.

        Raises:
            ForgedMessage: the public key is one of the few with which every secret is the same.
        """
        try:
            shared: bytes = self._own.exchange(_library().x25519.X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise ForgedMessage(
                "a public key is none that a client makes: nothing secret can be agreed by it"
            ) from None
        return shared

    def __repr__(self) -> str:
        return "Agreement(<secret>)"


def check_public(public: bytes) -> None:
    """Refuse a public key of low order, with which every secret is the same, without agreeing anything.

    Raises:
        ForgedMessage: it is one.

    Example:
        >>> check_public(public_key(bytes(range(32))))
    """
    if int.from_bytes(public, "little") % 2**255 in _LOW_ORDER:
        raise ForgedMessage("a public key is none that a client makes: nothing secret can be agreed by it")


_FIELD = 2**255 - 19
# The points of order 1, 2, 4 and 8 of Curve25519 and its twist, by their first coordinate, and the same above the field
# (Bernstein, "Curve25519: new Diffie-Hellman speed records", section 3).
_LOW_ORDER = frozenset({
    0, 1, _FIELD - 1, _FIELD, _FIELD + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
})  # fmt: skip


def derived(secret: bytes, context: bytes) -> bytes:
    """32 bytes for one purpose from a secret, by HKDF-SHA256.

    Example:
        >>> derived(bytes(32), b"one") == derived(bytes(32), b"another")
        False
    """
    key: bytes = _library().hkdf(_library().sha256, KEY, None, context).derive(secret)
    return key


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts, each with its length before it, so that no two rows of parts look alike.

    Example:
        >>> digest(b"ab", b"c") == digest(b"a", b"bc")
        False
    """
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


# --- masks --------------------------------------------------------------------------------------------------


def add_mask(totals: Sequence[NDArray[Any]], key: bytes, *, negative: bool = False) -> None:
    """Add the mask of a key to unsigned integers, in place, or take it off; they wrap around.

    The mask is the key's keystream, read on from array to array as little-endian integers of the width of each.

    Args:
        totals: uint16, uint32 or uint64 [n] each.
        key: 32 bytes, used for nothing else.
        negative: take it off instead.

    Example:
        >>> words = np.array([5, 6], np.uint32)
        >>> add_mask([words], bytes(32))
        >>> add_mask([words], bytes(32), negative=True)
        >>> words.tolist()
        [5, 6]
    """
    made, buffer = stream(key), bytearray(CHUNK + 16)  # the library asks for a block more
    place = memoryview(buffer)
    add = np.subtract if negative else np.add
    for total in totals:
        width = total.dtype.itemsize
        mask, each = np.frombuffer(buffer, total.dtype.newbyteorder("<"), CHUNK // width), CHUNK // width
        for at in range(0, len(total), each):
            part = total[at : at + each]
            made.update_into(ZEROS[: len(part) * width], place)
            add(part, mask[: len(part)], out=part)


# --- sealed messages ----------------------------------------------------------------------------------------


def sealed(key: bytes, message: bytes, context: bytes) -> bytes:
    """A message that only who has the key can read, and nobody change: 16 bytes longer. One message a key.

    Example:
        >>> opened(bytes(32), sealed(bytes(32), b"share", b"from 1 to 2"), b"from 1 to 2")
        b'share'
    """
    found: bytes = _library().gcm(key).encrypt(bytes(12), message, context)
    return found


def opened(key: bytes, message: bytes, context: bytes) -> bytes:
    """The inverse of :func:`sealed`.

    Raises:
        ForgedMessage: it was sealed with another key or for another context, or was changed.
    """
    try:
        found: bytes = _library().gcm(key).decrypt(bytes(12), message, context)
    except _library().bad_tag:
        raise ForgedMessage(
            "a sealed share does not open: it was changed, or sealed for another session, round, attempt or client"
        ) from None
    return found


# --- signatures ---------------------------------------------------------------------------------------------


def identity_key(private: bytes) -> bytes:
    """The Ed25519 public key of 32 secret bytes.

    Example:
        >>> len(identity_key(bytes(32)))
        32
    """
    key: bytes = _library().ed25519.Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return key


def signed(private: bytes, message: bytes) -> bytes:
    """The Ed25519 signature, 64 bytes.

    Example:
        >>> check_signature(identity_key(bytes(32)), signed(bytes(32), b"set"), b"set")
    """
    found: bytes = _library().ed25519.Ed25519PrivateKey.from_private_bytes(private).sign(message)
    return found


def check_signature(public: bytes, signature: bytes, message: bytes) -> None:
    """Refuse a signature that is not the one of a public key for a message.

    Raises:
        ForgedMessage: it is not.
    """
    try:
        _library().ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (_library().bad_signature, ValueError):
        raise ForgedMessage("a signature is not that of the key which it is said to be by, for this message") from None
