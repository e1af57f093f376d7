"""The whole way in, over real TLS on loopback: joining, sessions, certificates, and everybody who must stay outside."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from foedus.errors import (
    ConfigurationError,
    EnrolmentRefused,
    NotTrusted,
    PinMismatch,
    TooFast,
    Unauthenticated,
    Unreachable,
)
from foedus.net.identity import tls, visits
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.keys import SigningKey
from foedus.net.identity.limits import Rate
from foedus.net.identity.tls import Outward, client_context
from foedus.net.join import Joining, _joined_before

sys.path.insert(0, str(Path(__file__).parents[1]))
from doors import Door, opened, running

LOOPBACK = Outward(insecure_loopback=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with opened(tmp_path_factory.mktemp("server")) as door:
        yield door


def run(work: Awaitable[Any]) -> Any:
    async def now() -> Any:
        return await work

    return asyncio.run(now())


def joined(served: Door, folder: Path, name: str, *, silo: bool = True, outward: Outward = tls.DIRECT) -> Credentials:
    token = served.access.invite(now=served.clock(), silo=silo)
    return run(
        visits.enrol(
            served.url,
            folder=folder,
            pin=served.authority.pin,
            token=token,
            name=name,
            outward=outward,
            now=served.clock(),
        )
    )


async def ask(mine: Credentials, served: Door, method: str = "GET", **how: Any) -> httpx.Response:
    async with visits.client(mine, clock=served.clock, outward=LOOPBACK) as client:
        return await client.request(method, "/who", **how)


def test_a_client_joins_once_and_comes_back_after_a_restart(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "clinic")
    assert run(ask(mine, served)).json()["name"] == "clinic"
    again = Credentials.read(tmp_path, now=served.clock())
    assert (again.name, again.position, again.trust.pin) == ("clinic", mine.position, served.authority.pin)
    assert run(ask(again, served)).json() == {"name": "clinic", "position": mine.position, "size": 0}


def test_a_device_needs_no_certificate(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "phone", silo=False)
    assert mine.files(now=served.clock()) is None
    assert run(ask(mine, served)).json()["name"] == "phone"


# --- the server is the one that was pinned ----------------------------------------------------------------------


def test_another_server_is_found_out_before_a_byte_is_sent(served: Door, tmp_path: Path) -> None:
    """Somebody in between who has an authority of their own; the token is never sent."""
    with opened(tmp_path / "thief") as thief:
        with pytest.raises(PinMismatch, match="somebody is between you and it; nothing was sent"):
            run(
                visits.enrol(
                    thief.url,
                    folder=tmp_path / "mine",
                    pin=served.authority.pin,
                    token="secret",
                    name="a",
                    now=served.clock(),
                )
            )
        mine = joined(served, tmp_path / "mine", "careful")
        moved = Credentials(mine.folder, thief.url, mine.trust, mine.key, mine.name, mine.position)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            run(ask(moved, served))


def test_a_server_of_the_operating_systems_authorities_only_is_not_trusted_without_being_told(served: Door) -> None:
    with pytest.raises(NotTrusted, match=r"CERTIFICATE_VERIFY_FAILED.*--pin"):
        run(visits.discover(served.url, pin=None, now=served.clock()))


def test_where_no_server_is_the_address_is_told(served: Door, tmp_path: Path) -> None:
    nobody = "https://127.0.0.1:9"
    with pytest.raises(Unreachable, match=f"{nobody} cannot be reached .*is the server running"):
        run(visits.discover(nobody, pin=served.authority.pin, now=served.clock()))


def test_who_has_joined_needs_neither_pin_nor_server_to_be_known(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "again")
    found = _joined_before(mine.folder, Joining())
    assert found is not None
    assert (found.name, found.trust.pin) == ("again", served.authority.pin)
    with pytest.raises(NotTrusted, match="has joined the server with the pin"):
        _joined_before(mine.folder, Joining(pin="0" * 64))
    assert _joined_before(tmp_path / "elsewhere", Joining()) is None


def test_an_organisations_own_authority_is_honoured(served: Door) -> None:
    outward = Outward(authorities=served.authority.folder / "authority.pem")
    found = run(visits.discover(served.url, pin=None, outward=outward, now=served.clock()))
    assert found.pin == served.authority.pin
    with pytest.raises(ConfigurationError, match="not a file of certificates"):
        client_context(found, Outward(authorities=Path(__file__)))


def test_the_name_in_the_address_must_be_one_of_the_servers(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "named")
    port = served.url.rpartition(":")[2]
    moved = Credentials(mine.folder, f"https://127.0.0.1:{port}", mine.trust, mine.key, mine.name, mine.position)
    with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1"):
        run(ask(moved, served))


def test_nothing_older_than_tls_1_3_is_spoken(served: Door) -> None:
    port = int(served.url.rpartition(":")[2])
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode, old.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://example.com:1", "plain HTTP to another machine.*Write https://example.com:1"),
        ("http://127.0.0.1:1", "--insecure-loopback"),
        ("ftp://x", "not the address of a server"),
        ("https://", "not the address of a server"),
    ],
)
def test_plain_http_is_refused_but_on_loopback_when_asked_for(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        tls.permitted(url)
    with pytest.raises(ConfigurationError):
        tls.permitted("http://10.0.0.1:1", LOOPBACK)
    assert tls.permitted("http://[::1]:1", LOOPBACK) == "http://[::1]:1"


def test_plain_http_on_loopback_works_when_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path / "server", plain=True) as plain:
        mine = joined(plain, tmp_path / "client", "clinic", outward=LOOPBACK)
        assert run(ask(mine, plain)).json()["name"] == "clinic"


def test_a_document_with_parts_of_two_servers_is_refused(served: Door, tmp_path: Path) -> None:
    from foedus.net.identity.authority import Authority, Trust

    now = served.clock()
    other = Authority.kept(tmp_path, now=now)
    mixed = served.authority.document(now=now).split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    mixed += (tmp_path / "signing.pem").read_bytes() if other.document(now=now) else b""
    with pytest.raises(NotTrusted, match="not vouched for by its own authority"):
        Trust.checked(mixed, pin=served.authority.pin, now=now)
    for bad in (b"", b"<html>", served.authority.document(now=now) * 2):
        with pytest.raises(NotTrusted, match="not two certificates"):
            Trust.checked(bad, pin=served.authority.pin, now=now)
    with pytest.raises(NotTrusted, match="this machine's clock says 2001"):
        Trust.checked(served.authority.document(now=now), pin=served.authority.pin, now=1e9)
    # a client's certificate, which the authority did sign, cannot stand in for the signing key
    client = served.authority.client_certificate("clinic", SigningKey.generate().public, now=now)
    first = served.authority.document(now=now).split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    with pytest.raises(NotTrusted, match="made for other uses"):
        Trust.checked(first + client, pin=served.authority.pin, now=now)


# --- the client is who it says ------------------------------------------------------------------------------------


def test_a_ticket_of_a_silo_is_nothing_without_its_certificate(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "robbed")

    async def stolen() -> httpx.Response:
        async with visits.client(mine, clock=served.clock) as client:
            await client.get("/who")
            assert isinstance(client.auth, visits.Visit)
            ticket = client.auth.ticket
        async with httpx.AsyncClient(verify=client_context(mine.trust)) as thief:
            return await thief.get(f"{served.url}/who", headers={"Authorization": f"Bearer {ticket}"})

    response = run(stolen())
    assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")
    assert "bound to a client certificate" in response.json()["told"]


def test_a_silo_without_its_certificate_gets_no_session(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "bare")
    (tmp_path / "certificate.pem").unlink()
    with pytest.raises(Unauthenticated, match="does not show its certificate"):
        run(ask(mine, served))


def test_another_silos_certificate_does_not_help(served: Door, tmp_path: Path) -> None:
    mine, other = joined(served, tmp_path / "a", "silo-a"), joined(served, tmp_path / "b", "silo-b")
    mixed = Credentials(other.folder, mine.url, mine.trust, mine.key, mine.name, mine.position)
    with pytest.raises(Unauthenticated, match="does not show its certificate"):
        run(ask(mixed, served))


def test_a_certificate_of_another_authority_does_not_open_a_connection(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path / "a", "honest")
    with opened(tmp_path / "other") as other:
        foreign = joined(other, tmp_path / "b", "honest")
    mixed = Credentials(foreign.folder, mine.url, mine.trust, foreign.key, "honest", 0)
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        run(ask(mixed, served))


def test_who_is_revoked_is_let_in_no_more(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "leaving")

    async def conversation() -> tuple[int, int]:
        async with visits.client(mine, clock=served.clock) as client:
            first = await client.get("/who")
            served.access.directory.revoke("leaving", now=served.clock())
            served.access.reload()
            with pytest.raises(Unauthenticated, match="'leaving' was revoked"):
                await client.get("/who")
            return first.status_code, 0

    assert run(conversation())[0] == 200


def test_proofs_are_good_once_for_this_server_and_channel(served: Door, tmp_path: Path) -> None:
    """Replayed, late, for another server, passed on by somebody in between, or of another key: five typed answers."""
    mine = joined(served, tmp_path, "proven", silo=False)
    access, now = served.access, served.clock()
    channel = tls.shown(served.authority)

    def proof(server: str = mine.trust.pin, channel: str = channel, key: SigningKey = mine.key, at: float = now) -> Any:
        from foedus.net.identity.sessions import Proof

        challenge = access.challenge(now=at)
        return Proof.signed(key, "session", server=server, name="proven", challenge=challenge, channel=channel)

    good = proof()
    assert access.session(good, peer=None, now=now)[1] == 900.0
    refused: list[tuple[Any, str]] = [
        (good, "answered already"),
        (proof(at=now - 61), "older than 60 s"),
        (proof(server="other"), "did not prove its key"),
        (proof(key=SigningKey.generate()), "did not prove its key"),
        (proof(channel="ab" * 32), "somebody between ends TLS"),
        (proof(channel=""), "somebody between ends TLS"),
    ]
    for each, told in refused:
        with pytest.raises(Unauthenticated, match=told):
            access.session(each, peer=None, now=now)


def test_tickets_expire_and_are_renewed_unseen(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "patient", silo=False)

    async def conversation() -> list[int]:
        told = []
        async with visits.client(mine, clock=served.clock) as client:
            for wait in (0, 600, 1000, 2000):
                served.clock.now += wait
                told.append((await client.get("/who")).status_code)
        return told

    before = served.clock.now
    try:
        assert run(conversation()) == [200] * 4
    finally:
        served.clock.now = before


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer a.b.c", "Bearer " + "x" * 5000, "Bearer é"],
)
def test_what_is_no_ticket_is_told_so(served: Door, header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        served.access.caller(header, now=served.clock())


def test_tickets_that_somebody_made_up_are_refused(served: Door) -> None:
    import jwt

    from foedus.net.identity.callers import TRAIN, Caller
    from foedus.net.identity.sessions import Tickets

    now = served.clock()
    claims = {"iss": served.authority.pin, "sub": "a", "pos": 0, "scope": "operate", "exp": int(now + 99)}
    made = [
        Tickets(SigningKey.generate(), server=served.authority.pin).issue(Caller(0, "a", TRAIN), now=now),
        Tickets(served.authority.signing, server="other").issue(Caller(0, "a", TRAIN), now=now),
        jwt.encode(claims, key="", algorithm="none"),
        jwt.encode(claims, key=served.authority.signing.public.raw.hex(), algorithm="HS256"),  # algorithm confusion
        jwt.encode({**claims, "scope": 3}, served.authority.signing.native, algorithm="EdDSA").replace(".", "..", 1),
    ]
    for text in made:
        with pytest.raises(Unauthenticated, match="not one of this server"):
            served.access.caller(f"Bearer {text}", now=now)


def test_a_certificate_that_runs_out_is_renewed(served: Door, tmp_path: Path) -> None:
    mine = joined(served, tmp_path, "lasting")
    old = (tmp_path / "certificate.pem").read_bytes()
    run(visits.renew(mine, clock=served.clock))
    assert (tmp_path / "certificate.pem").read_bytes() == old  # not yet
    run(visits.renew(mine, clock=lambda: served.clock.now + 40 * 86400))  # by this client's clock it has run out
    assert (tmp_path / "certificate.pem").read_bytes() != old
    assert run(ask(mine, served)).status_code == 200


def test_a_servers_certificate_is_renewed_while_it_runs(tmp_path: Path) -> None:
    with opened(tmp_path / "server") as door:
        before = tls.shown(door.authority)
        context = tls.server_context(door.authority, ["localhost"], now=door.clock())
        assert tls.renewed(context, door.authority, ["localhost"], now=door.clock()) == before
        later = tls.renewed(context, door.authority, ["localhost"], now=door.clock() + 61 * 86400)
        assert later != before
        door.access.shows(later)
        mine = joined(door, tmp_path / "client", "clinic")  # over the old certificate, which is still shown here
        assert run(ask(mine, door)).status_code == 200


def test_behind_a_proxy_that_ends_tls_the_key_alone_proves_the_client(tmp_path: Path) -> None:
    with opened(tmp_path / "server", behind_proxy=True) as door:
        mine = joined(door, tmp_path / "client", "clinic")
        (tmp_path / "client" / "certificate.pem").unlink()
        assert run(ask(mine, door)).json()["name"] == "clinic"


# --- hostile input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["enrol", "session", "certificate"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"name": 1}', 400),
        (b"[" * 8000, 400),
        (b"\xff\xfe", 400),
        (b'{"a": "' + b"x" * 9000 + b'"}', 413),
        (json.dumps(dict.fromkeys(("token", "name", "key", "challenge", "channel", "signature"), "é!")).encode(), 400),
        (
            json.dumps(dict.fromkeys(("token", "name", "key", "challenge", "channel", "signature"), "AAAA")).encode(),
            None,
        ),
    ],
)
def test_nonsense_at_the_door_is_answered_with_a_typed_error(
    served: Door, path: str, body: bytes, status: int | None
) -> None:
    context = ssl.create_default_context(cafile=str(served.authority.folder / "authority.pem"))
    response = httpx.post(f"{served.url}/v1/{path}", content=body, verify=context)
    assert response.status_code == status or (status is None and response.status_code in (400, 401, 403))
    assert set(response.json()) == {"code", "told"}


def test_whoever_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    with opened(tmp_path, rate=Rate(per_s=0.5, burst=3)) as door:
        found = [visits.discover(door.url, pin=door.authority.pin, now=door.clock()) for _ in range(3)]
        for each in found:
            run(each)
        with pytest.raises(NotTrusted, match="answered 429"):
            run(visits.discover(door.url, pin=door.authority.pin, now=door.clock()))
        door.clock.now += 2.0
        run(visits.discover(door.url, pin=door.authority.pin, now=door.clock()))
        context = ssl.create_default_context(cafile=str(door.authority.folder / "authority.pem"))
        response = httpx.post(f"{door.url}/v1/challenge", verify=context)
        assert (response.status_code, response.headers["retry-after"], response.json()["code"]) == (429, "2", "rate")
        with pytest.raises(TooFast, match=r"Come back in 2\.0 s") as told:
            run(visits._answer(response))
        assert told.value.after_s == 2.0


def test_a_member_that_asks_too_often_slows_nobody_else(tmp_path: Path) -> None:
    from foedus.net.identity.access import Access
    from foedus.net.identity.authority import Authority
    from foedus.net.identity.callers import TRAIN, Caller
    from foedus.net.store import open_store

    store = open_store("sqlite://")
    access = Access(Authority.kept(tmp_path, now=1e9), store, rate=Rate(per_s=1.0, burst=2))
    loud, quiet = (f"Bearer {access.mint(Caller(0, n, TRAIN), now=1e9, lifetime_s=60)}" for n in ("loud", "quiet"))
    for _ in range(2):
        access.caller(loud, now=1e9)
    with pytest.raises(TooFast, match="'loud' asks too often"):
        access.caller(loud, now=1e9)
    assert access.caller(quiet, now=1e9).name == "quiet"
    store.close()


@pytest.mark.slow
def test_a_connection_that_sends_a_byte_now_and_then_is_closed(tmp_path: Path) -> None:
    """A slow loris: before the head, in the head of a first and of a later request, and in a body."""
    with opened(tmp_path, plain=True, head_s=0.2, stall_s=0.2) as door:
        ticket = door.access.mint(_caller(), now=door.clock(), lifetime_s=60)
        port = int(door.url.rpartition(":")[2])
        whole = f"GET /who HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ticket}\r\n\r\n".encode()
        body = f"PUT /who HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ticket}\r\nContent-Length: 9\r\n\r\nx".encode()
        for before, sent in ((b"", b""), (b"", b"GET /who HT"), (whole, b"GET /w"), (b"", body), (whole, body)):
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.settimeout(20)
                if before:
                    slow.sendall(before)
                    _until(slow, b"}")
                slow.sendall(sent)
                assert _until(slow, b"nothing") == b""


def test_a_connection_that_asks_and_asks_before_it_is_answered_is_closed(tmp_path: Path) -> None:
    """Requests sent ahead lie in memory, and eighteen bytes are one: a flood of them would have no end."""
    with (
        opened(tmp_path, plain=True) as door,
        socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2]))) as flood,
    ):
        flood.settimeout(20)
        flood.sendall(b"GET / HTTP/1.1\r\n\r\n" * 5)  # a few are as they should be
        told = b""
        while told.count(b"Not Found") < 5:
            told += flood.recv(10_000)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                flood.sendall(b"GET / HTTP/1.1\r\n\r\n" * 900)
            raise AssertionError("nobody has stopped it")


@pytest.mark.slow
def test_a_connection_on_which_nothing_is_asked_stays_open(tmp_path: Path) -> None:
    """And so does one whose body comes slowly but steadily."""
    import time

    with opened(tmp_path, plain=True, head_s=0.2, stall_s=0.2) as door:
        ticket = door.access.mint(_caller(), now=door.clock(), lifetime_s=60)
        port = int(door.url.rpartition(":")[2])
        head = f"PUT /who HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ticket}\r\nContent-Length: 6\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", port)) as steady:
            steady.settimeout(20)
            for _ in range(2):
                steady.sendall(head)
                for _ in range(6):
                    time.sleep(0.1)  # what is tested is the time that passes
                    steady.sendall(b"x")
                assert b'"size":6' in _until(steady, b"}")
                time.sleep(0.5)


def test_who_goes_in_the_middle_of_a_request_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with opened(tmp_path, plain=True) as door:
        with socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2]))) as gone:
            gone.sendall(asked)
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{door.url}/v1/authority")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.slow
def test_an_answer_that_nobody_reads_is_given_up() -> None:
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.create_task(send({"type": "http.response.body", "body": bytes(1 << 26)}))
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()
        await sending

    with (
        running(app, None, head_s=0.2, stall_s=0.2, unread_s=0.4) as port,
        socket.create_connection(("127.0.0.1", port)) as deaf,
    ):
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ended.wait(20), "the server still waits for somebody to read"


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_server_that_takes_bytes_and_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    """At the first visit, and when a ticket is asked for: that request is made by the visit itself."""
    monkeypatch.setattr(visits, "PATIENCE", 0.1)
    monkeypatch.setattr(visits, "AT_DOOR", 0.1)
    monkeypatch.setattr(visits, "IN_ALL", 0.3)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1000):
                pass
        writer.transport.abort()

    async def called(mine: Credentials) -> None:
        async with asyncio.timeout(10), await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(Unreachable):
                await visits.discover(url, pin="ab" * 32, outward=LOOPBACK, now=0.0)
            lost = replace(mine, url=url)
            async with visits.client(lost, outward=LOOPBACK, clock=lambda: 0.0) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.get("/who")
        for _ in range(5):  # what was closed is given back a few turns later
            await asyncio.sleep(0)

    with opened(tmp_path, plain=True) as door:
        mine = joined(door, tmp_path / "me", "me", outward=LOOPBACK)
    run(called(mine))


def _until(connection: socket.socket, end: bytes) -> bytes:
    """What comes, up to a text, or until the other side closes."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while end not in told and (piece := connection.recv(10_000)):
            told += piece
    return told


def _caller() -> Any:
    from foedus.net.identity.callers import TRAIN, Caller

    return Caller(0, "device", TRAIN)


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>"),
        (200, b"[1]"),
        (200, b"{}"),
        (500, b""),
        (404, b'{"code": "nonsense", "told": "?"}'),
        (200, b"x" * 70000),
    ],
)
def test_a_server_that_answers_nonsense_is_not_believed(tmp_path: Path, answer: tuple[int, bytes]) -> None:
    from foedus.errors import FoedusError
    from foedus.net.identity.authority import Authority

    async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        status, body = answer
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    authority = Authority.kept(tmp_path, now=1.7e9)
    with running(app, None) as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(FoedusError):
            run(visits.discover(url, pin=authority.pin, outward=LOOPBACK, now=1.7e9))
        response = httpx.get(url)
        if answer != (200, b"{}"):
            with pytest.raises(FoedusError):
                run(visits._answer(response))


def test_bytes_in_json_are_base64url() -> None:
    raw = bytes(range(256))
    assert visits._bytes(visits._text(raw)) == raw
    assert base64.urlsafe_b64decode(visits._text(raw) + "==") == raw
    with pytest.raises(NotTrusted):
        visits._bytes("***")


def test_an_enrolment_must_be_signed_by_the_key_that_it_shows(served: Door) -> None:
    token = served.access.invite(now=served.clock())
    mine, other = SigningKey.generate(), SigningKey.generate()
    from foedus.net.identity.callers import token_digest

    signature = other.sign("enrol", served.authority.pin.encode(), token_digest(token), b"clinic-x")
    with pytest.raises(EnrolmentRefused, match="did not sign with it"):
        served.access.enrol(token, "clinic-x", mine.public.raw, signature=signature, now=served.clock())
