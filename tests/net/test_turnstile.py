"""The turnstile and the line: a few at a time, the first in front, and nobody waits long for somebody slow."""

from __future__ import annotations

import asyncio

import pytest

from foedus.net.turnstile import Line, Turnstile

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_as_many_as_there_are_places_are_through_at_a_time() -> None:
    turnstile, inside, most = Turnstile(places=3, hold_s=60.0), 0, 0

    async def one() -> None:
        nonlocal inside, most
        async with turnstile.turn():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(one() for _ in range(20)))
    assert most == 3


async def test_the_first_to_come_are_the_first_to_be_through() -> None:
    turnstile, through = Turnstile(places=1, hold_s=60.0), []

    async def one(number: int) -> None:
        async with turnstile.turn():
            await asyncio.sleep(0)
            through.append(number)

    await asyncio.gather(*(one(number) for number in range(10)))
    assert through == list(range(10))


async def test_whoever_is_slow_holds_nobody_up_and_gives_its_place_back_once() -> None:
    turnstile, never = Turnstile(places=2, hold_s=0.001), asyncio.Event()

    async def slow() -> None:
        async with turnstile.turn():
            await never.wait()

    standing = [asyncio.create_task(slow()) for _ in range(6)]
    async with asyncio.timeout(20), turnstile.turn():
        pass
    for task in standing:
        task.cancel()
    await asyncio.gather(*standing, return_exceptions=True)
    assert turnstile._places._value == 2


async def test_those_in_line_go_on_one_by_one_and_nobody_waits_for_ever() -> None:
    line, gone = Line(), []

    async def one(number: int, seconds: float) -> None:
        await line.wait(seconds)
        gone.append(number)

    waiting = [asyncio.create_task(one(number, 0.01 if number == 1 else 60.0)) for number in range(4)]
    await asyncio.sleep(0)
    line.go_on()
    await waiting[1]
    assert gone == [0, 1], "the second has waited long enough"
    line.go_on()
    await waiting[2]
    assert gone == [0, 1, 2], "and is passed over"
    assert not waiting[3].done()
    for _ in range(3):
        line.go_on()
    await asyncio.gather(*waiting)
