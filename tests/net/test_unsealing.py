"""The opening of encrypted sums over messages, without processes: who is lost when, who lies, a server that dies, and
what nobody should send."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenseal")

import foedus as fd
from foedus.core.aggregate import fold
from foedus.errors import ConfigurationError, IncompatibleStages, SecureAggregationFailed
from foedus.net.blobs import open_blobs
from foedus.net.sealing import Vault
from foedus.net.served import Rounds, Served
from foedus.net.store import open_store
from foedus.protocol import blob
from foedus.protocol import round as machine
from foedus.protocol.messages import (
    ENCRYPTED,
    Accepted,
    CheckIn,
    Decline,
    Kind,
    Later,
    Received,
    Refused,
)
from foedus.rounds.freight import opened_blob, parcel_of
from foedus.rounds.masks import sealed_update
from foedus.rounds.parcel import Terms
from foedus.rounds.visits import layouts_of
from foedus.rounds.work import UPDATE

from .federations import Federation
from .trainees import Trainee

COUNT = 4
KEY = fd.silo_key()
KINDS = (Kind.TRAIN, Kind.DECRYPT)
EACH = Rounds(minimum=3, clients=COUNT, patience=10.0, deadline=100.0, window=20.0, retry=1.0)
Opened = dict[str, Any]


def rule(key: Any = None, **how: Any) -> fd.Aggregator:
    return fd.chain(fd.clip(1.0), fd.encrypted(COUNT, key=key, **how))


def trainee(key: Any = KEY) -> Trainee:
    rng = np.random.default_rng(3)
    data = {str(i): (rng.normal(size=(6 + i, 3)).astype("f4"), rng.integers(0, 2, 6 + i)) for i in range(COUNT)}
    algorithm = fd.fedavg(fd.local_sgd(0.1, batch_size=4), aggregator=rule(key))
    return Trainee(fd.Task(fd.logistic(3, 2)), algorithm, fd.Clients.of(data))


@dataclass
class Silos(Federation):
    """Silos with a key, and a server without."""

    lies: dict[int, Callable[[Opened], Opened]] = field(default_factory=dict)
    answers: dict[int, bytes] = field(default_factory=dict)  # the last that each has sent
    sent_down: dict[int, bytes] = field(default_factory=dict)  # the orders of every round

    @property
    def served(self) -> Served:
        blind = replace(self.trainee.algorithm, aggregator=rule())
        how: dict[str, Any] = {"rounds": 2, "seed": self.trainee.seed, "each": EACH} | self.how
        return Served(name="run", task=self.trainee.task, algorithm=blind, **how)

    def ask_in(self, position: int) -> Any:
        """A check-in; bytes are held under one key only, and are those of the update."""
        pending = (self.held[position][0],) if position in self.held else ()
        size = int(self.trainee.clients.sizes[position])
        return self.ask(position, CheckIn(kinds=KINDS, examples=size, pending=pending, protections=(ENCRYPTED,)))

    def opened(self, position: int, told: Accepted) -> Opened:
        """What a silo finds in the sum, by its own key."""
        content = self.coordinator.blob(self.caller(position), told.orders.digest)
        return self.trainee.opened(content, "run", told.round, position)

    def visit(self, position: int) -> Any:
        found = self.ask_in(position)
        if not isinstance(found, Accepted):
            return found
        if found.kind is Kind.DECRYPT:
            message = self.lies.get(position, lambda opened: opened)(self.opened(position, found))
            self.answers[position] = opened_blob(message, found.orders.digest)
            return self.send(position, found.key, self.answers[position])
        self.sent_down[found.round] = self.coordinator.blob(self.caller(position), found.orders.digest)
        content = self.trained(position, found)
        self.held[position] = found.key, content
        return self.send(position, found.key, content)

    def told(self, event: str) -> list[dict[str, Any]]:
        return [told for name, told in self.events if name == event]

    def until(self, phase: str) -> None:
        """Everybody sends, and the sum is about to be opened."""
        self.tick()
        for position in range(COUNT):
            assert isinstance(self.visit(position), Received)
        assert self.coordinator.runs()[0]["phase"] == phase


def simulated(folder: Path, rounds: int = 2) -> Any:
    own = trainee()
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)
    return fd.simulate(own.task, own.algorithm, own.clients, rounds=rounds, seed=own.seed, settings=settings)


def check_bits(silos: Silos, folder: Path) -> None:
    state = silos.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, simulated(folder).weights.vector)


def test_a_served_run_has_the_bits_of_a_simulated_one(tmp_path: Path) -> None:
    silos = Silos(trainee())
    silos.run()
    check_bits(silos, tmp_path)
    assert len(silos.told("decrypting")) == 2
    assert not silos.told("lied")
    assert [line["trained"] for line in silos.lines()] == [COUNT, COUNT]
    assert not any("loss" in line for line in silos.lines())  # nobody's is told


def test_one_that_lies_is_outvoted_and_named(tmp_path: Path) -> None:
    silos = Silos(trainee(), lies={0: lambda opened: opened | {"sum": opened["sum"] + 1}})
    silos.run(order=range(COUNT))
    check_bits(silos, tmp_path)
    assert [told["who"] for told in silos.told("lied")] == [[0], [0]]


def test_a_sum_of_which_all_say_different_things_is_not_used() -> None:
    different = {i: lambda opened, i=i: opened | {"sum": opened["sum"] + i} for i in range(COUNT)}
    silos = Silos(trainee(), lies=different)
    before = silos.learning.state
    silos.run()
    assert [line["trained"] for line in silos.lines()] == [0, 0]
    assert len(silos.told("sum lost")) == 2
    assert before is None
    after = silos.learning.state
    assert after is not None
    np.testing.assert_array_equal(after.weights.vector, silos.learning.trainer.initial().vector)


def test_one_that_is_silent_is_not_waited_for(tmp_path: Path) -> None:
    """Two are asked; one takes its seat and is gone. After a while another is."""
    silos = Silos(trainee())
    silos.until("opening")
    gone = silos.ask_in(0)
    assert gone.kind is Kind.DECRYPT
    silos.visit(1)
    assert isinstance(silos.ask_in(2), Later)
    silos.tick(11.0)
    assert isinstance(silos.visit(2), Received)
    assert [line["round"] for line in silos.lines()] == [1]
    late = silos.send(0, gone.key, opened_blob({"sum": np.arange(3), "weight": np.ones(1, "i8")}, bytes(32)))
    assert not isinstance(late, Received)
    silos.run()
    check_bits(silos, tmp_path)


def test_one_that_declines_is_followed_by_another(tmp_path: Path) -> None:
    silos = Silos(trainee())
    silos.until("opening")
    silos.ask(0, Decline(key=silos.ask_in(0).key, reason="rules"))
    for position in (1, 2):
        assert isinstance(silos.visit(position), Received)
    assert [line["round"] for line in silos.lines()] == [1]
    silos.run()
    check_bits(silos, tmp_path)


def test_where_all_decline_there_is_no_other_sum_of_this_round() -> None:
    silos = Silos(trainee())
    silos.until("opening")
    for position in range(COUNT):
        silos.ask(position, Decline(key=silos.ask_in(position).key, reason="secure-aggregation"))
    silos.tick()
    silos.tick()
    assert silos.told("sum lost")[0]["reason"].startswith("the encrypted sum could not be opened")
    assert [line["trained"] for line in silos.lines()] == [0]
    silos.run()
    assert [line["trained"] for line in silos.lines()] == [0, COUNT]


HOSTILE: dict[str, Callable[[Opened], Opened]] = {
    "another shape": lambda opened: opened | {"sum": opened["sum"][:-1]},
    "another dtype": lambda opened: opened | {"sum": opened["sum"].astype(np.float64)},
    "no number": lambda opened: opened | {"sum": opened["sum"] * np.nan},
    "out of range": lambda opened: opened | {"sum": opened["sum"] + (1 << 40)},
    "the smallest": lambda opened: opened | {"sum": np.full_like(opened["sum"], np.iinfo(np.int64).min)},
    "no weight": lambda opened: opened | {"weight": np.zeros(1, np.int64)},
    "too heavy": lambda opened: opened | {"weight": opened["weight"] + 1},
}


@pytest.mark.parametrize("lie", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_no_sum_can_open_to_is_refused(lie: Callable[[Opened], Opened]) -> None:
    silos = Silos(trainee(), lies={0: lie}, how={"rounds": 1})
    silos.until("opening")
    assert isinstance(silos.visit(0), Refused)
    silos.run(order=[1, 2, 3])
    assert [line["trained"] for line in silos.lines()] == [COUNT]


def test_an_answer_of_another_round_is_refused() -> None:
    silos = Silos(trainee())
    silos.until("opening")
    for position in (0, 1):
        silos.visit(position)
    silos.tick()
    for position in range(COUNT):
        assert isinstance(silos.visit(position), Received)
    seat = silos.ask_in(0)
    assert (seat.kind, seat.round) == (Kind.DECRYPT, 2)
    assert isinstance(refused := silos.send(0, seat.key, silos.answers[0]), Refused)
    assert "another sum" in refused.told
    assert isinstance(silos.send(1, silos.ask_in(1).key, b"nonsense" * 9), Refused)


# --- a server that dies ---------------------------------------------------------------------------------------


def restartable(tmp_path: Path, **ground: Any) -> Silos:
    store, blobs = open_store("sqlite://"), open_blobs(str(tmp_path / "blobs"))
    return Silos(trainee(), store=store, blobs=blobs, ground=ground)


def test_a_server_that_dies_while_a_sum_is_opened_goes_on_with_it(tmp_path: Path) -> None:
    silos = restartable(tmp_path, memory=Vault(bytes(32)))
    silos.until("opening")
    digest = silos.ask_in(0).orders.digest
    silos.visit(1)  # one answer is there, and lost with the process
    silos.restarted(seed=1)
    seat = silos.ask_in(0)
    assert seat.orders.digest == digest, "it is the same sum, and those in it may answer again"
    silos.run()
    check_bits(silos, tmp_path / "simulated")
    assert not silos.told("sum lost")


def test_a_server_that_has_lost_the_sum_never_opens_another_of_that_round(tmp_path: Path) -> None:
    silos = restartable(tmp_path)
    silos.until("opening")
    silos.restarted(seed=1)
    silos.run()
    assert [line["trained"] for line in silos.lines()] == [0, COUNT]
    assert {told["round"] for told in silos.told("decrypting")} == {1, 2}
    assert len(silos.told("decrypting")) == 2


def test_it_is_written_that_a_sum_is_opened_before_anybody_is_given_it(tmp_path: Path) -> None:
    silos = restartable(tmp_path, memory=Vault(bytes(32)))
    silos.until("opening")
    with silos.store.begin() as rows:
        row = rows.run("run")
        assert row is not None
        seats = [machine.At(seat.state) for seat in rows.seats("run")]
    assert machine.read(row.state, ()).opening
    assert seats == [machine.At.RECEIVED] * COUNT
    assert row.sum


def test_a_server_that_dies_while_updates_come_asks_for_them_again(tmp_path: Path) -> None:
    silos = restartable(tmp_path, memory=Vault(bytes(32)))
    silos.tick()
    for position in (0, 1):
        silos.visit(position)
    silos.restarted(seed=1)
    silos.run()
    check_bits(silos, tmp_path / "simulated")


def test_no_encrypted_sum_of_too_few_is_ever_on_a_disk(tmp_path: Path) -> None:
    silos = restartable(tmp_path, memory=Vault(bytes(32)))
    silos.tick()
    start = set(silos.blobs.digests())
    for position in (0, 1):
        silos.visit(position)
        silos.tick(6.0)
    assert set(silos.blobs.digests()) == start
    silos.visit(2)
    silos.tick(6.0)
    (there,) = set(silos.blobs.digests()) - start
    content = silos.blobs.get(there)
    assert b"lengths" not in content, "it is sealed under a key that no disk has"


# --- who may take part ----------------------------------------------------------------------------------------


def test_two_keys_do_not_go_together() -> None:
    silos = Silos(trainee())
    silos.tick()
    assert isinstance(silos.visit(0), Received)
    other = trainee(fd.silo_key())
    seat = silos.ask_in(1)
    content = other.update(silos.coordinator.blob(silos.caller(1), seat.orders.digest), 1)
    assert isinstance(refused := silos.send(1, seat.key, content), Refused)
    assert "under different keys" in refused.told
    assert silos.learning.state is not None


def test_more_clients_than_share_the_key_wait() -> None:
    silos = Silos(trainee())
    with silos.store.begin() as rows:
        rows.put_client(rows.enrol("five", b"five", 0.0)._replace(examples=9))
    silos.restarted(seed=1)
    silos.tick()
    caller = type("Caller", (), {"position": COUNT, "name": "five"})()
    found = silos.coordinator.handle(caller, CheckIn(kinds=KINDS, examples=9), silos.now)
    assert isinstance(found, Later)
    assert f"for {COUNT} silos" in found.reason
    silos.run()
    assert [line["trained"] for line in silos.lines()] == [COUNT, COUNT]


def test_only_those_in_the_sum_are_asked() -> None:
    silos = Silos(trainee(), how={"cohort": 3, "rounds": 1})
    silos.tick()
    for position in (1, 2, 3):
        assert isinstance(silos.visit(position), Received)
    assert isinstance(silos.ask_in(0), Later)
    assert silos.ask_in(1).kind is Kind.DECRYPT


def test_a_client_refuses_a_sum_without_itself() -> None:
    silos = Silos(trainee(), how={"cohort": 3, "rounds": 1})
    silos.tick()
    for position in (1, 2, 3):
        silos.visit(position)
    told = silos.ask_in(1)
    with pytest.raises(SecureAggregationFailed, match="client 0, who is asked to decrypt the sum, is not in it"):
        silos.opened(0, told)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cohort": COUNT + 1}, "is for 4 silos"),
        ({"cohort": 2}, "hides them in sums of 3 and more"),
    ],
    ids=["more than silos", "too few"],
)
def test_rounds_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Silos(trainee(), how=given)


def test_nothing_travels_beside_an_encrypted_update() -> None:
    local = fd.local_sgd(0.1)
    with pytest.raises(IncompatibleStages, match="nothing else may travel"):
        sealed_update(fd.fedavg(local, aggregator=rule()), buffers=True)
    late = fd.fedavg(local, aggregator=rule()).with_(timing=fd.buffered(3))
    with pytest.raises(IncompatibleStages, match="made by all who take part in a round together"):
        sealed_update(late, buffers=False)
    assert sealed_update(fd.fedavg(local), buffers=False) is None


def test_figures_beside_an_update_are_not_believed_nor_kept() -> None:
    """A client keeps them to itself (``net/bench.py``); one that does not is not listened to."""
    silos = Silos(trainee())
    silos.until("opening")
    outcome = next(iter(silos.coordinator.courses()[0].gathered().outcomes.values()))
    assert np.isnan(outcome.losses).all()
    assert outcome.steps == [0] * COUNT
    assert outcome.examples == [0] * COUNT


def recomputed(silos: Silos) -> Any:
    """The model by definition: in every round the mean of what those hold who are counted in it."""
    own, aggregator = trainee(), rule(KEY)
    vector = own.trainer.initial().vector
    for number, content in sorted(silos.sent_down.items()):
        orders = own.orders(content, 0)
        np.testing.assert_array_equal(orders.start.vector, vector)
        with silos.store.begin() as rows:
            counted = sorted(rows.counted("run", number))
        if not counted:
            continue
        terms = Terms.of(own.job, orders, layouts_of(own.trainer))
        contexts = [terms.context(position, UPDATE, len(vector)) for position in counted]
        parcels = [parcel_of(blob.unpack(own.update(content, position))) for position in counted]
        pairs = zip(parcels, contexts, strict=True)
        total = fold(aggregator, [aggregator.admit(dict(each.messages[UPDATE]), context) for each, context in pairs])
        update, _ = aggregator.decode({}, total, contexts[0]._replace(client=-1))
        vector, _ = own.algorithm.server.step(own.algorithm.server.init(vector), vector, update, number)
    return vector


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_a_round_has_one_sum_and_the_right_one(seed: int, tmp_path: Path) -> None:
    """Silos come in any order, some keep silent, decline or lie, and the server dies, with and without its memory: no
    two sums of a round are ever given out, every round ends, and the model is that of those who are counted."""
    rng = random.Random(seed)
    silos = restartable(tmp_path, memory=Vault(bytes(32)))
    liar, given = rng.randrange(COUNT), dict[int, set[bytes]]()
    for _ in range(40):
        silos.tick(rng.choice([0.01, 0.5, 6.0, 11.0]))
        draw, position = rng.random(), rng.randrange(COUNT)
        if draw < 0.15:
            if rng.random() < 0.2:
                silos.ground["memory"] = Vault(rng.randbytes(32))  # the machine was started anew
            silos.restarted(seed=rng.randrange(1, 1000))
        elif isinstance(found := silos.ask_in(position), Accepted) and found.kind is Kind.DECRYPT:
            given.setdefault(found.round, set()).add(found.orders.digest)
            if draw < 0.25:
                silos.ask(position, Decline(key=found.key, reason="rules"))
            elif draw < 0.9:
                silos.lies = {liar: lambda opened: opened | {"sum": opened["sum"] + 1}} if draw < 0.5 else {}
                silos.visit(position)
        elif isinstance(found, Accepted):
            silos.visit(position)
            silos.again(position)
    silos.lies = {}
    silos.run()
    assert all(len(digests) == 1 for digests in given.values())
    trained = [line["trained"] for line in silos.lines()]
    assert len(trained) == 2
    assert set(trained) <= {0, 3, COUNT}
    assert len(silos.told("sum lost")) == trained.count(0)
    state = silos.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, recomputed(silos))
