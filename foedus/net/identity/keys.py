"""Keys that sign: one Ed25519 key of each client, one of the server, and what exactly is signed.

Everything signed names its purpose and states the length of every part, so that a signature given for one thing
can never be shown for another: the bytes signed are ``foedus/1``, the purpose, and the parts, each behind its length.
Ed25519 is deterministic (RFC 8032): signing needs no randomness that could fail.

Verification raises. A private key never appears in a ``repr``, and leaves the process only into a file of mode 0600.

Not here: certificates (``authority.py``), what servers sign (``signed.py``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from foedus.errors import NotTrusted, SignatureInvalid
from foedus.net.identity.files import create_once, read_secret

__all__ = ["PublicKey", "SigningKey", "signed_bytes"]

_RAW = serialization.Encoding.Raw, serialization.PublicFormat.Raw


def signed_bytes(purpose: str, *parts: bytes) -> bytes:
    """What is signed for a purpose: no two different purposes or lists of parts give the same bytes.

    >>> signed_bytes("orders", b"a", b"bc") == signed_bytes("orders", b"ab", b"c")
    False
    """
    pieces = [b"foedus/1", purpose.encode(), *parts]
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in pieces)


class PublicKey:
    """The public half of a key: 32 bytes that say whose signature it is.

    Example:
        >>> key = SigningKey.generate()
        >>> key.public.verify(key.sign("greeting", b"hello"), "greeting", b"hello")
    """

    def __init__(self, raw: bytes) -> None:
        try:
            self._key = Ed25519PublicKey.from_public_bytes(raw)
        except ValueError as error:
            raise NotTrusted(f"a public key is 32 bytes of an Ed25519 point; these {len(raw)} are none") from error
        self.raw = bytes(raw)

    def verify(self, signature: bytes, purpose: str, *parts: bytes) -> None:
        """Return if the signature is of this key, for this purpose, over these parts; raise otherwise.

        Errors: `SignatureInvalid`.
        """
        try:
            self._key.verify(signature, signed_bytes(purpose, *parts))
        except InvalidSignature as error:
            raise SignatureInvalid(
                f"the signature for {purpose!r} is not of the key {self.fingerprint[:16]}… over what came with it. "
                "Somebody changed it on its way, or it was signed by another; it was not used"
            ) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 bytes, in hexadecimal."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def native(self) -> Ed25519PublicKey:
        """As pyca/cryptography has it, for certificates."""
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.fingerprint[:16]}…)"


class SigningKey:
    """A private key; its ``repr`` shows the public half only.

    Example:
        >>> len(SigningKey.generate().sign("greeting", b"hello"))
        64
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes(*_RAW))

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def of_pem(cls, pem: bytes, *, told: str = "the key") -> SigningKey:
        """Read a key from its text form.

        Errors: `NotTrusted` if it is damaged or of another kind.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise NotTrusted(f"{told} is not a private key in PEM form; restore it from a copy") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise NotTrusted(f"{told} is a {type(key).__name__}; an Ed25519 key is needed")
        return cls(key)

    @classmethod
    def kept(cls, path: Path) -> SigningKey:
        """The key in a file, made there if there is none."""
        if not path.exists():
            create_once(path, cls.generate().pem())
        return cls.of_pem(read_secret(path), told=str(path))

    def pem(self) -> bytes:
        """The secret itself, for a file of mode 0600 and nothing else."""
        form = serialization.PrivateFormat.PKCS8
        return self._key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    def sign(self, purpose: str, *parts: bytes) -> bytes:
        """A signature of 64 bytes over parts, for one purpose."""
        return self._key.sign(signed_bytes(purpose, *parts))

    @property
    def native(self) -> Ed25519PrivateKey:
        """As pyca/cryptography has it, for certificates and tokens."""
        return self._key

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public!r})"

    def __reduce__(self) -> tuple[object, ...]:
        raise NotTrusted("a private key does not travel between processes; write it to a file of mode 0600")
