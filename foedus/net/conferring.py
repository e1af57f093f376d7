"""A client's part in a masked sum, over whatever transport: asks for its next turn, and sends its answers.

What is said and done is decided by a pure machine (``protocol/secagg/client.py``); this carries it out. What must be
remembered is on the disk before anything that follows from it leaves. Keys, shares and masks are of one attempt, and
lie in memory only: whoever is killed in the middle is lost to this attempt, and takes part in the next.

Not here: training (``bench.py``), the server's side (``masking.py``), who knows whom (``owner/peers.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from foedus.errors import Code, ProtocolError, SecureAggregationFailed, Unreachable
from foedus.net.identity.signed import check_content
from foedus.net.transport import Transport
from foedus.protocol.blob import digest_of
from foedus.protocol.messages import (
    Accepted,
    Closed,
    Confer,
    Later,
    Place,
    Problem,
    Received,
    StartUpload,
    Turn,
    Window,
    raised,
)
from foedus.protocol.secagg import client as machine
from foedus.protocol.secagg.client import Memory, Numbers, Own, Remember, Send
from foedus.protocol.secagg.freight import TURNS, invited_by, message_blob, message_of
from foedus.protocol.secagg.messages import Identity, Masked, Promise

__all__ = ["Part", "Ways", "take_part"]

LONGEST_S = 10.0  # between two tries to reach a server that does not answer
NAMES = {
    "Keys": "fresh public keys for a masked sum", "Parcels": "sealed shares of keys, for other clients to open",
    "Masked": "the update and all beside it, under masks", "Vote": "a signature of who is in the masked sum",
    "Shares": "shares that take masks off the sum",
}  # fmt: skip


class Part(NamedTuple):
    """What a client takes part in.

    Attributes:
        accepted: its seat.
        promise: what its owner approved, of the algorithm's own code.
        session: by which its memory knows the run.
        identity: where the server may lie.
    """

    accepted: Accepted
    promise: Promise
    session: bytes
    identity: Identity | None


class Ways(NamedTuple):
    """How it is carried out.

    Attributes:
        transport: to the server.
        now, rest: the clock.
        draw: a number from 0 to 1, for moments of its own choice.
        entropy: so many bytes of the operating system's randomness.
        recall, remember: its memory, on the disk.
        leaves: writes into the ledger that something is about to leave: what, its size and digest.
        holds: writes down, before masked numbers leave, what the client keeps if they count.
    """

    transport: Transport
    now: Callable[[], float]
    rest: Callable[[float], Awaitable[None]]
    draw: Callable[[], float]
    entropy: Callable[[int], bytes]
    recall: Callable[[], Memory | None]
    remember: Callable[[Memory], None]
    leaves: Callable[[str, int, bytes], None]
    holds: Callable[[], None]


async def take_part(part: Part, ways: Ways, numbers: Callable[[], Awaitable[Any]]) -> Window:
    """Take part in an attempt, from the first turn to the last; when to ask what has become of it.

    Args:
        part: in what.
        ways: how.
        numbers: trains, and gives what is to be masked; it begins at once.

    Raises:
        SecureAggregationFailed: the client has left: what it was told is not what it was promised.
        Unreachable: the server cannot be reached any more.
        ProtocolError: the server does not take what it sent.
    """
    work = asyncio.ensure_future(numbers())
    try:
        return await _Talk(part, ways, work).carry_on()
    finally:
        if not work.done():
            work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@dataclass
class _Talk:
    """The conversation so far."""

    part: Part
    ways: Ways
    work: asyncio.Future[Any]
    client: machine.Client | None = None
    turn: int = 0
    answer: bytes = b""
    upload: bytes | None = None
    until: float = field(init=False)  # the server is given up if it cannot be reached for so long
    wait: float = 1.0

    def __post_init__(self) -> None:
        self.until = self.ways.now() + self.part.accepted.closes_s

    async def carry_on(self) -> Window:
        """Ask for the next turn until there is none."""
        while True:
            found = await self._asked()
            if isinstance(found, Turn):
                await self._taken(found)
            elif isinstance(found, Received | Closed):
                return found.later
            elif isinstance(found, Later):
                if self.work.done():
                    self.work.result()  # training that failed is told of at once
                await self.ways.rest(found.after_s + self.ways.draw() * max(0.0, found.until_s - found.after_s))

    async def _asked(self) -> Turn | Later | Received | Closed:
        """The server's answer, however often it takes."""
        while True:
            try:
                if self.answer and self.upload is None and (closed := await self._sent()) is not None:
                    return closed
                size, digest = len(self.answer), digest_of(self.answer) if self.answer else None
                confer = Confer(
                    key=self.part.accepted.key, turn=self.turn, upload=self.upload, size=size, digest=digest
                )
                found: Any = await self.ways.transport.ask(confer)
            except Unreachable:
                await self._backed_off()
                continue
            if not isinstance(found, Problem):
                self.wait = 1.0
                return found  # type: ignore[no-any-return]
            if found.fatal or found.code is Code.MALFORMED:
                raise raised(found)
            if found.code in (Code.UNKNOWN_UPLOAD, Code.WRONG_DIGEST, Code.WRONG_OFFSET):
                self.upload = None
            await self._backed_off(found.after_s)

    async def _backed_off(self, least: float = 0.0) -> None:
        """Wait a while; not for ever."""
        if self.ways.now() >= self.until:
            raise Unreachable("the server cannot be reached, and the time of this round is over")
        await self.ways.rest(max(least, self.wait * (0.5 + self.ways.draw() / 2)))
        self.wait = min(LONGEST_S, 2 * self.wait)

    async def _sent(self) -> Closed | None:
        """Send the answer's bytes; ``None`` once they are there."""
        transport, content = self.ways.transport, self.answer
        place: Any = await transport.ask(
            StartUpload(key=self.part.accepted.key, size=len(content), digest=digest_of(content))
        )
        if isinstance(place, Closed):
            return place
        if not isinstance(place, Place):
            raise raised(place) if place.fatal else Unreachable(place.told)
        offset = place.offset
        while offset < len(content):
            gone = await transport.send(place.upload, offset, content[offset : offset + place.chunk])
            if isinstance(gone, Problem):
                raise raised(gone) if gone.fatal else Unreachable(gone.told)
            offset = gone
        self.upload = place.upload
        return None

    async def _taken(self, turn: Turn) -> None:
        """The server's next turn, and the answer to it."""
        content = await self._body(turn)
        if content is None:
            return
        self.turn, self.answer, self.upload = turn.turn, b"", None
        if self.client is None:
            if turn.turn != 1:  # an earlier process of this client began; what it knew died with it
                raise SecureAggregationFailed("this masked sum is under way, and this process has not taken part in it")
            actions = self._begun(content)
        else:
            self.client, actions = machine.step(self.client, message_of(content, TURNS[1:]))
        self._carried_out(actions)
        waits = self.client is not None and self.client.stage is machine.Stage.SHARED
        if waits and self.client is not None and self.client.delivery is not None:
            self.client, actions = machine.step(self.client, Numbers(await self.work))
            self._carried_out(actions)

    async def _body(self, turn: Turn) -> bytes | None:
        """The body of a turn; ``None`` if it is not to be had: then the turn is asked for again, since the sum may have
        come without this client's answer meanwhile."""
        try:
            content = await self.ways.transport.fetch(turn.body)
        except Unreachable:
            await self._backed_off()
            return None
        except ProtocolError as error:
            if error.code is not Code.UNKNOWN_BLOB:
                raise
            return None
        check_content(turn.body, content)
        return content

    def _begun(self, content: bytes) -> tuple[machine.Action, ...]:
        """The first turn: join, if the terms are those that were promised, of this round and this model."""
        part, (terms, slot) = self.part, invited_by(content)
        told = (terms.session, terms.round, terms.attempt)
        if told != (part.session, part.accepted.round, part.accepted.attempt):
            raise SecureAggregationFailed("the server's terms are of another run, round or attempt than the seat")
        own = Own(
            slot, part.promise, self.ways.entropy(32), part.accepted.orders.digest, self.ways.recall(), part.identity
        )
        self.client, actions = machine.begin(terms, own)
        return actions

    def _carried_out(self, actions: tuple[machine.Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Remember):
                self.ways.remember(action.memory)
            elif isinstance(action, Send):
                if isinstance(action.message, Masked):
                    self.ways.holds()
                self.answer = message_blob(action.message)
                self.ways.leaves(NAMES[type(action.message).__name__], len(self.answer), digest_of(self.answer))
            else:
                raise SecureAggregationFailed(f"this client has left the masked sum: {action.reason}")
