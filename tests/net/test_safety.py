"""Everything that somebody may send to a real server and should not: each gets a clear, typed answer, is counted, and
changes nothing.

The server is whole: TLS, the door, the coordinator, a run. One client behaves, another is hostile, and a third is
nobody. In the end the model is that of the honest ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

import foedus as fd
from foedus.net import api, http
from foedus.net.identity import visits
from foedus.net.serve import Server, blocking
from foedus.net.served import Rounds, Served
from foedus.net.serving import Serving
from foedus.net.transport import HttpTransport
from foedus.protocol import blob, wire
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Closed,
    Place,
    Problem,
    Received,
    Refused,
    Stands,
    StartUpload,
    Submit,
)  # fmt: skip
from foedus.rounds.freight import update_blob
from foedus.rounds.parcel import Carried, Parcel

SIZE = 6  # parameters of the model: logistic(2, 2)


class Client(NamedTuple):
    """Somebody who has joined, and speaks as they like."""

    raw: httpx.AsyncClient
    way: HttpTransport


class Open(NamedTuple):
    """A server with a run that goes on for ever."""

    server: Server
    folder: Path

    @property
    def url(self) -> str:
        return self.server._url(self.server.port)

    def counted(self, code: str) -> float:
        """What the metrics say of a code."""
        text = self.server.metrics.text().decode()
        found = re.findall(rf'^foedus_(?:problems|refused)_total{{code="{code}"}} ([\d.]+)$', text, re.MULTILINE)
        return sum(map(float, found))


@contextmanager
def opened(folder: Path, *, goal: int = 2, rounds: int = 1000, **settings: Any) -> Iterator[Open]:
    """A server on which rounds begin at once, with places for many more than the goal, and end when the goal is met."""
    task = fd.Task(fd.logistic(2, 2))
    each = Rounds(minimum=goal, deadline=3600.0, window=3600.0, over_selection=50.0)
    served = Served(
        name="run", task=task, algorithm=fd.fedavg(fd.local_sgd(0.1)), rounds=rounds, cohort=goal, each=each
    )
    given = {"port": 0, "progress": False, "names": ["localhost"], "uploads": 1 << 20} | settings
    server = Server([served], Serving(folder=folder / "server", **given))
    with server.store.begin() as rows:  # as many as there must be before a round begins; they never come
        for number in range(50 * goal):
            rows.put_client(rows.enrol(f"absent-{number}", bytes([number]) * 32, 0.0)._replace(examples=10))
    thread = threading.Thread(target=blocking, args=(server,), daemon=True)
    thread.start()
    while not server.uvicorn.started and thread.is_alive():
        threading.Event().wait(0.01)
    try:
        yield Open(server, folder)
    finally:
        server.uvicorn.should_exit = True
        server.uvicorn.force_exit = True
        thread.join(30)
        server.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with opened(tmp_path_factory.mktemp("safety")) as found:
        yield found


_NUMBERS = itertools.count()


def go(served: Open, work: Callable[[Client], Awaitable[Any]]) -> Any:
    """Join, and do something as that client."""

    async def whole() -> Any:
        called = f"c{next(_NUMBERS)}"
        mine = await visits.enrol(
            served.url, folder=served.folder / called, pin=served.server.authority.pin,
            token=served.server.invite(uses=1), name=called, now=time.time(),
        )  # fmt: skip
        async with visits.client(mine, clock=time.time) as raw:
            return await work(Client(raw, HttpTransport(raw)))

    return asyncio.run(whole())


async def accepted(client: Client) -> Accepted:
    for _ in range(200):
        found = await client.way.ask(CheckIn(examples=10))
        if isinstance(found, Accepted):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"never accepted: {found}")


def update(values: Any = None, **change: Any) -> bytes:
    """An update as clients send it."""
    vector = np.full(SIZE, 0.01, np.float32) if values is None else np.asarray(values)
    told: dict[str, Any] = {"weight": 10.0, "examples": 10, "steps": 1, "loss": 0.5} | change
    units, weight, examples = told.pop("units", 10 << 20), told.pop("weight"), told.pop("examples")
    message = {"values": vector, "weight": np.array([units], np.int64)}
    return update_blob(Parcel({"update": message}, {"update": Carried(len(vector), "<f4")}, weight, examples, **told))


async def sent(client: Client, told: Accepted, content: bytes, *, key: bytes | None = None) -> Any:
    """Upload some bytes and submit them; the last answer."""
    key, digest = key or told.key, hashlib.sha256(content).digest()
    place = await client.way.ask(StartUpload(key=key, size=len(content), digest=digest))
    if not isinstance(place, Place):
        return place
    stored = await client.way.send(place.upload, 0, content)
    if isinstance(stored, Problem):
        return stored
    return await client.way.ask(Submit(key=key, upload=place.upload, size=len(content), digest=digest))


# --- uploads that should not be ---------------------------------------------------------------------------------

NAN, BIG = float("nan"), 3e38
WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "not finite": (lambda: update(np.array([NAN] * SIZE, np.float32)), "not-finite"),
    "infinite": (lambda: update(np.array([np.inf] * SIZE, np.float32)), "not-finite"),
    "too short": (lambda: update(np.zeros(SIZE - 1, np.float32)), "wrong-shape"),
    "too long": (lambda: update(np.zeros(SIZE + 1, np.float32)), "wrong-shape"),
    "a matrix": (lambda: update(np.zeros((SIZE, 1), np.float32)), "wrong-shape"),
    "of another kind": (lambda: update(np.zeros(SIZE, np.int64)), "wrong-dtype"),
    "weightless": (lambda: update(weight=0.0), "weight"),
    "too heavy": (lambda: update(weight=1e30), "weight"),
    "too heavy where it counts": (lambda: update(units=2**62), "weight"),
    "heavier than it says": (lambda: update(units=20 << 20), "weight"),
    "of less than no weight where it counts": (lambda: update(units=-5), "weight"),
    "large enough to drown all others": (lambda: update(np.full(SIZE, BIG, np.float32)), "range"),
    "negative": (lambda: update(weight=-1.0), "weight"),
    "of no weight that is a number": (lambda: update(weight=NAN), "weight"),
    "no update at all": (lambda: b"\x00" * 200, "malformed"),
    "a header that lies": (lambda: struct.pack("<Q", 2**60) + b"{}", "too-large"),
    "a header only": (lambda: struct.pack("<Q", 2) + b"{}", "malformed"),
    "another kind of blob": (lambda: blob.pack({"vector": np.zeros(SIZE, "f4")}, {"kind": "orders"}), "malformed"),
    "another channel, too": (
        lambda: update_blob(Parcel({"update": {"values": np.zeros(SIZE, np.float32)}, "more": {"x": np.zeros(9)}},
                                   {"update": Carried(SIZE, "<f4")}, 10.0, 10)), "malformed"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_an_update_that_should_not_be_is_refused_and_counted(served: Open, what: str) -> None:
    make, code = WRONG[what]

    async def hostile(client: Client) -> Any:
        told = await accepted(client)
        before = served.counted(code)
        found = await sent(client, told, make())
        again = await client.way.ask(Ask(keys=(told.key,)))
        return found, again.entries[0].state, served.counted(code) - before

    found, state, counted = go(served, hostile)
    assert isinstance(found, Refused | Problem)
    assert found.code == code, found.told
    assert len(found.told) > 10
    assert state is Stands.DISCARDED or isinstance(found, Problem)
    assert counted == 1


@pytest.mark.slow
def test_a_replay_is_answered_the_same_and_counts_once(served: Open) -> None:
    async def twice(client: Client) -> Any:
        told, content = await accepted(client), update()
        first = await sent(client, told, content)
        before = served.server.coordinator.runs()[0]["received"]
        return first, await sent(client, told, content), before, served.server.coordinator.runs()[0]["received"]

    first, second, before, after = go(served, twice)
    assert isinstance(first, Received)
    assert isinstance(second, Received | Closed)
    assert before == after


@pytest.mark.slow
def test_another_clients_key_or_upload_is_as_though_it_were_not_there(served: Open) -> None:
    kept: dict[str, Any] = {}

    async def honest(client: Client) -> None:
        kept["told"] = await accepted(client)
        content = update()
        digest = hashlib.sha256(content).digest()
        kept["place"] = await client.way.ask(StartUpload(key=kept["told"].key, size=len(content), digest=digest))

    async def thief(client: Client) -> Any:
        stolen = await sent(client, kept["told"], update())
        written = await client.way.send(kept["place"].upload, 0, b"garbage")
        asked = await client.way.ask(Ask(keys=(kept["told"].key,)))
        peeked = await client.raw.head(api.upload_path(kept["place"].upload))
        return stolen, written, asked.entries[0].state, peeked.status_code

    go(served, honest)
    stolen, written, state, peeked = go(served, thief)
    assert isinstance(stolen, Closed | Problem)
    assert isinstance(written, Problem)
    assert written.code == "unknown-upload"
    assert state is Stands.DISCARDED  # as any key that nobody knows
    assert peeked == 404


@pytest.mark.slow
def test_uploads_are_bounded_one_by_one_and_together(served: Open) -> None:
    async def greedy(client: Client) -> list[Any]:
        told = await accepted(client)
        found: list[Any] = [await client.way.ask(StartUpload(key=told.key, size=2**40, digest=bytes(32)))]
        place = await client.way.ask(StartUpload(key=told.key, size=100, digest=bytes(32)))
        assert isinstance(place, Place)
        found.append(await client.way.send(place.upload, 0, bytes(101)))
        found.append(await client.way.send(place.upload, 50, bytes(10)))
        found.append(await client.way.ask(Submit(key=told.key, upload=place.upload, size=100, digest=bytes(32))))
        await client.way.send(place.upload, 0, bytes(100))
        found.append(await client.way.ask(Submit(key=told.key, upload=place.upload, size=100, digest=bytes(32))))
        return found

    codes = [each.code for each in go(served, greedy)]
    assert codes == ["too-large", "too-large", "wrong-offset", "wrong-offset", "wrong-digest"]
    assert served.server.coordinator.uploads.taken < 10_000  # nothing was set aside for what was refused


@pytest.mark.slow
def test_memory_for_uploads_that_are_begun_and_left_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many begin large uploads and send nothing: others are told to come back, and nobody's memory grows."""
    monkeypatch.setattr(http, "HELD", 0.3)
    with opened(tmp_path, uploads=1000) as served:

        async def hoarder(client: Client) -> Any:
            told = await accepted(client)
            return await client.way.ask(StartUpload(key=told.key, size=600, digest=bytes(32)))

        first, second = go(served, hoarder), go(served, hoarder)
        assert isinstance(first, Place)
        assert (second.code, second.fatal) == ("overloaded", False)
        assert served.server.coordinator.uploads.taken == 600
        served.server.coordinator.uploads.tidy(now=time.time() + 3600)
        assert served.server.coordinator.uploads.taken == 0


# --- requests that should not be ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_messages_that_are_none_are_told_by_code(served: Open) -> None:
    cases: list[tuple[bytes, int, str]] = [
        (b"", 400, "malformed"),
        (b"\xc1", 400, "malformed"),
        (b"\x91" * 1000, 400, "malformed"),
        (wire.encode(Submit(key=b"k" * 16, upload=b"u" * 16, size=1, digest=bytes(32))), 400, "malformed"),
        (wire.encode(Received(later=api_window())), 400, "malformed"),
        (wire.encode(CheckIn()).replace(b"\x94\x01", b"\x94\x63", 1), 400, "wrong-version"),
        (bytes(wire.MOST + 1), 413, "too-large"),
    ]

    async def hostile(client: Client) -> list[tuple[int, str, float]]:
        found = []
        for content, _, code in cases:
            before = served.counted(code)
            response = await client.raw.post("/v1/check-in", content=content)
            problem = wire.decode(response.content)
            assert isinstance(problem, Problem)
            found.append((response.status_code, str(problem.code), served.counted(code) - before))
        return found

    for (content, status, code), found in zip(cases, go(served, hostile), strict=True):
        assert found == (status, code, 1.0), content[:40]


def api_window() -> Any:
    from foedus.protocol.messages import Window

    return Window(after_s=0, until_s=0)


@pytest.mark.slow
def test_addresses_that_are_none_are_told_by_code(served: Open) -> None:
    async def hostile(client: Client) -> list[tuple[int, bytes]]:
        found = []
        for method, path in (
            ("GET", "/v1/blobs/" + "0" * 64),
            ("GET", "/v1/blobs/" + "0" * 63),
            ("GET", "/v1/blobs/..%2f..%2fetc%2fpasswd"),
            ("GET", "/v1/blobs/" + "é" * 32),
            ("PUT", "/v1/uploads/" + "0" * 32),
            ("PUT", "/v1/uploads/" + "0" * 32 + "?offset=-1"),
            ("PUT", "/v1/uploads/" + "0" * 32 + "?offset=99999999999999999999"),
            ("GET", "/v1/runs/nothing"),
            ("GET", "/v1/runs/run/..%2frun.json"),
            ("GET", "/v1/runs/run/metrics.jsonl?after=x"),
            ("DELETE", "/v1/check-in"),
            ("GET", "/v1/../../etc/passwd"),
        ):
            response = await client.raw.request(method, path, content=b"x" if method == "PUT" else None)
            found.append((response.status_code, response.content))
        return found

    for status, content in go(served, hostile):
        assert status in (400, 404, 405)
        assert b"Traceback" not in content
        assert b"root:" not in content


@pytest.mark.slow
def test_who_has_no_ticket_learns_nothing(served: Open) -> None:
    """Not even whether a blob, an upload or a run is there; what is open is open on purpose."""
    import ssl

    context = ssl.create_default_context(cafile=str(served.server.authority.folder / "authority.pem"))
    with httpx.Client(verify=context, base_url=served.url) as nobody:
        before = served.counted("unauthenticated")
        for method, path in (
            ("GET", f"/v1/blobs/{'0' * 64}"), ("PUT", f"/v1/uploads/{'0' * 32}"), ("HEAD", f"/v1/uploads/{'0' * 32}"),
            ("GET", "/v1/runs"), ("GET", "/v1/runs/run"), ("GET", "/v1/runs/run/metrics.jsonl"),
        ):  # fmt: skip
            assert nobody.request(method, path).status_code == 401
        for kind, path in api.PATHS.items():
            message = {Submit: Submit(key=bytes(16), upload=bytes(16), size=0, digest=bytes(32)), CheckIn: CheckIn(),
                       Ask: Ask(keys=()), StartUpload: StartUpload(key=bytes(16))}.get(kind)  # fmt: skip
            if message is not None:
                assert nobody.post(path, content=wire.encode(message)).status_code == 401
        assert served.counted("unauthenticated") - before == 10
        for path in ("/health", "/leading", "/metrics", "/openapi.json", "/v1/authority"):
            assert nobody.get(path).status_code == 200


@pytest.mark.slow
def test_an_upload_that_comes_late_is_told_so_and_not_counted(tmp_path: Path) -> None:
    """The round has ended without it; the model does not change, and the client is told when to come back."""
    with opened(tmp_path, goal=1, rounds=1, stay=True) as served:

        async def slow(client: Client) -> Any:
            told = await accepted(client)
            mine = served.server.coordinator

            async def quick(other: Client) -> Any:
                return await sent(other, await accepted(other), update())

            await asyncio.to_thread(go, served, quick)
            while mine.runs()[0]["round"] < 1:
                await asyncio.sleep(0.01)
            found = await sent(client, told, update(np.ones(SIZE, np.float32)))
            state = (await client.way.ask(Ask(keys=(told.key,)))).entries[0].state
            return found, state

        found, state = go(served, slow)
        assert isinstance(found, Closed)
        assert found.why in ("goal-reached", "late", "attempt-over", "run-over")
        assert state is Stands.DISCARDED
        np.testing.assert_allclose(served.server.coordinator.learnings[0].state.weights.vector, 0.01, rtol=1e-6)


@pytest.mark.slow
def test_after_all_of_this_the_model_is_the_honest_ones(tmp_path: Path) -> None:
    """A round with two honest clients and eight hostile ones: the mean of the two, to the bit."""
    with opened(tmp_path, rounds=1, stay=True) as served:
        for what in ("not finite", "too long", "too heavy", "no update at all", "a header that lies", "a matrix"):

            async def hostile(client: Client, what: str = what) -> None:
                await sent(client, await accepted(client), WRONG[what][0]())

            go(served, hostile)
        for value in (0.25, 0.75):

            async def honest(client: Client, value: float = value) -> None:
                found = await sent(client, await accepted(client), update(np.full(SIZE, value, np.float32)))
                assert isinstance(found, Received)

            go(served, honest)
        for _ in range(500):
            if served.server.coordinator.runs()[0]["round"] == 1:
                break
            time.sleep(0.01)
        assert served.server.coordinator.learnings[0].state.weights.vector.tolist() == [0.5] * SIZE
