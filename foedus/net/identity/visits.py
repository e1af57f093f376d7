"""A client at the door, over HTTP: see the server's document, join once, prove oneself at each session.

`discover` fetches what the server is and checks it against the pin before another byte is sent. `enrol` shows the join
token. `Visit` is the authentication of an ``httpx.AsyncClient``: it asks for a ticket when there is none, sends it with
every request, and begins a new session when the server no longer takes it. Proxies named by ``HTTPS_PROXY`` and
``NO_PROXY`` are used as usual.

Not here: what a ticket is (``sessions.py``); the agent's other requests.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from foedus.errors import Code, NotTrusted, ProtocolError, TooFast, Unreachable
from foedus.net.identity.authority import Trust
from foedus.net.identity.callers import checked_name, token_digest
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.sessions import Proof
from foedus.net.identity.tls import DIRECT, Outward, client_context, first_visit, permitted

__all__ = ["Visit", "client", "discover", "enrol", "renew"]

LARGEST = 65536  # bytes of an answer at the door
PATIENCE = 60.0  # seconds without a byte after which a connection is given up
AT_DOOR = 30.0  # the same, before there is a session
IN_ALL = 180.0  # seconds after which a talk at the door is given up, however it drips
NOT_HERE = (502, 503, 504)  # what a proxy answers when the server behind it does not
Clock = Callable[[], float]


async def discover(url: str, *, pin: str | None, outward: Outward = DIRECT, now: float) -> Trust:
    """What a server is, checked against the pin of the join command.

    Args:
        url: the server's address.
        pin: its authority's fingerprint; None if TLS is to prove it by the operating system's authorities.
        outward: proxies and authorities beyond the plain way.
        now: seconds since 1970.

    Errors: `Unreachable`; `NotTrusted`.
    """
    address = permitted(url, outward)
    async with (
        _reaching(address),
        httpx.AsyncClient(verify=first_visit(pin, outward), timeout=AT_DOOR) as client,
        client.stream("GET", f"{address}/v1/authority") as response,
    ):
        document = await _short(response)
    if response.status_code != 200:
        raise NotTrusted(f"{address} answered {response.status_code} where a foedus server shows what it is")
    return Trust.checked(document, pin=pin, now=now)


async def enrol(
    url: str,
    *,
    folder: Path,
    pin: str | None,
    token: str,
    name: str,
    outward: Outward = DIRECT,
    now: float,
) -> Credentials:
    """Join a server: show the token and a key made in the folder, and keep what comes back.

    Asking again after a lost answer is safe: the server knows the key.

    Args:
        url: the server's address.
        folder: where the client's credentials are to lie.
        pin: the authority's fingerprint, from the join command.
        token: the join token, from the join command.
        name: what the client wants to be called.
        outward: proxies and authorities beyond the plain way.
        now: seconds since 1970.
    """
    trust = await discover(url, pin=pin, outward=outward, now=now)
    mine = Credentials.begun(folder, url=permitted(url, outward), trust=trust)
    signature = mine.key.sign("enrol", trust.pin.encode(), token_digest(token), checked_name(name).encode())
    asked = {"token": token, "name": name, "key": _text(mine.key.public.raw), "signature": _text(signature)}
    async with (
        _reaching(mine.url),
        httpx.AsyncClient(verify=client_context(trust, outward), timeout=AT_DOOR) as client,
        client.stream("POST", f"{mine.url}/v1/enrol", json=asked) as response,
    ):
        answer = await _answer(response)
    try:
        told, position, certificate = str(answer["name"]), int(answer["position"]), str(answer["certificate"])
    except (KeyError, TypeError, ValueError) as error:
        raise NotTrusted(f"{mine.url} answered something else than an enrolment") from error
    return mine.joined(name=told, position=position, certificate=certificate.encode())


def client(credentials: Credentials, *, outward: Outward = DIRECT, clock: Clock) -> httpx.AsyncClient:
    """An HTTP client that is this client: mutual TLS if it has a certificate, a ticket with every request.

    Args:
        credentials: of the server it has joined.
        outward: proxies and authorities beyond the plain way.
        clock: seconds since 1970.
    """
    context = client_context(credentials.trust, outward, files=credentials.files(now=clock()))
    return httpx.AsyncClient(
        base_url=permitted(credentials.url, outward), verify=context, auth=Visit(credentials, clock=clock),
        timeout=PATIENCE,
    )  # fmt: skip


async def renew(credentials: Credentials, *, outward: Outward = DIRECT, clock: Clock) -> None:
    """Have a silo's certificate renewed, if it is time; works with one that has run out, too.

    Args:
        credentials: of the server it has joined.
        outward: proxies and authorities beyond the plain way.
        clock: seconds since 1970.
    """
    if not credentials.due(now=clock()):
        return
    async with (
        _reaching(credentials.url),
        httpx.AsyncClient(verify=client_context(credentials.trust, outward), timeout=AT_DOOR) as client,
    ):
        async with client.stream("POST", f"{credentials.url}/v1/challenge") as given:
            challenge = _bytes((await _answer(given)).get("challenge"))
            proof = credentials.proof("certificate", challenge=challenge, channel=_channel(given))
        async with client.stream("POST", f"{credentials.url}/v1/certificate", json=_written(proof)) as made:
            answer = await _answer(made)
    credentials.renewed(str(answer.get("certificate", "")).encode())


class Visit(httpx.Auth):
    """Tickets for an HTTP client: asked for when needed, renewed before they expire or when the server says so.

    Args:
        credentials: whose visit it is.
        clock: seconds since 1970.
    """

    def __init__(self, credentials: Credentials, *, clock: Clock) -> None:
        self._mine, self._clock = credentials, clock
        self._ticket, self._until = "", float("-inf")
        self._alone = asyncio.Lock()

    @property
    def ticket(self) -> str:
        """The present ticket, for what is not an HTTP request (the doorbell); empty before the first request."""
        return self._ticket

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """As httpx has it: the request, and before it what is needed.

        Limits of time are a request's own: one that is made here has none but those that it is given.
        """
        limits = {"timeout": request.extensions["timeout"]}
        for last in (False, True):
            async with self._alone:
                if self._clock() > self._until:
                    challenge = yield httpx.Request("POST", self._at(request, "challenge"), extensions=limits)
                    proof = self._proof(await _answer(challenge), _channel(challenge))
                    opened = yield httpx.Request("POST", self._at(request, "session"), json=proof, extensions=limits)
                    self._keep(await _answer(opened))
            shown = self._ticket
            request.headers["Authorization"] = f"Bearer {shown}"
            response = yield request
            if response.status_code != 401:
                return
            if shown == self._ticket:  # nobody has a newer one yet
                self._until = float("-inf")
            if last or not isinstance(request.stream, httpx.ByteStream):  # a body that was streamed is gone
                return

    def _at(self, request: httpx.Request, what: str) -> httpx.URL:
        """At the server that is asked, which may be another than the one that was joined."""
        return request.url.join(f"{urlsplit(self._mine.url).path.rstrip('/')}/v1/{what}")

    def _proof(self, answer: dict[str, Any], channel: str) -> dict[str, str]:
        return _written(self._mine.proof("session", challenge=_bytes(answer.get("challenge")), channel=channel))

    def _keep(self, answer: dict[str, Any]) -> None:
        try:
            self._ticket = str(answer["ticket"])
            self._until = self._clock() + 0.8 * float(answer["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise NotTrusted("the server answered something else than a ticket") from error


@asynccontextmanager
async def _reaching(url: str) -> AsyncIterator[None]:
    """What httpx and OpenSSL say where there is no server, or another one, in words that say what to do."""
    try:
        async with asyncio.timeout(IN_ALL):
            yield
    except (httpx.TransportError, ssl.SSLError, TimeoutError) as error:
        if _unproven(error):
            raise NotTrusted(
                f"the certificate that {url} shows is vouched for by nobody trusted here ({error}). Give the pin "
                "of the join command (--pin, or Joining(pin=...)), or the authority that vouches for it (--authorities)"
            ) from error
        why = str(error) or type(error).__name__
        raise Unreachable(
            f"{url} cannot be reached ({why}). Is it the address of the join command, is the server running, and may "
            "this machine call it (proxy, firewall)? Nothing is lost; start it again"
        ) from error


def _unproven(error: BaseException | None) -> bool:
    """Whether a failure comes from a certificate that could not be checked."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _written(proof: Proof) -> dict[str, str]:
    return {
        "name": proof.name,
        "challenge": _text(proof.challenge),
        "channel": proof.channel,
        "signature": _text(proof.signature),
    }


def _channel(response: httpx.Response) -> str:
    """The digest of the certificate that the server showed on this connection; empty on plain HTTP."""
    stream = response.extensions.get("network_stream")
    tls = None if stream is None else stream.get_extra_info("ssl_object")
    shown = None if tls is None else tls.getpeercert(binary_form=True)
    return "" if shown is None else hashlib.sha256(shown).hexdigest()


async def _answer(response: httpx.Response) -> dict[str, Any]:
    """What the door answered, or the error that it names."""
    body = await _short(response)
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise NotTrusted(f"{response.url} answered {response.status_code} and no JSON; is it a foedus server?")
    if response.status_code == 200:
        return told
    said = str(told.get("told", f"the server answered {response.status_code}"))[:2000]
    if response.status_code == 429:
        raise TooFast(said, after_s=float(response.headers.get("Retry-After", "1")))
    raise ProtocolError.of(Code(str(told.get("code"))), said)


async def _short(response: httpx.Response) -> bytes:
    """An answer's body, which must say that it is short before it is read, and must not be compressed."""
    if response.status_code in NOT_HERE:
        raise Unreachable(f"whatever is before {response.url} answered {response.status_code}: the server is not there")
    length, coding = response.headers.get("content-length", ""), response.headers.get("content-encoding", "identity")
    if not length.isdecimal() or int(length) > LARGEST or coding != "identity":
        raise NotTrusted(
            f"{response.url} answers {length or 'an unknown number of'} bytes ({coding}) where a plain answer of at "
            f"most {LARGEST} belongs; is it a foedus server?"
        )
    return await response.aread()


def _bytes(text: object) -> bytes:
    try:
        return base64.b64decode(str(text) + "=" * (-len(str(text)) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotTrusted("the server answered bytes that are not base64url") from error


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
