"""What a client keeps of a server it has joined, in one folder: key, certificate, what it trusts, who it is.

| file | what | mode |
|---|---|---|
| ``key.pem`` | the client's own key, made here; it never leaves | 0600 |
| ``certificate.pem`` | the server's word on that key, for mutual TLS; renewed by itself | 0600 |
| ``server.pem`` | the server's authority and signing key, checked against the pin | 0600 |
| ``joined.json`` | the server's address and pin, the client's name and position | 0600 |
| ``servers`` | where other servers of the same federation are, as the last one said | 0600 |

Not here: asking for any of it (``visits.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509

from foedus.errors import NotTrusted
from foedus.net.identity.authority import Trust
from foedus.net.identity.files import private_folder, read_secret, write_secret
from foedus.net.identity.keys import SigningKey
from foedus.net.identity.sessions import Proof

__all__ = ["Credentials"]

_RENEW_S = 10 * 86400.0  # a certificate is renewed when it is good for less than this


@dataclass(frozen=True)
class Credentials:
    """One client's identity towards one server.

    Example:
        >>> credentials = Credentials.read(folder, now=0.0)  # doctest: +SKIP
        >>> credentials.name, credentials.position  # doctest: +SKIP
        ('clinic', 0)

    Attributes:
        folder: where they lie.
        url: the server's address.
        trust: what the pin led to.
        key: the client's own.
        name: as the server knows it; empty before it has joined.
        position: as the server counts it; −1 before.
    """

    folder: Path
    url: str
    trust: Trust
    key: SigningKey = field(repr=False)
    name: str = ""
    position: int = -1

    @classmethod
    def begun(cls, folder: Path, *, url: str, trust: Trust) -> Credentials:
        """Credentials before joining: a key, made in the folder if there is none, and what is trusted."""
        private_folder(folder)
        return cls(folder, url, trust, SigningKey.kept(folder / "key.pem"))

    @classmethod
    def read(cls, folder: Path, *, now: float) -> Credentials:
        """Those of a folder in which a client has joined.

        Errors: `FileNotFoundError` if none has; `NotTrusted` if the files are damaged or open to others.
        """
        path = folder / "joined.json"
        try:
            told = json.loads(read_secret(path))
            url, pin, name, position = str(told["url"]), str(told["pin"]), str(told["name"]), int(told["position"])
        except (ValueError, KeyError, TypeError) as error:
            raise NotTrusted(f"{path} is damaged; restore it from a copy, or join again with a new token") from error
        trust = Trust.checked(read_secret(folder / "server.pem"), pin=pin, now=now)
        return cls(folder, url, trust, SigningKey.kept(folder / "key.pem"), name, position)

    def servers(self) -> tuple[str, ...]:
        """Where other servers of the federation were said to be; what is there is proven by the pin."""
        path = self.folder / "servers"
        return tuple(read_secret(path).decode(errors="replace").split()) if path.exists() else ()

    def keep_servers(self, addresses: tuple[str, ...]) -> None:
        """Remember where other servers are, for when this one is gone."""
        write_secret(self.folder / "servers", "\n".join(addresses).encode())

    def joined(self, *, name: str, position: int, certificate: bytes) -> Credentials:
        """Keep the server's answer; what was written last makes it whole."""
        if certificate:
            self.renewed(certificate)
        write_secret(self.folder / "server.pem", self.trust.document)
        told = {"url": self.url, "pin": self.trust.pin, "name": name, "position": position}
        write_secret(self.folder / "joined.json", json.dumps(told, indent=1).encode())
        return replace(self, name=name, position=position)

    def renewed(self, certificate: bytes) -> None:
        """Keep a certificate, if it is of this client's key; raises `NotTrusted` otherwise."""
        try:
            found = x509.load_pem_x509_certificate(certificate).public_key()
        except ValueError as error:
            raise NotTrusted("the server answered with something that is no certificate") from error
        if found != self.key.public.native:
            raise NotTrusted("the server answered with a certificate of another key; it was not kept")
        write_secret(self.folder / "certificate.pem", certificate)

    def files(self, *, now: float) -> tuple[Path, Path] | None:
        """Certificate and key for mutual TLS; None if there is no certificate or it has run out."""
        return None if self._left_s(now) <= 0 else (self.folder / "certificate.pem", self.folder / "key.pem")

    def due(self, *, now: float) -> bool:
        """Whether the certificate should be renewed; never for a device, which has none."""
        return (self.folder / "certificate.pem").exists() and self._left_s(now) < _RENEW_S

    def proof(self, purpose: str, *, challenge: bytes, channel: str) -> Proof:
        """A proof of this client's key; see `Proof`."""
        return Proof.signed(
            self.key, purpose, server=self.trust.pin, name=self.name, challenge=challenge, channel=channel
        )

    def _left_s(self, now: float) -> float:
        path = self.folder / "certificate.pem"
        if not path.exists():
            return 0.0
        return x509.load_pem_x509_certificate(read_secret(path)).not_valid_after_utc.timestamp() - now
