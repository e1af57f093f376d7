"""An agent's way to its server: certificates are renewed while it runs, proxies are used, nobody there is told."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from foedus.errors import Unreachable
from foedus.net.identity import visits
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.tls import DIRECT, Outward
from foedus.net.reach import Reach

from .doors import Clock, Door, opened
from .lines import Gate
from .lines import opened as line

DAY = 86400.0


async def join(door: Door, folder: Path, *, url: str = "", outward: Outward = DIRECT) -> Credentials:
    token = door.access.invite(now=door.clock(), silo=True)
    return await visits.enrol(
        url or door.url, folder=folder, pin=door.authority.pin, token=token, name="clinic", outward=outward,
        now=door.clock(),
    )  # fmt: skip


async def who(reach: Reach) -> str:
    found = await reach.transport._client.get("/who")
    return str(found.json()["name"])


def test_a_certificate_is_renewed_while_the_agent_runs(tmp_path: Path) -> None:
    with opened(tmp_path / "server") as door:
        clock = Clock()
        clock.now = door.clock()

        async def act() -> None:
            reach = Reach(await join(door, tmp_path / "client"), DIRECT, clock)
            shown = tmp_path / "client" / "certificate.pem"
            first = shown.read_bytes()
            assert await who(reach) == "clinic"
            assert not await reach.renewed()
            clock.now += 21 * DAY
            before = reach.transport._client
            assert await reach.renewed()
            assert shown.read_bytes() != first
            assert reach.transport._client is not before
            assert not before.is_closed, "requests under way end with it"
            assert await who(reach) == "clinic", "with a ticket bound to the new certificate"
            assert reach.ticket
            assert isinstance(reach.context(), ssl.SSLContext)
            await reach.transport.close()
            assert before.is_closed

        asyncio.run(act())


def test_a_server_that_is_not_there_is_told_or_waited_for(tmp_path: Path) -> None:
    with opened(tmp_path / "server") as door:
        mine = asyncio.run(join(door, tmp_path / "client"))
        token = door.access.invite(now=door.clock(), silo=True)
    for act in (
        visits.discover(door.url, pin=None, now=door.clock()),
        visits.enrol(door.url, folder=tmp_path / "x", pin=door.authority.pin, token=token, name="x", now=door.clock()),
        visits.renew(mine, clock=lambda: door.clock.now + 25 * DAY),
    ):
        with pytest.raises(Unreachable, match="is the server running"):
            asyncio.run(act)

    async def later() -> bool:
        reach = Reach(mine, DIRECT, lambda: door.clock.now + 25 * DAY)
        try:
            return await reach.renewed()
        finally:
            await reach.transport.close()

    assert not asyncio.run(later())


def test_a_proxy_of_the_organisation_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's name can be resolved by the proxy only; TLS is with the server, not with the proxy."""
    with opened(tmp_path / "server") as door:
        port = int(door.url.rpartition(":")[2])
        gate = Gate(port)
        with line(gate):
            for name in ("HTTPS_PROXY", "https_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{gate.port}")
            for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.delenv(name, raising=False)

            async def act() -> str:
                mine = await join(door, tmp_path / "client")
                reach = Reach(mine, DIRECT, door.clock)
                try:
                    return await who(reach)
                finally:
                    await reach.transport.close()

            assert asyncio.run(act()) == "clinic"
            assert set(gate.asked) == {f"CONNECT localhost:{port} HTTP/1.1"}
