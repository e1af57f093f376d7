"""Who is served first when all come at once: one after the other, and not all of them a little at a time.

At the beginning of a round every client wants the same large model in the same moment. Given all of them a little at a
time, all have it in the end of that time, all train and send at once, and the parts of a server wait for each other.
Given one after the other, the first is sending while the last still fetches. Whoever is slow holds its place for a
moment only, so that nobody waits for a slow line.

Not here: how many may be connected (``connections.py``), how much memory uploads have (``uploads.py``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Turnstile:
    """Lets a few through at a time.

    Args:
        places: how many.
        hold_s: seconds after which a place is free for the next, whether its holder is through or not.
    """

    def __init__(self, *, places: int = 4, hold_s: float = 0.1) -> None:
        self._places, self._hold_s = asyncio.Semaphore(places), hold_s

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place, and have it for a while."""
        await self._places.acquire()
        held = [self._places]

        def free() -> None:
            if held:
                held.pop().release()

        timer = asyncio.get_running_loop().call_later(self._hold_s, free)
        try:
            yield
        finally:
            timer.cancel()
            free()


class Line:
    """Those who wait until there is room again, the first in front.

    Whenever something was done that may have made room, the first is let go on; it looks for itself, which costs
    less than to know beforehand, and stands in front again if it looked in vain.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self, seconds: float, *, front: bool = False) -> None:
        """Stand in line until it is one's turn, or for so long; in front, whose turn it was in vain."""
        turn = asyncio.get_running_loop().create_future()
        if front:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        with suppress(TimeoutError):
            await asyncio.wait_for(turn, seconds)

    def go_on(self) -> None:
        """Let the first go on."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


__all__ = ["Line", "Turnstile"]
