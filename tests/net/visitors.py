"""Clients that visit a real server over HTTP, as plainly as can be: no sandbox, no journal, no owner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from foedus.errors import Unreachable
from foedus.net.identity import visits
from foedus.net.identity.signed import check, check_content
from foedus.net.identity.tls import Outward
from foedus.net.transport import HttpTransport
from foedus.protocol import blob
from foedus.protocol.messages import (
    Accepted,
    Answer,
    Ask,
    CheckIn,
    Finished,
    Kind,
    Place,
    Problem,
    Received,
    Stands,
    StartUpload,
    Submit,
)  # fmt: skip
from foedus.rounds.freight import opened_blob

from .trainees import Trainee

LOOPBACK = Outward(insecure_loopback=True)
PAUSE = 0.05


@dataclass
class Visitor:
    """One client: enrolled, with a session, and the bytes it holds."""

    trainee: Trainee
    position: int
    transport: HttpTransport
    public: Any
    held: tuple[bytes, bytes] | None = None
    model: bytes = b""
    sent: list[bytes] = field(default_factory=list)
    trained: int = 0
    patient: float = 60.0
    run: str = ""

    async def ask(self, message: Any) -> Answer:
        """Until there is an answer that is no passing problem: servers may be restarted."""
        deadline = time.monotonic() + self.patient
        while True:
            try:
                found = await self.transport.ask(message)
                if not isinstance(found, Problem) or found.fatal or found.code in ("unknown-upload", "wrong-digest"):
                    return found
            except Unreachable:
                pass
            assert time.monotonic() < deadline, "nobody answers"
            await asyncio.sleep(PAUSE)

    async def until_finished(self) -> Finished:
        """Come again and again; not for ever."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            found = await self.visit()
            if isinstance(found, Finished):
                check(self.public, found)
                assert found.model is not None
                self.model = await self.transport.fetch(found.model)
                check_content(found.model, self.model)
                await self.again()
                return found
            await asyncio.sleep(PAUSE)
        raise AssertionError("the run does not end")

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.TRAIN, Kind.EVALUATE)

    async def visit(self) -> Answer:
        """A device session, as far as it goes."""
        await self.again()
        size = int(self.trainee.clients.sizes[self.position])
        pending = () if self.held is None else (self.held[0],)
        found = await self.ask(CheckIn(run=self.run, kinds=self.kinds, examples=size, pending=pending))
        if not isinstance(found, Accepted):
            return found
        check(self.public, found)
        return await self.takes_part(found)

    async def takes_part(self, found: Accepted) -> Answer:
        if found.held is None or self.held is None:
            orders = await self.transport.fetch(found.orders)
            check_content(found.orders, orders)
            self.held = found.key, self.trainee.update(orders, self.position)
            self.trained += 1
        self.held = found.key, self.held[1]
        return await self.send()

    async def send(self) -> Answer:
        assert self.held is not None
        key, content = self.held
        digest = blob.digest_of(content)
        for _ in range(100):
            place = await self.ask(StartUpload(key=key, size=len(content), digest=digest))
            if not isinstance(place, Place):
                return place
            try:
                if place.offset < len(content):
                    offset = await self.transport.send(place.upload, place.offset, content[place.offset :])
                    if isinstance(offset, Problem):
                        continue
            except Unreachable:
                await asyncio.sleep(PAUSE)
                continue
            found = await self.ask(Submit(key=key, upload=place.upload, size=len(content), digest=digest))
            if isinstance(found, Received):
                self.trainee.let_in(self.position, content)
                self.sent.append(digest)
            if not isinstance(found, Problem):
                return found
        raise AssertionError("the upload does not come to an end")

    async def again(self) -> None:
        if self.held is None:
            return
        answer = await self.ask(Ask(keys=(self.held[0],)))
        state = answer.entries[0].state
        if state is Stands.AGAIN:
            await self.send()
        elif state in (Stands.COUNTED, Stands.DISCARDED):
            self.held = None


class Silo(Visitor):
    """A client that has the key of encrypted sums."""

    kinds = (Kind.TRAIN, Kind.DECRYPT)

    async def takes_part(self, found: Accepted) -> Answer:
        if found.kind is not Kind.DECRYPT:
            return await super().takes_part(found)
        held, closed = self.held, await self.transport.fetch(found.orders)
        opened = self.trainee.opened(closed, found.run, found.round, self.position)
        self.held = found.key, opened_blob(opened, found.orders.digest)
        answer = await self.send()
        self.held = held  # an answer is not held: another is asked instead
        return answer


async def joined(
    trainee: Trainee, position: int, folder: Path, address: Callable[[], tuple[str, str, str]],
    kind: type[Visitor] = Visitor,
) -> Visitor:  # fmt: skip
    """Enrol a client; positions are given in the order of enrolment."""
    url, pin, token = address()
    outward = LOOPBACK if url.startswith("http:") else Outward()
    mine = await visits.enrol(
        url, folder=folder / f"client-{position}", pin=pin, token=token, name=f"c{position}", outward=outward,
        now=time.time(),
    )  # fmt: skip
    client = visits.client(mine, outward=outward, clock=time.time)
    return kind(trainee, position, HttpTransport(client, follows=lambda _: True), mine.trust.signing)
