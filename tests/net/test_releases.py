"""A server that asks again for what a client has noised is sent the same bytes, or nothing; and no more than an owner
allows. Whole agents, whose training takes place in real processes; what the files hold: ``owner/test_releases.py``."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import foedus as fd
from foedus.errors import Code
from foedus.net.identity.signed import sign
from foedus.net.memory import MemoryTransport
from foedus.net.owner.withdrawal import forget
from foedus.net.served import Rounds
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Message,
    Place,
    Problem,
    Received,
    Refused,
    Standing,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Window,
)

from .agents import DATA, URL, Client, Server, client, closing, killed_at, owner
from .federations import Caller
from .test_masked import EACH, MASKED, Patient, together

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

LOCAL = (
    "fd.fedavg(fd.local_sgd(0.1, batch_size=4), aggregator=fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=2.0), "
    "fd.mean()))"
)
ALONE: dict[str, Any] = {"each": Rounds(minimum=1, window=1e6, deadline=1e6)}
FREE = "[protections]\nleast_others = 0\n"
NOW = Window(after_s=0.0, until_s=0.1)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def updates(server: Server, position: int, round: int) -> list[str]:
    """Digests of what the owner's ledger says has left for a round."""
    entries = [entry.departure for entry in owner(server, position).ledger().entries()]
    return [e.digest for e in entries if e.round == round and e.what.startswith("update")]


class Lying(MemoryTransport):
    """A server that says otherwise than it is. ``lies`` gives an answer in place of the true one, or ``None``."""

    def __init__(self, server: Server, lies: Callable[[Message, Message], Message | None]) -> None:
        super().__init__(lambda: server.coordinator, Caller(0, "0"), server.time.now)
        self.lies = lies

    async def ask(self, message: Any) -> Any:
        answer = await super().ask(message)
        return self.lies(message, answer) or answer


def offered(server: Server) -> Callable[[Message], Accepted | None]:
    """What a server that lies says to whoever checks in: the first round's offer, always under a new key."""
    first: list[Accepted] = []
    count = itertools.count(1)

    def again(answer: Message) -> Accepted | None:
        if isinstance(answer, Accepted) and not first:
            first.append(answer)
        if not first:
            return None
        key = next(count).to_bytes(16, "big")
        return sign(server.signing, replace(first[0], key=key, held=None, signature=b""))

    return again


class Greedy(Lying):
    """Takes all that comes, and asks for the first round again whatever it was sent.

    ``ends`` says what becomes of a submission; ``stands`` how uploads stand that were not refused.
    """

    def __init__(self, server: Server, *, ends: Message | None = None, stands: Stands = Stands.DISCARDED) -> None:
        again, place = offered(server), Place(upload=b"u" * 16)

        def lies(message: Message, answer: Message) -> Message | None:
            match message:
                case CheckIn():
                    return again(answer)
                case StartUpload():
                    return place
                case Submit():
                    return ends or Received(later=NOW)
                case Ask():
                    found = tuple(Standing(key=key, state=stands) for key in message.keys)
                    return Standings(entries=found, later=NOW)
            return None

        super().__init__(server, lies)
        self.sent: list[bytes] = []

    async def send(self, upload: bytes, offset: int, content: bytes) -> int | Problem:
        self.sent.append(bytes(content))
        return offset + len(content)


async def asked_again(server: Server, greedy: Greedy, *, times: int = 6) -> Client:
    """A client whose first round is asked for again and again."""
    each = client(server, 0, rules=FREE, transport=greedy)
    async with closing(each):
        for _ in range(times):
            await each.agent.work(once=True)
            await each.agent.clock.rest(400.0)
    return each


@pytest.mark.parametrize("why", ["refused", "unknown key", "fatal", "discarded", "counted"])
async def test_whatever_becomes_of_them_a_round_has_the_same_noised_bytes(tmp_path: Path, why: str) -> None:
    server = Server(tmp_path, LOCAL, how=ALONE)
    ends: dict[str, Message] = {
        "refused": Refused(code=Code.NORM, told="no", later=NOW),
        "unknown key": Problem(code=Code.UNKNOWN_KEY, told="what key?"),
        "fatal": Problem(code=Code.FORBIDDEN, told="never", fatal=True),
    }
    stands = Stands.COUNTED if why == "counted" else Stands.DISCARDED
    greedy = Greedy(server, ends=ends.get(why), stands=stands)
    each = await asked_again(server, greedy)
    assert len(greedy.sent) > 2, each.said
    assert len(set(greedy.sent)) == 1, "the same bytes, and never others"
    assert len(set(updates(server, 0, 1))) == 1
    assert any("the same bytes are sent again" in told for told in each.said)
    assert owner(server, 0).releases().count("data") == 1


async def test_a_withdrawal_deletes_the_bytes_and_the_round_stays_released(tmp_path: Path) -> None:
    server, refused = Server(tmp_path, LOCAL, how=ALONE), Refused(code=Code.NORM, told="no", later=NOW)
    greedy = Greedy(server, ends=refused)
    await asked_again(server, greedy, times=1)
    folder = owner(server, 0)
    folder.consents().withdraw(URL, who="x", when=1.0)
    forget(folder, URL)
    folder.consents().give(URL, who="x", when=2.0)
    later = await asked_again(server, greedy, times=3)
    assert len(greedy.sent) == len(updates(server, 0, 1)) == 1
    assert any("noised afresh, the noise could be averaged out" in told for told in later.said)


async def test_what_has_begun_to_leave_is_not_encoded_anew(tmp_path: Path) -> None:
    """Where updates flow, the place says what one counts, and it is encoded for that: before its first byte leaves."""
    server = Server(tmp_path, LOCAL + ".with_(timing=fd.buffered(1))", how={"each": Rounds(minimum=1)})
    places = iter([1.0, 0.5, 0.25])
    sent: list[bytes] = []

    def lies(message: Message, answer: Message) -> Message | None:
        if isinstance(message, StartUpload) and (scale := next(places, None)) is not None:
            return Place(upload=b"u" * 16, scale=scale)
        return None

    class Forgetting(Lying):
        async def send(self, upload: bytes, offset: int, content: bytes) -> Any:
            sent.append(bytes(content))
            return Problem(code=Code.UNKNOWN_UPLOAD, told="what upload?")

    each = client(server, 0, rules=FREE, transport=Forgetting(server, lies))
    async with closing(each):
        await each.agent.work(once=True)
    assert len(set(sent)) == 1
    assert any("the update has begun to leave" in told for told in each.said)


async def test_a_stale_update_is_encoded_for_what_it_counts_before_it_leaves(tmp_path: Path) -> None:
    server = Server(tmp_path, LOCAL + ".with_(timing=fd.buffered(1))", how={"each": Rounds(minimum=1)})

    def lies(message: Message, answer: Message) -> Message | None:
        return replace(answer, scale=0.5) if isinstance(answer, Place) else None

    each = client(server, 0, rules=FREE, transport=Lying(server, lies))
    async with closing(each):
        await each.agent.work(once=True)
    assert len(updates(server, 0, 1)) == 1
    assert not any("declined" in told for told in each.said)


# --- honest servers -------------------------------------------------------------------------------------------


async def test_an_agent_killed_at_any_step_sends_one_noised_update_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foedus.net.agent.COOL_S", 1e9)  # one training process for all of them
    training = None
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        server = Server(folder, LOCAL, how=ALONE, only=1)
        first = client(server, 0, rules=FREE, training=training)
        training = first.agent.training
        if killed := await killed_at(first.agent, at, first.agent.work()):
            server.restarted()
            second = client(server, 0, training=training)
            await second.agent.work()
        state = server.learning.state
        assert state is not None
        assert (state.round, state.stopped) == (2, None)
        assert [len(set(updates(server, 0, round))) for round in (1, 2)] == [1, 1]
        assert owner(server, 0).releases().count("data") == 2
        if not killed:
            break
    await training.close()
    assert at > 15


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        (LOCAL, {}),
        (LOCAL + ".with_(timing=fd.buffered(2))", {"rounds": 4}),
        (LOCAL, {"evaluation": fd.Evaluation(clients=True)}),
    ],
    ids=["rounds", "buffered", "evaluated"],
)
def test_runs_with_noise_of_the_clients_end(tmp_path: Path, algorithm: str, more: dict[str, Any]) -> None:
    each = Rounds(minimum=2, clients=3, patience=1e4, deadline=1e6, window=1e4, retry=0.1)
    server = Server(tmp_path, algorithm, {"each": each, **more}, Patient())
    clients = [client(server, i, rules="[protections]\nleast_others = 1\n") for i in DATA]
    asyncio.run(together(server, *clients))
    state = server.learning.state
    assert state is not None
    assert state.round == server.learning.served.rounds
    for position in DATA:
        assert owner(server, position).releases().count("data") >= 1
        for round in range(1, state.round + 1):
            assert len(set(updates(server, position, round))) <= 1


# --- what an owner allows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "algorithm", "told", "rounds"),
    [
        ("[limits]\nnoised_uploads = 1\n", LOCAL, "1 updates with noise of this client's own have left", 1),
        ("most_client_epsilon = 5.5\n", LOCAL, "one update more would make it", 1),
        ("most_client_epsilon = 9.0\n", LOCAL, "", 2),
        ("most_client_epsilon = 9.0\n", "fd.fedavg(fd.local_sgd(0.1))", "has clients add no noise", 0),
        (
            "most_client_epsilon = 9.0\n",
            LOCAL.replace("fd.fedavg(", "fd.Algorithm(method=fd.lazy(share=0.0), client="),
            "to decide whether they send anything",
            0,
        ),
    ],
)
async def test_no_more_leaves_than_an_owner_allows(
    tmp_path: Path, rule: str, algorithm: str, told: str, rounds: int
) -> None:
    server = Server(tmp_path, algorithm, how={"each": Rounds(minimum=1, window=1e6, deadline=1e6)}, only=1)
    each = client(server, 0, rules=FREE + rule)
    async with closing(each):
        for _ in range(12):
            await each.agent.work(once=True)
            await each.agent.clock.rest(5.0)
    state = server.learning.state
    assert state is not None
    assert state.round == rounds, each.said
    assert any(told in line for line in each.said)
    assert owner(server, 0).releases().count("data") == rounds


def test_masked_sums_count_for_a_limit_and_attempts_do_not(tmp_path: Path) -> None:
    shares = "fd.privacy.gaussian_shares(clip=1.0, noise_multiplier=1.0, cohort=3, honest=2, bits=24)"
    masked = MASKED.replace("fd.clip(1.0)", shares).replace("least=2)", "least=2, planned=3)")
    server = Server(tmp_path, masked, {"each": EACH}, Patient())
    rules = "[protections]\nleast_others = 1\nsecure_others = 1\n[limits]\nnoised_uploads = 2\n"
    clients = [client(server, i, rules=rules) for i in DATA]
    asyncio.run(together(server, *clients))
    state = server.learning.state
    assert state is not None
    assert state.round == 2
    assert [owner(server, i).releases().count("data") for i in DATA] == [2, 2, 2]
