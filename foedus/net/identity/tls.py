"""TLS contexts: version 1.3 and nothing older, the pinned authority and nobody else.

A client that has a pin trusts that one authority, not the hundred of its operating system. Where a proxy ends TLS
with a certificate of its own (a reverse proxy before the server, an inspecting proxy before the client), it is told so:
``system`` adds the operating system's authorities, ``authorities`` a file of an organisation's own. Even then tasks and
orders are checked against the pin (``authority.py``). Proxies named by ``HTTPS_PROXY`` are used by the HTTP client.

A server asks for a client's certificate without insisting on it: devices and first visitors have none. Who must show
one is decided where requests are let in (``access.py``).

Plain HTTP is refused but on loopback, and there only when asked for by name.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from foedus.errors import ConfigurationError
from foedus.net.identity.authority import Authority, Trust, fingerprint

__all__ = ["Outward", "client_context", "first_visit", "permitted", "renewed", "server_context", "shown"]


@dataclass(frozen=True)
class Outward:
    """How a client reaches a server beyond the plain way.

    Example:
        >>> Outward(authorities=Path("/etc/ssl/hospital.pem")).system
        False

    Attributes:
        system: trust the operating system's authorities for TLS, too: before the server stands a reverse proxy with a
            public certificate.
        authorities: a file in PEM form of more authorities to trust for TLS: an organisation's proxy that inspects.
        insecure_loopback: let plain HTTP through to 127.0.0.1, ::1 or localhost, for trying things out.
    """

    system: bool = False
    authorities: Path | None = None
    insecure_loopback: bool = False


DIRECT = Outward()


def server_context(authority: Authority, names: list[str], *, now: float) -> ssl.SSLContext:
    """The context of a server that is reached under these names; asks clients for certificates.

    Args:
        authority: the federation's own.
        names: host names and addresses, as clients write them into URLs.
        now: seconds since 1970.
    """
    chain, key = authority.server_files(names, now=now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(chain, key)
    context.load_verify_locations(cadata=(authority.folder / "authority.pem").read_text())
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["http/1.1"])
    return context


def renewed(context: ssl.SSLContext, authority: Authority, names: list[str], *, now: float) -> str:
    """Load the server's certificate anew, once it is time; the digest of the one that new connections see.

    Call it once a day: certificates last 90 days, and this renews them when 30 are left. Connections that are open
    keep the old one.
    """
    context.load_cert_chain(*authority.server_files(names, now=now))
    return shown(authority)


def shown(authority: Authority) -> str:
    """SHA-256 of the certificate that the server shows: the channel that clients' proofs name (``sessions.py``)."""
    return fingerprint(ssl.PEM_cert_to_DER_cert(_first((authority.folder / "server.pem").read_text())))


def _first(chain: str) -> str:
    return chain[: chain.index("-----END CERTIFICATE-----")] + "-----END CERTIFICATE-----\n"


def client_context(
    trust: Trust, outward: Outward = DIRECT, *, files: tuple[Path, Path] | None = None
) -> ssl.SSLContext:
    """The context of a client that has checked the pin.

    Args:
        trust: what the pin led to.
        outward: proxies and authorities beyond it.
        files: the client's own certificate and key, if it has been given one.
    """
    context = _strict()
    context.load_verify_locations(cadata=trust.authority)
    _more(context, outward)
    if files is not None:
        context.load_cert_chain(*files)
    return context


def first_visit(pin: str | None, outward: Outward = DIRECT) -> ssl.SSLContext:
    """The context to fetch a server's document with, before anything about it is known.

    With a pin the connection proves nothing and need not: the document is public, and is checked against the pin
    before another byte is sent. Without one, TLS must prove the server by the authorities of the operating system.
    """
    context = _strict()
    if pin is None:
        context.load_default_certs()
        _more(context, outward)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def permitted(url: str, outward: Outward = DIRECT) -> str:
    """The URL without a slash at its end, if it may be used.

    Errors: `ConfigurationError` for what is no address, for plain HTTP beyond loopback, or on it without being asked
    for.

    >>> permitted("https://hospital.example:8765/")
    'https://hospital.example:8765'
    """
    try:
        parts = urlsplit(url)
        sound = parts.port is None or parts.port > 0
    except ValueError:  # no number, or none that a port can have; brackets that do not close
        sound = False
    if not sound or any(not c.isprintable() or c.isspace() for c in url):
        raise ConfigurationError(f"{url!r} is not the address of a server; write https://HOST:PORT")
    if parts.scheme == "https" and parts.hostname:
        return url.rstrip("/")
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigurationError(f"{url!r} is not the address of a server; write https://HOST:PORT")
    if not is_loopback(parts.hostname):
        raise ConfigurationError(
            f"{url} is plain HTTP to another machine: whoever is between could read and change everything. "
            f"Write https://{parts.netloc}"
        )
    if not outward.insecure_loopback:
        raise ConfigurationError(
            f"{url} is plain HTTP. On this machine itself it can be allowed, for trying things out: write "
            "--insecure-loopback, or Outward(insecure_loopback=True)"
        )
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _strict() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _more(context: ssl.SSLContext, outward: Outward) -> None:
    if outward.system:
        context.load_default_certs()
    if outward.authorities is not None:
        try:
            context.load_verify_locations(cafile=outward.authorities)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"{outward.authorities} is not a file of certificates in PEM form: {error}"
            ) from error
