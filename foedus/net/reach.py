"""What an agent reaches its server by, kept fresh: HTTP, TLS for the doorbell, the ticket, the client's certificate.

A silo's certificate lasts 30 days, and an agent runs for longer. Ten days before the end a new one is asked for, and
from then on connections are made with it; those that are open end by themselves. A server that is not there is asked
again an hour later.

Not here: how a certificate is renewed (``identity/visits.py``), when the agent calls (``agent.py``).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from foedus.errors import ConfigurationError, NotTrusted, ProtocolError, StorageError, Unreachable
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.tls import Outward, client_context, permitted
from foedus.net.transport import HttpTransport

__all__ = ["Reach"]

LOOK_S = 3600.0  # between two looks at the certificate


class Reach:
    """A client's connections to its server.

    Args:
        mine: who the client is there.
        outward: proxies and authorities beyond the plain way.
        clock: seconds since 1970.
    """

    def __init__(self, mine: Credentials, outward: Outward, clock: Callable[[], float]) -> None:
        self._mine, self._outward, self._clock = mine, outward, clock
        others = [address for address in mine.servers() if self._trusted(address)]
        self.transport = HttpTransport(self._http(), follows=self._trusted, others=others, remember=self._remember)

    @property
    def ticket(self) -> str:
        """The present ticket; empty before the first request."""
        return self._visit.ticket

    def _trusted(self, address: str) -> bool:
        """Whether another server of the federation may be at an address: TLS proves it by the authority's pin."""
        try:
            known = permitted(address, self._outward) == address and urlsplit(address).port != 0
            return known and bool(self._mine.trust.pin)
        except (ConfigurationError, ValueError):
            return False

    def _remember(self, addresses: tuple[str, ...]) -> None:
        with suppress(StorageError):  # a full disk: they are named again
            self._mine.keep_servers(addresses)

    def context(self) -> ssl.SSLContext | None:
        """For a connection that is no HTTP; ``None`` on plain HTTP."""
        if not self._mine.url.startswith("https:"):
            return None
        return client_context(self._mine.trust, self._outward, files=self._mine.files(now=self._clock()))

    async def renewed(self) -> bool:
        """Have the certificate renewed and use it, if it is time; whether it was.

        A server that cannot be reached, or says no, is asked again the next time.
        """
        from foedus.net.identity.visits import renew

        if not self._mine.due(now=self._clock()):
            return False
        try:
            await renew(self._mine, outward=self._outward, clock=self._clock)
        except (Unreachable, ProtocolError, NotTrusted):
            return False
        await self.transport.use(self._http())
        return True

    async def kept_fresh(self) -> None:
        """Look after the certificate until cancelled."""
        while True:
            await self.renewed()
            await asyncio.sleep(LOOK_S)

    def _http(self) -> Any:
        from foedus.net.identity.visits import Visit, client

        http = client(self._mine, outward=self._outward, clock=self._clock)
        assert isinstance(http.auth, Visit)
        self._visit = http.auth
        return http
