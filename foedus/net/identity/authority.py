"""The server's own certificate authority, made on first start, and what clients come to trust by its fingerprint.

One authority belongs to one federation. It certifies three things and nothing else: the servers' TLS keys, the key
that signs tasks, orders and tokens, and the keys of clients. Its fingerprint (SHA-256 of the certificate, the one that
``openssl x509 -fingerprint -sha256`` prints) is the *pin* of the join command: whoever has the pin can check the
authority, and through it everything else, over any connection. That stays true behind a proxy that ends TLS with a
certificate of its own: orders and bundles are still signed by a key that the pinned authority vouches for.

Authority and TLS keys are P-256, which every TLS stack speaks; keys that sign are Ed25519. The authority may certify
nothing below it (path length 0), a client's certificate cannot serve as a server's (extended key usage), and
lifetimes are 10 years for the authority and the signing key, 90 days for servers and 30 for clients; all are renewed
in time without anybody's doing, but the authority.

Not here: contexts for connections (``tls.py``), who is given a client's certificate (``enrolment.py``).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from foedus.errors import NotTrusted, PinMismatch
from foedus.net.identity.files import create_once, private_folder, read_secret
from foedus.net.identity.keys import PublicKey, SigningKey
from foedus.record.files import replace

__all__ = ["Authority", "Trust", "fingerprint"]

CLIENT_DAYS = 30
SERVER_DAYS = 90
_YEARS = 3650
_SLACK = timedelta(hours=1)  # certificates are valid a little earlier, for clocks that are late

Key = ec.EllipticCurvePrivateKey


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in DER form, in hexadecimal: the pin, if it is an authority's."""
    return hashlib.sha256(certificate).hexdigest()


@dataclass(frozen=True)
class Authority:
    """A federation's certificate authority, with the key that signs for its servers.

    Example:
        >>> authority = Authority.kept(folder, now=0.0)  # doctest: +SKIP
        >>> authority.pin  # doctest: +SKIP
        'b1946ac92492d2347c6235b4d2611184...'

    Attributes:
        folder: where its files lie, all of mode 0600. Servers that share a database share a copy of it.
        certificate: the authority's own.
        signing: the key that signs bundles, orders, models and tokens.
    """

    folder: Path
    certificate: x509.Certificate
    signing: SigningKey
    _key: Key = field(repr=False)

    @classmethod
    def kept(cls, folder: Path, *, now: float) -> Authority:
        """The authority of a folder, made there on first start."""
        private_folder(folder)
        key = _ec_key(folder / "authority.key")
        path = folder / "authority.pem"
        if not path.exists():
            create_once(path, _pem(_own_certificate(key, _moment(now))))
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        if certificate.public_key() != key.public_key():
            raise NotTrusted(f"{path} and authority.key beside it do not belong together; restore both from one backup")
        return cls(folder, certificate, SigningKey.kept(folder / "signing.key"), key)

    @property
    def pin(self) -> str:
        """The fingerprint that clients pin."""
        return fingerprint(self.certificate.public_bytes(serialization.Encoding.DER))

    def document(self, *, now: float) -> bytes:
        """What anybody may fetch: the authority's certificate and the signing key's, in PEM form."""
        path = self.folder / "signing.pem"
        if not path.exists() or _key_of(path) != self.signing.public.native:
            replace(path, _pem(self._issue("signing key", self.signing.public.native, _moment(now), _YEARS, _SIGNING)))
        return _pem(self.certificate) + path.read_bytes()

    def client_certificate(self, name: str, key: PublicKey, *, now: float) -> bytes:
        """A certificate in PEM form that says whose key this is, for mutual TLS."""
        return _pem(self._issue(name, key.native, _moment(now), CLIENT_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH))

    def server_files(self, names: Iterable[str], *, now: float) -> tuple[Path, Path]:
        """Certificate chain and key of a server that is reached under these names, renewed when a third of it is left.

        Args:
            names: host names and IP addresses, as clients write them into URLs.
            now: seconds since 1970.
        """
        wanted = sorted(set(names))
        key, path = _ec_key(self.folder / "server.key"), self.folder / "server.pem"
        if not _still_good(path, wanted, key=key, moment=_moment(now)):
            leaf = self._issue(wanted[0], key.public_key(), _moment(now), SERVER_DAYS, _SERVER, names=wanted)
            replace(path, _pem(leaf) + _pem(self.certificate))
        return path, self.folder / "server.key"

    def _issue(
        self,
        subject: str,
        key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
        moment: datetime,
        days: int,
        usage: x509.ObjectIdentifier,
        *,
        names: Iterable[str] = (),
    ) -> x509.Certificate:
        """A certificate for a key, of one use."""
        alternative = [_general(name) for name in names]
        built = (
            _builder(_name(subject), self.certificate.subject, key, moment=moment, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certify=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternative:
            built = built.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        return built.sign(self._key, hashes.SHA256())


@dataclass(frozen=True)
class Trust:
    """What a client trusts once it has checked a server's document against the pin.

    Example:
        >>> trust = Trust.checked(document, pin=pin, now=0.0)  # doctest: +SKIP
        >>> trust.signing.verify(signature, "orders", run, digest)  # doctest: +SKIP

    Attributes:
        document: the authority's and the signing key's certificate, as fetched.
        pin: the authority's fingerprint.
        signing: whose signature orders, models and bundles must bear.
    """

    document: bytes = field(repr=False)
    pin: str
    signing: PublicKey

    @classmethod
    def checked(cls, document: bytes, *, pin: str | None, now: float) -> Trust:
        """Read a document that anybody may have sent.

        Args:
            document: what the server answered.
            pin: the fingerprint of the join command; None only where TLS itself has proven the server.
            now: seconds since 1970.

        Errors: `PinMismatch`, or `NotTrusted` if its parts do not belong together.
        """
        authority, signing = _two(document)
        found = fingerprint(authority.public_bytes(serialization.Encoding.DER))
        if pin is not None and found != plain_pin(pin):
            raise PinMismatch(
                f"the server shows an authority with the fingerprint {found}, and {pin} was pinned. Either the join "
                "command is of another server, or somebody is between you and it; nothing was sent. Ask whoever runs "
                "the server to read its pin to you (foedus status shows it)"
            )
        _belongs(authority, signing, _moment(now))
        key = signing.public_key()
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise NotTrusted(f"the server's signing key is {type(key).__name__}; an Ed25519 key was expected")
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return cls(document, found, PublicKey(raw))

    @property
    def authority(self) -> str:
        """The authority's certificate in PEM form, for a TLS context."""
        return _pem(_two(self.document)[0]).decode()


def plain_pin(pin: str) -> str:
    """A pin as it is compared: people may write it with colons, in capitals, or behind ``sha256:``.

    >>> plain_pin("SHA256:AB:cd")
    'abcd'
    """
    return pin.lower().removeprefix("sha256:").replace(":", "").strip()


# --- certificates -----------------------------------------------------------------------------------------------------

_SERVER = ExtendedKeyUsageOID.SERVER_AUTH
_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING


def _own_certificate(key: Key, moment: datetime) -> x509.Certificate:
    subject = _name(f"foedus authority {hashlib.sha256(_public(key)).hexdigest()[:12]}")
    return (
        _builder(subject, subject, key.public_key(), moment=moment, days=_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certify=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    *,
    moment: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - _SLACK)
        .not_valid_after(moment + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, certify: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certify,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certify,
        crl_sign=certify,
        encipher_only=False,
        decipher_only=False,
    )


def _belongs(authority: x509.Certificate, signing: x509.Certificate, moment: datetime) -> None:
    """Raise unless the authority is one, signed itself and the signing key, and both are of today."""
    try:
        authority.verify_directly_issued_by(authority)
        signing.verify_directly_issued_by(authority)
        certifies = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        uses = list(signing.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise NotTrusted(
            "the server's signing key is not vouched for by its own authority; its document was changed on its way, or "
            "its folder mixes the files of two servers"
        ) from error
    if not certifies or uses != [_SIGNING]:
        raise NotTrusted("the server's document shows certificates made for other uses than signing; nothing was sent")
    for each in (authority, signing):
        if not each.not_valid_before_utc - _SLACK <= moment <= each.not_valid_after_utc:
            raise NotTrusted(
                f"the certificate {each.subject.rfc4514_string()} is valid from {each.not_valid_before_utc:%Y-%m-%d} "
                f"to {each.not_valid_after_utc:%Y-%m-%d}, and this machine's clock says {moment:%Y-%m-%d %H:%M}: "
                "correct the clock, or the server's folder"
            )


def _two(document: bytes) -> tuple[x509.Certificate, x509.Certificate]:
    try:
        authority, signing = x509.load_pem_x509_certificates(document)
    except ValueError as error:
        raise NotTrusted(
            "the server's document is not two certificates in PEM form; is this a foedus server?"
        ) from error
    return authority, signing


def _still_good(path: Path, names: list[str], *, key: Key, moment: datetime) -> bool:
    """Whether a server's certificate is of its key, has these names, and has more than a third of its time left."""
    if not path.exists():
        return False
    found = x509.load_pem_x509_certificates(path.read_bytes())[0]
    told = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if set(told) != {_general(name) for name in names} or found.public_key() != key.public_key():
        return False
    return moment + timedelta(days=SERVER_DAYS / 3) < found.not_valid_after_utc


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_of(path: Path) -> object:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_key()


def _public(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def _ec_key(path: Path) -> Key:
    """The P-256 key in a file, made there if there is none."""
    if not path.exists():
        form = serialization.PrivateFormat.PKCS8
        made = ec.generate_private_key(ec.SECP256R1())
        create_once(path, made.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    key = serialization.load_pem_private_key(read_secret(path), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NotTrusted(f"{path} is a {type(key).__name__}; a P-256 key is needed. Restore it from a backup")
    return key


def _moment(now: float) -> datetime:
    return datetime.fromtimestamp(now, UTC)
