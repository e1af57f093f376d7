"""One suite for every transport: messages, blobs, uploads, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest

from foedus.errors import Code, MalformedMessage, TooLarge, Unreachable
from foedus.net import api, transport
from foedus.net.http import Shell
from foedus.net.identity.callers import TRAIN
from foedus.net.identity.callers import Caller as Known
from foedus.net.transport import HttpTransport, Transport
from foedus.protocol import wire
from foedus.protocol.blob import digest_of
from foedus.protocol.messages import (
    Accepted,
    Ask,
    Blob,
    CheckIn,
    Closed,
    Decline,
    Later,
    Place,
    Problem,
    Refused,
    StartUpload,
    Submit,
)  # fmt: skip

from .agents import Server

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Door:
    def caller(self, authorization: str | None, *, peer: bytes | None = None, now: float) -> Known:
        return Known(0, "0", TRAIN)


@contextlib.asynccontextmanager
async def transports(server: Server, kind: str) -> AsyncIterator[Transport]:
    if kind == "memory":
        yield server.transport(0)
        return
    shell = Shell(server.coordinator, Door(), clock=server.time.now)  # type: ignore[arg-type]
    client = httpx.AsyncClient(transport=httpx.ASGITransport(shell.application()), base_url="http://server")
    yield HttpTransport(client)
    await client.aclose()


KINDS = pytest.mark.parametrize("kind", ["memory", "http"])


@KINDS
async def test_a_session_goes_through(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path)
    async with transports(server, kind) as transport:
        told = await transport.ask(CheckIn(run="run", examples=9))
        assert isinstance(told, Accepted)
        orders = await transport.fetch(told.orders)
        assert (len(orders), digest_of(orders)) == (told.orders.size, told.orders.digest)
        assert told.bundle is not None
        assert await transport.fetch(told.bundle) == server.bundle.content
        content = b"no update at all" * 100
        start = StartUpload(key=told.key, size=len(content), digest=digest_of(content), version=told.round)
        place = await transport.ask(start)
        assert isinstance(place, Place)
        assert await transport.send(place.upload, 0, content[:100]) == 100
        assert await transport.ask(start) == Place(**{**vars(place), "offset": 100})  # taken up again there
        assert await transport.send(place.upload, 50, content[50:60]) == 100  # sent twice, there once
        wrong = await transport.send(place.upload, 500, content[500:])
        assert isinstance(wrong, Problem)
        assert (wrong.code, wrong.offset) == (Code.WRONG_OFFSET, 100)
        assert await transport.send(place.upload, 100, content[100:]) == len(content)
        end = Submit(key=told.key, upload=place.upload, size=len(content), digest=digest_of(content))
        refused = await transport.ask(end)
        assert isinstance(refused, Refused)
        assert refused.code is Code.TOO_LARGE  # of the header that the text announces


@KINDS
async def test_problems_are_answers_and_nothing_of_them_was_done(tmp_path: Path, kind: str) -> None:
    async with transports(Server(tmp_path), kind) as transport:
        unknown = await transport.ask(StartUpload(key=b"k" * 16, size=3, digest=bytes(32)))
        assert isinstance(unknown, Closed)
        lost = await transport.send(b"u" * 16, 0, b"abc")
        assert isinstance(lost, Problem)
        assert lost.code is Code.UNKNOWN_UPLOAD
        assert (await transport.ask(Ask(keys=(b"k" * 16,)))).entries[0].state.value == "discarded"  # type: ignore[union-attr]
        with pytest.raises(Exception, match=r"blob|bytes"):
            await transport.fetch(Blob(digest=bytes(32), size=3))


# --- HTTP that misbehaves -------------------------------------------------------------------------------------


def answer(status: int, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    """As it comes from a network: not read yet."""
    return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)


def server_that(answers: Any) -> HttpTransport:
    return HttpTransport(httpx.AsyncClient(transport=httpx.MockTransport(answers), base_url="http://server"))


async def test_a_download_that_breaks_is_taken_up_where_it_broke() -> None:
    content, asked = bytes(range(256)) * 40, []

    def answers(request: httpx.Request) -> httpx.Response:
        begin = int(request.headers.get("Range", "bytes=0-")[6:-1])
        asked.append(begin)
        return answer(206 if begin else 200, content[begin : begin + 3000])

    transport = server_that(answers)
    assert await transport.fetch(Blob(digest=digest_of(content), size=len(content))) == content
    assert asked == [0, 3000, 6000, 9000]
    asked.clear()
    with pytest.raises(Unreachable, match="3000 came"):
        await server_that(lambda r: answer(200, content[:3000])).fetch(Blob(digest=bytes(32), size=3001))


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (answer(200, b"x" * (wire.MOST + 1)), TooLarge),
        (answer(200, b"<html>"), MalformedMessage),
        (answer(200, b"nonsense", {"Content-Type": api.MEDIA}), MalformedMessage),
        (
            answer(
                200,
                wire.encode(Place(upload=bytes(16))),
                {"Content-Type": api.MEDIA},
            ),
            MalformedMessage,
        ),
        (answer(502, b"bad gateway"), Unreachable),
        (httpx.ConnectError("refused"), Unreachable),
        (httpx.ReadTimeout(""), Unreachable),
        (ssl.SSLError("bad record mac"), Unreachable),  # a bit was turned over on the way
    ],
)
async def test_whatever_answers_instead_is_told_apart(response: Any, told: type[Exception]) -> None:
    def answers(_: httpx.Request) -> httpx.Response:
        if isinstance(response, Exception):
            raise response
        return response

    with pytest.raises(told):
        await server_that(answers).ask(CheckIn())


async def test_a_server_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps a connection alive, but nobody waiting for ever."""
    monkeypatch.setattr(transport, "LONGEST_S", 0.05)

    async def drips() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    dripping = server_that(lambda _: httpx.Response(200, content=drips()))
    calls: list[Awaitable[Any]] = [
        dripping.ask(CheckIn()), dripping.fetch(Blob(digest=bytes(32), size=9)), dripping.send(b"u" * 16, 0, b"abc"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises((Unreachable, TooLarge)):
            await asyncio.wait_for(call, 10)


async def test_another_server_is_asked_when_one_is_gone() -> None:
    """Of those that were named: those that are trusted, each once, and the first one before others."""
    gone, asked, kept = set[str](), list[str](), list[tuple[str, ...]]()
    named = "http://one http://two http://evil http://three"

    def answers(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host in gone:
            raise httpx.ConnectError("nobody is there")
        content = wire.encode(Later(after_s=1.0, until_s=2.0, reason="none"))
        return answer(200, content, {"Content-Type": api.MEDIA, api.SERVERS: named})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answers), base_url="http://one")
    way = HttpTransport(client, follows=lambda address: "evil" not in address, remember=kept.append)

    async def ways() -> list[str]:
        asked.clear()
        await way.ask(Decline(key=b"k" * 16, reason="training"))
        return list(asked)

    assert await ways() == ["one"]
    assert kept == [("http://one", "http://two", "http://three")]
    gone.update({"one", "two"})
    assert await ways() == ["one", "two", "three"]
    assert await ways() == ["three"], "it stays where it was answered"
    gone.add("three")
    with pytest.raises(Unreachable):
        await ways()
    assert asked == ["three", "one", "two"]
    assert way.address == "http://one"
    gone.clear()
    assert await ways() == ["one"]
    assert len(kept) == 1, "what is known is not remembered anew"
    await way.close()


async def test_what_the_door_says_is_a_problem() -> None:
    limited = answer(429, json.dumps({"code": "rate", "told": "too\x1bfast"}).encode(), {"Retry-After": "7"})
    said = await server_that(lambda _: limited).ask(CheckIn())
    assert said == Problem(code=Code.RATE, told="too fast", fatal=False, after_s=7.0)
    said = await server_that(lambda _: answer(401, b"[")).ask(CheckIn())
    assert isinstance(said, Problem)
    assert (said.code, said.fatal) == (Code.UNAUTHENTICATED, False)
    said = await server_that(lambda _: answer(403, b'{"code": "forbidden"}')).ask(CheckIn())
    assert isinstance(said, Problem)
    assert said.fatal


async def test_blobs_that_are_larger_than_announced_are_not_taken() -> None:
    with pytest.raises(TooLarge):
        await server_that(lambda _: answer(200, b"x" * 100)).fetch(Blob(digest=bytes(32), size=99))


async def test_messages_are_what_the_server_reads() -> None:
    seen: list[httpx.Request] = []

    def answers(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        later = wire.encode(Later(after_s=1.0, until_s=2.0))
        return answer(200, later, {"Content-Type": api.MEDIA})

    assert isinstance(await server_that(answers).ask(CheckIn(run="r")), Later)
    assert seen[0].url.path == "/v1/check-in"
    assert wire.decode(seen[0].content) == CheckIn(run="r")
