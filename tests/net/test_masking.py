"""Masked sums over messages, with the real cryptography and without training: who is lost at each stage, a server that
dies at each stage, and what nobody should send."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography")

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.aggregate import fold
from foedus.core.lazy import lazy
from foedus.core.method import plain
from foedus.core.values import Context, Update
from foedus.errors import (
    ConfigurationError,
    IncompatibleStages,
    NoGuarantee,
    ProtocolError,
    SecureAggregationFailed,
    Unreachable,
)
from foedus.net.blobs import open_blobs
from foedus.net.conferring import Part, Ways, take_part
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.learning import Learning
from foedus.net.memory import MemoryTransport
from foedus.net.owner.peers import identity
from foedus.net.served import Rounds, Served
from foedus.net.store import open_store
from foedus.privacy.accounting import rdp
from foedus.privacy.distributed import gaussian_shares, skellam_shares, trusted_sum
from foedus.privacy.ledger import Budget, of_ledger_state
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Closed,
    Confer,
    Decline,
    Later,
    Message,
    Place,
    Problem,
    Standings,
    Stands,
    StartUpload,
    Turn,
)
from foedus.protocol.round import read
from foedus.protocol.secagg.client import Memory
from foedus.protocol.secagg.freight import message_blob
from foedus.protocol.secagg.messages import Vote, session_of
from foedus.protocol.secagg.server import Phase
from foedus.rounds.masks import promise_of

from .federations import Caller, counted

COUNT = 5
RULE = fd.masked(fd.Withstand(clients=COUNT, corrupt=0.0, dropouts=0.4), least=3, bits=20, bound=4.0)
LEAVES = ("keys", "sealed", "under masks", "off the sum")  # what a client sends, told by words in the ledger's lines


class Died(Exception):
    """A client's process was killed."""


@dataclass
class World:
    """A coordinator and its clients on virtual time, which passes when all of them rest."""

    rule: fd.Aggregator = RULE
    rounds: int = 1
    how: dict[str, Any] = field(default_factory=dict)  # more of what is served
    dies: dict[int, str] = field(default_factory=dict)  # position → at what it dies, once
    crash: str = ""  # what makes the server die, once
    now: float = 1000.0
    memories: dict[int, Memory] = field(default_factory=dict)
    joined: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (position, round) → attempts
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store, self.blobs = open_store("sqlite://"), open_blobs(f"memory://masking{next(_PLACES)}")
        with self.store.begin() as rows:
            for position in range(COUNT):
                found = rows.enrol(str(position), str(position).encode(), 0.0)
                rows.put_client(found._replace(examples=self.examples(position)))
        self.task, self.algorithm = self.learned()
        self.resting: list[tuple[float, int, asyncio.Future[None]]] = []
        self.numbers_ = itertools.count()
        self.models: dict[int, Any] = {}
        self.restarted()

    def examples(self, position: int) -> int:
        return 3

    def learned(self) -> tuple[fd.Task, fd.Algorithm]:
        return fd.Task(fd.linear(2)), fd.fedavg(fd.local_sgd(0.1), aggregator=self.rule)

    async def settled(self, position: int, transport: MemoryTransport) -> None:
        """What a client asks before it checks in."""

    def holds(self, position: int, seat: Accepted) -> None:
        """What a client writes down before its masked numbers leave."""

    def interrupted(self, position: int, seat: Accepted) -> bool:
        """Whether its numbers had left in this seat already, before it was killed."""
        return False

    def restarted(self) -> None:
        each = Rounds(minimum=3, clients=COUNT, patience=10.0, deadline=400.0, window=20.0, retry=1.0, attempts=8)
        how: dict[str, Any] = {"rounds": self.rounds, "seed": 1, "each": each} | self.how
        served = Served(name="run", task=self.task, algorithm=self.algorithm, **how)
        ground = Ground(store=self.store, blobs=self.blobs, secret=counted(int(self.now * 100)), pause=0.1)
        self.learning = Learning(served, open_trainer(self.task, seed=1))
        self.coordinator = Coordinator(ground, [self.learning])
        self.coordinator.load(self.now)
        self.coordinator.tick(self.now)

    async def rest(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        heapq.heappush(self.resting, (self.now + max(0.01, seconds), next(self.numbers_), done))
        await done

    def ask(self, position: int, message: Message) -> Message:
        return asyncio.run(self.transport(position).ask(message))  # type: ignore[arg-type]

    @property
    def over(self) -> bool:
        return self.coordinator.runs()[0]["phase"] == "over"

    def transport(self, position: int) -> MemoryTransport:
        return MemoryTransport(lambda: self.coordinator, Caller(position, str(position)), lambda: self.now)

    async def alone(self, position: int) -> None:
        """One client: checks in until the run is over; killed, it begins anew with what is on its disk."""
        transport = self.transport(position)
        while not self.over:
            await self.settled(position, transport)
            seat = await transport.ask(CheckIn(run="run", examples=self.examples(position)))
            if not isinstance(seat, Accepted):
                await self.rest(1.0)
                continue
            if self.interrupted(position, seat):
                await transport.ask(Decline(key=seat.key, reason="interrupted"))
                await self.rest(5.0)
                continue
            part = Part(seat, promise_of(self.learning._terms(-1)), session_of(b"", "run"), None)
            try:
                await take_part(part, self.ways(position, seat, transport), lambda s=seat: self.update(position, s))
            except (Died, SecureAggregationFailed) as error:
                self.ended.append(f"{position}: {error}")
                if isinstance(error, SecureAggregationFailed):
                    await transport.ask(Decline(key=seat.key, reason="secure-aggregation"))
                await self.rest(5.0)
        await self.settled(position, transport)

    def ways(self, position: int, seat: Accepted, transport: Any) -> Ways:
        def leaves(what: str, size: int, digest: bytes) -> None:
            if self.dies.get(position) and self.dies[position] in what:
                del self.dies[position]
                raise Died("killed")
            if self.crash and self.crash in what:
                self.crash = ""
                self.restarted()

        def remember(memory: Memory) -> None:
            self.memories[position] = memory
            attempts = self.joined.setdefault((position, memory.round), [])
            if memory.attempt not in attempts:
                assert not any(self.answered.get((position, memory.round, a)) for a in attempts), "answered twice"
                attempts.append(memory.attempt)
            if memory.answered:
                self.answered[position, memory.round, memory.attempt] = True

        return Ways(
            transport, lambda: self.now, self.rest, lambda: 0.5,
            lambda n: hashlib.sha256(f"{position} {next(self.numbers_)}".encode()).digest()[:n],
            lambda: self.memories.get(position), remember, leaves, lambda: self.holds(position, seat),
        )  # fmt: skip

    answered: dict[tuple[int, int, int], bool] = field(default_factory=dict)

    def own(self, position: int, number: int) -> Any:
        """What a client adds up in a round: its own vector."""
        rng = np.random.default_rng((position, number))
        context = Context(1, number, position, size=3, secret=known_to_all_who_know_the_seed)
        return self.rule.encode(Update(rng.normal(size=3).astype(np.float32), 1.0), context), context

    async def update(self, position: int, seat: Accepted) -> Any:
        message, context = self.own(position, seat.round)
        return (self.rule.admit(message, context)["sum"],)

    def live(self) -> None:
        """Until the run is over."""

        async def all_of_them() -> None:
            tasks = [asyncio.ensure_future(self.alone(position)) for position in range(COUNT)]
            for _ in range(20_000):
                for _ in range(30):
                    await asyncio.sleep(0)
                if all(task.done() for task in tasks):
                    break
                if self.resting:
                    self.now, _, done = heapq.heappop(self.resting)
                    self.coordinator.tick(self.now)
                    if not done.done():
                        done.set_result(None)
            for task in tasks:
                assert task.done(), "the federation does not end"
                task.result()

        asyncio.run(all_of_them())

    def expected(self, positions: Sequence[int], number: int = 1) -> Any:
        """The mean of some clients' vectors, as the aggregator makes it in the plain."""
        pairs = [self.own(position, number) for position in positions]
        total = fold(self.rule, [self.rule.admit(message, context) for message, context in pairs])
        assert total is not None
        return self.rule.decode({}, total, pairs[0][1])[0]

    @property
    def vector(self) -> Any:
        assert self.learning.state is not None
        return self.learning.state.weights.vector

    def counted(self, number: int = 1) -> list[int]:
        with self.store.begin() as rows:
            return sorted(rows.counted("run", number))


_PLACES = itertools.count()


def test_everybody_is_in_the_sum() -> None:
    world = World()
    world.live()
    assert world.counted() == list(range(COUNT))
    np.testing.assert_array_equal(world.vector, world.expected(range(COUNT)).astype(np.float32))


class Lied(World):
    """A world in which one client adds what it likes to the first round's sum."""

    async def update(self, position: int, seat: Accepted) -> Any:
        (numbers,) = await super().update(position, seat)
        if position == 3 and seat.round == 1:
            assert self.rule.masking is not None
            numbers[0] = 1 << self.rule.masking.width - 1
        return (numbers,)


def test_a_sum_that_cannot_be_one_ends_its_round_and_no_other() -> None:
    """It was opened, so that nobody answers for that round again; the next one goes on with the model as it was."""
    world = Lied(rounds=2)
    world.live()
    assert world.learning.state is not None
    assert world.learning.state.round == 2
    assert world.counted(1) == []
    assert world.joined[0, 1] == [1], "one attempt"
    assert world.counted(2) == list(range(COUNT))
    np.testing.assert_array_equal(world.vector, world.expected(range(COUNT), 2).astype(np.float32))


class Emptied(World):
    """A world in which one client has nothing to train on any more when the round begins."""

    def examples(self, position: int) -> int:
        begun = hasattr(self, "coordinator")
        return 0 if begun and position == 3 else 3


def test_who_has_nothing_to_train_on_any_more_is_not_waited_for() -> None:
    """It was drawn; the others mask among themselves, without waiting for the end of the window."""
    world = Emptied()
    assert world.coordinator.runs()[0]["phase"] == "selecting"
    begin = world.now
    world.live()
    assert world.counted() == [0, 1, 2, 4]
    assert world.joined[0, 1] == [1], "one attempt"
    assert world.now - begin < 20.0, "the window"
    np.testing.assert_array_equal(world.vector, world.expected([0, 1, 2, 4]).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("at", LEAVES)
def test_clients_are_lost_at_every_stage(at: str) -> None:
    world = World(dies={1: at, 3: at})
    world.live()
    there = world.counted()
    assert set(there) >= {0, 2, 4}
    if at != "off the sum":  # of those killed while answering, the numbers are in the sum
        assert there == [0, 2, 4]
    np.testing.assert_array_equal(world.vector, world.expected(there).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("at", LEAVES[:3])
def test_below_the_floor_nothing_is_shown_and_the_round_is_tried_again(at: str) -> None:
    world = World(dies={1: at, 2: at, 3: at})
    world.live()
    assert world.counted() == list(range(COUNT))  # in the next attempt all were there
    assert max(world.joined[0, 1]) >= 2
    np.testing.assert_array_equal(world.vector, world.expected(range(COUNT)).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("at", LEAVES)
def test_a_server_dies_at_every_stage(at: str) -> None:
    world = World(crash=at, rounds=2)
    world.live()
    assert world.learning.state is not None
    assert world.learning.state.round == 2
    first, second = world.counted(1), world.counted(2)
    assert second == list(range(COUNT))
    if at == "off the sum":  # masks had been asked for: whoever answers takes part in no other attempt of that round
        assert first == []
        np.testing.assert_array_equal(world.vector, world.expected(second, 2).astype(np.float32))
    else:
        assert first == list(range(COUNT))
        assert max(world.joined[0, 1]) == 2


def seated(world: World, position: int = 0) -> Accepted:
    found = world.ask(position, CheckIn(run="run", examples=3))
    assert isinstance(found, Accepted)
    return found


def begun(world: World) -> list[Accepted]:
    """All have a seat, and their first turn waits for them."""
    found = [seated(world, position) for position in range(COUNT)]
    world.coordinator.tick(world.now)
    return found


def told(world: World, position: int, seat: Accepted, content: bytes, turn: int) -> Message:
    place = world.ask(position, StartUpload(key=seat.key, size=len(content), digest=hashlib.sha256(content).digest()))
    assert isinstance(place, Place)
    world.coordinator.uploads.write(place.upload, 0, content, owner=position, now=world.now)
    digest = hashlib.sha256(content).digest()
    return world.ask(position, Confer(key=seat.key, turn=turn, upload=place.upload, size=len(content), digest=digest))


def test_a_turn_is_for_one_client_alone() -> None:
    world = World()
    seats = begun(world)
    first = world.ask(0, Confer(key=seats[0].key))
    assert isinstance(first, Turn)
    assert world.coordinator.blob(Caller(0, "0"), first.body.digest)
    with pytest.raises(Exception, match="not given out"):
        world.coordinator.blob(Caller(1, "1"), first.body.digest)
    assert isinstance(stranger := world.ask(1, Confer(key=seats[0].key)), Problem)
    assert stranger.fatal


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nonsense", "header"),
        (message_blob(Vote(bytes(64))), "no Keys"),
        (bytes(8) + b"{}", ""),
    ],
    ids=["no blob", "another message", "an empty header"],
)
def test_malformed_answers_change_nothing(content: bytes, says: str) -> None:
    world = World()
    seats = begun(world)
    answer = told(world, 0, seats[0], content, 1)
    assert isinstance(answer, Problem)
    assert says in answer.told
    world.live()
    assert world.counted() == list(range(COUNT))


def test_who_gave_its_seat_back_while_a_sum_was_being_opened_may_be_in_it() -> None:
    """Its numbers came before: what it keeps is not to be thrown away until it is known."""
    world = World()
    seats = begun(world)
    masked = world.coordinator.courses()[0].masked
    assert masked is not None
    everybody = np.ones(COUNT, bool)
    masked.state = masked.state._replace(
        phase=Phase.ANSWERS, shared=everybody, survivors=everybody, came=~everybody, have=np.zeros((COUNT, COUNT), bool)
    )
    world.ask(0, Decline(key=seats[0].key, reason="interrupted"))
    assert standing(world, seats[0]) is Stands.PENDING
    for seat in seats[1:]:
        world.ask(seat.position, Decline(key=seat.key, reason="rules"))
    world.coordinator.tick(world.now)
    assert world.coordinator.courses()[0].masked is None, "too few are left"
    assert standing(world, seats[0]) is Stands.DISCARDED


def standing(world: World, seat: Accepted) -> Stands:
    answer = world.ask(seat.position, Ask(keys=(seat.key,)))
    assert isinstance(answer, Standings)
    return answer.entries[0].state


@dataclass
class Slow(World):
    """One client fetches slowly what it is told; what is gone by then looks like a server that is not there, as over
    HTTP, or is said to be gone."""

    over_http: bool = True

    def transport(self, position: int) -> MemoryTransport:
        found = super().transport(position)
        plain = found.fetch

        async def fetch(blob: Any) -> bytes:
            await self.rest(6.0)
            try:
                return await plain(blob)
            except ProtocolError as error:
                self.ended.append("gone")
                if self.over_http:
                    raise Unreachable(str(error)) from error
                raise

        if position == 0:
            found.fetch = fetch  # type: ignore[method-assign]
        return found


@pytest.mark.parametrize("over_http", [True, False])
def test_whose_answer_is_not_waited_for_is_told_that_it_is_over(over_http: bool) -> None:
    """The others' shares are enough: what it was to answer is gone before it has fetched it."""
    world = Slow(over_http=over_http)
    world.live()
    assert world.counted() == list(range(COUNT))
    assert world.ended == ["gone"]
    assert world.now < 1100, "long before the round's deadline"


def test_updates_in_the_plain_are_not_looked_at() -> None:
    from foedus.protocol.messages import Submit

    world = World()
    seats = begun(world)
    answer = world.ask(0, Submit(key=seats[0].key, upload=bytes(16), size=0, digest=bytes(32)))
    assert isinstance(answer, Problem)
    assert "masked sums only" in answer.told


def test_whoever_is_not_in_the_attempt_is_closed() -> None:
    world = World()
    seat = seated(world)
    assert isinstance(world.ask(0, Confer(key=seat.key)), Later)  # others are awaited
    assert isinstance(world.ask(0, Confer(key=bytes(16))), Closed)


def test_a_place_that_becomes_free_is_no_slot_in_the_attempt_under_way() -> None:
    """Nobody is seated who could only train for nothing: keys have been asked for among the others."""
    world = World(how={"cohort": 4})
    seats = [seated(world, position) for position in range(4)]
    world.coordinator.tick(world.now)
    world.ask(0, Decline(key=seats[0].key, reason="rules"))
    assert isinstance(answer := world.ask(4, CheckIn(run="run", examples=3)), Later)
    assert "lets nobody else in" in answer.reason
    assert isinstance(world.ask(1, Confer(key=seats[1].key)), Turn)
    assert isinstance(world.ask(0, StartUpload(key=seats[0].key, size=9)), Closed), "nothing more is awaited of it"
    assert world.coordinator.uploads.taken == 0


def test_no_turn_that_asks_for_masks_is_given_before_that_is_written() -> None:
    """Whoever asks next, answering or not, is told nothing that a restarted server would not know of."""
    world = World()
    seats = begun(world)
    masked = world.coordinator.courses()[0].masked
    assert masked is not None
    masked.state = masked.state._replace(phase=Phase.VOTES)  # the last that was awaited is gone a moment ago
    assert isinstance(world.ask(0, Confer(key=seats[0].key)), Turn)
    with world.store.begin() as rows:
        row = rows.run("run")
    assert row is not None
    assert read(row.state, ()).opening


OTHERS = fd.masked(fd.Withstand(clients=COUNT, corrupt=0.2, dropouts=0.2), least=3)
LOCAL = fd.local_sgd(0.1)


def strange() -> fd.Algorithm:
    """A method of the user's own, which does not say how long its channel is."""
    method = fd.Method(plain, "mine()", sides={"more": RULE})
    return fd.Algorithm(client=LOCAL, method=method, aggregator=RULE)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: fd.fednova(LOCAL, aggregator=RULE), "sends 'length' beside the update, by mean"),
        (lambda: fd.fednova(LOCAL).with_(sides={"length": RULE}), "'update' travel beside it in the plain"),
        (lambda: fd.fednova(LOCAL).with_(aggregator=RULE, sides={"length": OTHERS}), "Give all channels the same"),
        (lambda: fd.fednova(LOCAL).with_(sides={"control": RULE}), "'control', which has no aggregator"),
        (lambda: fd.fednova(LOCAL).with_(sides={"update": RULE}), r"with_\(aggregator="),
        (strange, r"'more' beside the update, and does not say .*lengths=lambda layout: \{'more': layout.size\}"),
        (lambda: fd.Algorithm(client=LOCAL, method=lazy(share=0.1), aggregator=RULE), "clients send nothing at times"),
        (lambda: fd.fedavg(LOCAL, aggregator=RULE, timing=fd.hierarchical(2)), "open the sums of all edges"),
    ],
    ids=["a side", "the update", "withstand", "no side", "no such side", "unknown length", "silence", "edges"],
)
def test_what_would_travel_in_the_plain_is_refused(made: Callable[[], fd.Algorithm], says: str) -> None:
    task = fd.Task(fd.linear(2))
    with pytest.raises((IncompatibleStages, ConfigurationError), match=says):
        Learning(Served(name="run", task=task, algorithm=made(), rounds=1), open_trainer(task, seed=0))


def test_a_cohort_without_room_is_refused() -> None:
    task = fd.Task(fd.linear(2))
    algorithm = fd.fedavg(fd.local_sgd(0.1), aggregator=RULE)
    with pytest.raises(ConfigurationError, match="adds up from 3 to 5"):
        Learning(Served(name="run", task=task, algorithm=algorithm, rounds=1, cohort=6), open_trainer(task, seed=0))


def test_a_cohort_too_small_for_what_is_promised_is_refused() -> None:
    """4 of 10 may collude, and still do where 6 are asked."""
    task = fd.Task(fd.linear(2))
    rule = fd.masked(fd.Withstand(clients=10, corrupt=0.4, dropouts=0.4), least=6)
    algorithm = fd.fedavg(fd.local_sgd(0.1), aggregator=rule)
    with pytest.raises(NoGuarantee, match="6 clients are asked, and all 4 that may collude"):
        Learning(Served(name="run", task=task, algorithm=algorithm, rounds=1, cohort=6), open_trainer(task, seed=0))


def test_a_deadline_that_leaves_no_time_to_train_is_refused() -> None:
    """Everybody would be taken for lost as soon as numbers are waited for, in every attempt."""
    with pytest.raises(ConfigurationError, match="leaves no time to train"):
        World(how={"each": Rounds(minimum=3, clients=COUNT, patience=60.0, deadline=100.0, window=50.0)})


# --- shares of noise under masks, and a budget --------------------------------------------------------------

TOLD: dict[str, Any] = {
    "clip": 0.5, "noise_multiplier": 3.0, "cohort": COUNT, "honest": 3, "bits": 24, "rotated": False,
}  # fmt: skip
WITHSTAND = fd.Withstand(clients=COUNT, corrupt=0.0, dropouts=0.4)
DELTA = 1e-5


def noisy(paid: int, shares: Any = gaussian_shares, how: dict[str, Any] | None = None, **changes: Any) -> World:
    """Every client adds a share of the noise, and the budget is for so many rounds."""
    rule = fd.chain(shares(**TOLD), fd.masked(WITHSTAND, least=3, planned=COUNT))
    budget = Budget(epsilon=rdp([(rule.event, paid)], DELTA) * 1.0001, delta=DELTA)
    given: dict[str, Any] = {"rounds": 4, "how": {"budget": budget} | (how or {})}
    return World(rule, **given | changes)


def charged(world: World) -> int:
    assert world.learning.state is not None
    ledger = of_ledger_state(world.learning.state.privacy)
    assert all(event == world.rule.event for event, _ in ledger.counts)
    return sum(count for _, count in ledger.counts)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [gaussian_shares, skellam_shares])
def test_shares_of_noise_are_charged_and_a_run_ends_before_its_budget_would_be_exceeded(shares: Any) -> None:
    world = noisy(2, shares)
    world.live()
    assert world.learning.state is not None
    assert (world.learning.state.round, charged(world)) == (2, 2)
    assert "budget is spent" in str(world.learning.state.stopped)
    both = world.expected(range(COUNT), 1) + world.expected(range(COUNT), 2)
    np.testing.assert_allclose(world.vector, both, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at", LEAVES)
def test_a_round_is_paid_for_once_however_often_it_is_tried_and_also_if_it_is_lost(at: str) -> None:
    world = noisy(2, crash=at)
    world.live()
    assert world.learning.state is not None
    assert (world.learning.state.round, charged(world)) == (2, 2)
    lost = at == "off the sum"  # masks had been asked for: the sum may have been seen, and there is no model of it
    assert world.counted(1) == ([] if lost else list(range(COUNT)))
    assert len(world.joined[0, 1]) == (1 if lost else 2)


@pytest.mark.slow
@pytest.mark.parametrize("at", LEAVES[:3])
def test_fewer_shares_than_planned_are_never_decoded(at: str) -> None:
    world = noisy(1, dies={1: at, 2: at, 3: at})
    world.live()
    assert world.counted() == list(range(COUNT))  # in the next attempt all were there
    assert charged(world) == 1
    np.testing.assert_array_equal(world.vector, world.expected(range(COUNT)).astype(np.float32))


@pytest.mark.slow
def test_the_planned_dropouts_leave_more_noise_than_was_promised_and_cost_no_less() -> None:
    world = noisy(1, dies={1: "under masks", 3: "under masks"})
    world.live()
    assert world.counted() == [0, 2, 4]
    assert charged(world) == 1
    np.testing.assert_array_equal(world.vector, world.expected([0, 2, 4]).astype(np.float32))


@pytest.mark.slow
def test_a_cohort_drawn_too_small_is_passed_over_and_costs_nothing() -> None:
    usual = fd.everybody()
    few = usual._replace(sample=lambda p, seed, round: usual.sample(p, seed, round)[: 2 if round == 1 else COUNT])
    each = Rounds(clients=COUNT, patience=10.0, deadline=400.0, window=20.0)
    world = noisy(4, rounds=2, how={"cohort": few, "each": each})
    world.coordinator.tick(world.now)
    assert seated(world, 0).round == 2
    assert seated(world, 1).minimum == 3  # of the shares, not of Rounds()
    world.live()
    assert (world.counted(1), world.counted(2), charged(world)) == ([], list(range(COUNT)), 1)


def test_cohorts_too_small_for_their_shares_and_too_large_for_the_grid_are_refused() -> None:
    task = fd.Task(fd.linear(2))
    algorithm = fd.fedavg(fd.local_sgd(0.1), aggregator=trusted_sum(gaussian_shares(**TOLD), planned=3))
    assert Served(name="run", task=task, algorithm=algorithm, rounds=1).minimum == 3
    with pytest.raises(ConfigurationError, match=r"2 clients are asked.*sums of 3 and more. Write cohort=3"):
        Learning(Served(name="run", task=task, algorithm=algorithm, rounds=1, cohort=2), open_trainer(task, seed=0))
    with pytest.raises(IncompatibleStages, match=r"sums of 4 clients, and .* may add up 5.*Write cohort=5"):
        fd.chain(gaussian_shares(**TOLD | {"cohort": 4}), fd.masked(WITHSTAND, least=3, planned=4))


def test_clients_know_each_other_by_keys_that_the_server_did_not_issue(tmp_path: Path) -> None:
    with pytest.raises(NoGuarantee, match="write theirs, one a line"):
        identity(tmp_path)
    (tmp_path / "peers.txt").write_text(f"# north\n{'ab' * 32}\n")
    mine = identity(tmp_path)
    assert mine.trust.label == "pinned(2 identities)"
    assert identity(tmp_path).public == mine.public
    assert (tmp_path / "peers.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "peers.txt").write_text("north\n")
    with pytest.raises(ConfigurationError, match=r"peers.txt, line 1: 64 hexadecimal digits"):
        identity(tmp_path)
