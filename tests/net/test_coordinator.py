"""The coordinator over the memory transport: messages in, messages out, at a time of the test's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.aggregate import lift
from foedus.errors import CheckpointError, ConfigurationError, ProtocolError, StorageError, TooLarge, UploadRefused
from foedus.net.blobs import open_blobs
from foedus.net.coordinator import Coordinator, Ground
from foedus.net.coordinator.steps import Steps
from foedus.net.course import Course
from foedus.net.learning import Learning
from foedus.net.sealing import Vault
from foedus.net.served import Keeping, Served
from foedus.net.store import check_log, open_store
from foedus.protocol import blob
from foedus.protocol.messages import (
    Accepted,
    Ask,
    CheckIn,
    Decline,
    Finished,
    Kind,
    Later,
    Place,
    Received,
    Refused,
    Stands,
    StartUpload,
    Submit,
)
from foedus.rounds.freight import parcel_of, update_blob

from ..conformance.test_methods import METHODS, population, task
from .federations import Federation
from .test_learning import MORE, OWN, simulated
from .trainees import Trainee

ALL = METHODS | MORE


def trainee_of(name: str) -> Trainee:
    clients = population(ragged="fedbn" not in name)
    return Trainee(task(normal="fedbn" in name), ALL[name](), clients.with_test(clients.train(0)), seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_method_over_messages_ends_with_the_bits_of_the_simulation(tmp_path: Path, name: str) -> None:
    trainee = trainee_of(name)
    how: dict[str, Any] = {} if "krum" in name or "median" in name else {"cohort": fd.uniform(3)}
    federation = Federation(trainee, how=how)
    federation.run(order=[4, 2, 0, 3, 1])
    wanted = simulated(trainee_of(name), tmp_path / "run", **how)
    state = federation.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, wanted.weights.vector)
    np.testing.assert_array_equal(state.weights.buffers, wanted.weights.buffers)
    lines = federation.lines()
    assert [line["round"] for line in lines] == [1, 2, 3]
    for found, line in zip(lines, wanted.metrics, strict=True):
        assert (found["central"], found["trained"], found["bytes_up"]) == (
            line["central"], line["trained"], line["bytes_up"],
        )  # fmt: skip


# --- restarts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold, option II", "adam", "median", "edges, two rounds, feedback", "lag"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_server_killed_after_any_few_uploads_goes_on_to_the_same_model(name: str, after: int) -> None:
    """In every round: whoever was in the lost sum is asked to send the same bytes again, and nobody trains twice."""
    trainee = trainee_of(name)
    federation = Federation(trainee, ground={"memory": Vault(bytes(32))})
    trainings: list[tuple[int, int]] = []
    plain = trainee.update

    def update(data: Any, position: int, **how: Any) -> bytes:
        trainings.append((trainee.orders(data, position).round, position))
        return plain(data, position, **how)

    trainee.update = update  # type: ignore[method-assign]
    for kill in range(1, 60):
        federation.tick()
        if federation.coordinator.courses()[0].state.phase == "over":
            break
        for position in [4, 0, 3, 1][:after]:
            federation.visit(position)
        federation.restarted(kill)
        for position in [4, 0, 3, 1]:
            if position in federation.held:
                federation.again(position)
            federation.visit(position)
    federation.run()
    wanted = Federation(trainee_of(name))
    wanted.run()
    for found, other in zip(federation.learning.state.weights, wanted.learning.state.weights, strict=True):
        np.testing.assert_array_equal(found, other)
    assert [line["round"] for line in federation.lines()] == [1, 2, 3]
    if "edges" not in name:  # those train twice in a round
        assert len(trainings) == len(set(trainings)), "nobody trains twice for one round"


# --- what is on a disk ----------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes]:
    """Every byte of every file: database pages and write-ahead logs included."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def traces(vector: np.ndarray) -> list[bytes]:
    """What would give a vector away: any eight entries of it in a row, as any floats or as limbs of an exact sum."""
    limbs = lift({"values": vector, "weight": np.array([1 << 20], np.int64)})
    seen = (vector.astype("<f8"), vector.astype("<f4"), limbs["high"], limbs["low"])
    return [values[at : at + 8].tobytes() for values in seen for at in range(0, len(values) - 8, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_no_update_and_no_sum_of_too_few_is_ever_on_a_disk(tmp_path: Path, kill: bool) -> None:
    """Looked for in every file after every message; that the search finds anything is shown by mode durable."""
    for keeping, found in ((fd.Keeping.EPHEMERAL, False), (fd.Keeping.SEALED, False), (fd.Keeping.DURABLE, True)):
        folder = tmp_path / str(keeping)
        trainee = trainee_of("adam")
        federation = Federation(
            trainee, how={"keeping": keeping, "each": fd.Rounds(minimum=3), "rounds": 2},
            store=open_store(f"sqlite:///{folder}/foedus.sqlite"), blobs=open_blobs(folder / "blobs"),
            ground={"memory": Vault(bytes(32)), "operator": Vault(bytes(range(32)))},
        )  # fmt: skip
        secret: list[bytes] = []
        seen: list[str] = []

        def look(folder: Path = folder, secret: list[bytes] = secret, seen: list[str] = seen) -> None:
            for path, content in everything(folder).items():
                seen.extend(path for trace in secret if trace in content)

        federation.check = look
        for number in range(40):
            federation.tick(6.0)  # so that partial sums are due
            if federation.coordinator.courses()[0].state.phase == "over":
                break
            together: dict[int, np.ndarray] = {}
            for position in (4, 0, 3, 1):
                answer = federation.visit(position)
                if position not in federation.held:
                    continue
                parcel = parcel_of(blob.unpack(federation.held[position][1]))
                update = np.asarray(parcel.messages["update"]["values"])
                together[position] = update * parcel.weight
                secret.extend(traces(update) + traces(together[position]))
                if len(together) < 3:
                    secret.extend(traces(np.sum(list(together.values()), axis=0)))
                federation.tick(6.0)
                if kill and position == 0:
                    federation.restarted(number + 1)
                    for other in (4, 0):
                        federation.again(other)
                del answer
            for position in list(federation.held):
                federation.standing(position)
        assert federation.learning.state is not None
        assert federation.learning.state.round == 2
        assert len(secret) > 100
        assert bool(seen) is found, f"{keeping}: {sorted(set(seen))}"
        assert len(list(federation.blobs.digests())) == 1, "only the last checkpoint stays"
        federation.store.close()


# --- ways of making rounds ------------------------------------------------------------------------------------


def plain_trainee(algorithm: fd.Algorithm) -> Trainee:
    clients = population()  # of whole batches, as batch normalisation wants them
    return Trainee(task(normal=True, average_buffers=True), algorithm, clients.with_test(clients.train(0)), seed=2)


BUFFERED = {
    "buffered": lambda: fd.fedavg(OWN, timing=fd.buffered(2)),
    "asynchronous": lambda: fd.fedavg(OWN, timing=fd.asynchronous(0.6)),
    "buffered scaffold": lambda: replace(fd.scaffold(OWN), timing=fd.buffered(2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUFFERED)
@pytest.mark.parametrize("kill", [False, True])
def test_updates_as_they_come_are_scaled_by_their_age(name: str, kill: bool) -> None:
    """A slow client's update enters later steps, and counts for less; a restart forgets no model that it began from."""
    federation = Federation(plain_trainee(BUFFERED[name]()), how={"rounds": 5})
    federation.tick()
    slow = federation.check_in(1)
    assert isinstance(slow, Accepted)
    orders = federation.coordinator.blob(federation.caller(1), slow.orders.digest)
    while federation.learning.step.round < 4:
        federation.tick()
        for position in (4, 0, 3):
            federation.visit(position)
    if kill:
        federation.restarted(1)
    again = federation.check_in(1)
    assert isinstance(again, Accepted)
    assert (again.key, again.round, again.orders.digest) == (slow.key, 1, slow.orders.digest), "the same orders"
    place = federation.ask(1, StartUpload(key=slow.key))
    assert isinstance(place, Place)
    mixing = 0.6 if name == "asynchronous" else 1.0
    assert place.scale == pytest.approx(mixing * (1 + 3) ** -0.5)
    content = federation.trainee.update(orders, 1, scale=place.scale)
    assert isinstance(federation.send(1, slow.key, content), Received)
    federation.run(order=[0, 3, 4])
    assert max(line["staleness"]["most"] for line in federation.lines()) == 3


@pytest.mark.slow
def test_a_step_of_fresh_updates_is_that_of_a_round() -> None:
    """Where nobody is late, taking updates as they come is federated averaging."""
    federation = Federation(plain_trainee(fd.fedavg(OWN, timing=fd.buffered(4))))
    federation.run()
    rounds = Federation(plain_trainee(fd.fedavg(OWN)))
    rounds.run()
    for found, wanted in zip(federation.learning.state.weights, rounds.learning.state.weights, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.slow
def test_steps_by_the_clock() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN, timing=fd.semi_synchronous(10.0))), how={"rounds": 2})
    federation.tick()
    for position in (0, 1):
        federation.visit(position)
    federation.tick(9.0)
    assert federation.learning.step.round == 1
    federation.tick(1.0)
    assert federation.learning.step.round == 2
    federation.tick(30.0)
    assert federation.learning.step.round == 2, "nothing has come"
    federation.visit(3)
    federation.tick(10.0)
    assert [line["trained"] for line in federation.lines()] == [2, 1]


@pytest.mark.slow
def test_the_first_that_come_are_taken_and_others_told_when_to_return() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"cohort": 2, "rounds": 2})
    federation.tick()
    first, second, third = (federation.check_in(position) for position in (3, 0, 1))
    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert isinstance(third, Later)
    federation.run()
    assert [line["trained"] for line in federation.lines()] == [2, 2]


@pytest.mark.slow
def test_a_cohort_that_is_drawn_too_small_asks_nobody() -> None:
    federation = Federation(
        plain_trainee(fd.fedavg(OWN)), how={"cohort": fd.poisson(0.5), "rounds": 8, "each": fd.Rounds(minimum=3)}
    )
    federation.run()
    trained = [line["trained"] for line in federation.lines()]
    assert 0 in trained
    assert set(trained) <= {0, 3, 4}
    assert len(trained) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "ditto"])
def test_clients_evaluate_and_only_the_spread_is_written_down(tmp_path: Path, name: str) -> None:
    clients = population(ragged=True)
    clients = clients.with_test(clients.train(0))
    trainee = Trainee(task(normal=False), ALL[name](), clients, seed=2)
    how: dict[str, Any] = {"evaluation": fd.Evaluation(clients=True, every=2), "rounds": 3}
    federation = Federation(trainee, how=how)
    federation.run(order=[4, 2, 0, 3, 1])
    wanted = simulated(Trainee(task(normal=False), ALL[name](), clients, seed=2), tmp_path / "run", **how)
    for found, line in zip(federation.lines(), wanted.metrics, strict=True):
        for kind in ("central", "clients", "personal"):
            assert (kind in found) == (kind in line)
            for metric, values in line.get(kind, {}).items():
                assert found[kind][metric] == pytest.approx(values, rel=1e-12)


class Killed(Exception):
    """The process ends here."""


@pytest.mark.slow
def test_an_evaluation_that_a_process_died_before_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"evaluation": fd.Evaluation(clients=True, every=2), "rounds": 3}
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how=how)

    def dies(_: Steps, course: Course, number: int, *more: Any) -> None:
        if number == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "_evaluate", dies)
        with pytest.raises(Killed):  # a round is committed, and nobody was asked yet
            federation.run()
    assert ["clients" in line for line in federation.lines()] == [False, False]
    federation.restarted(seed=1)
    federation.run()
    assert ["clients" in line for line in federation.lines()] == [False, True, True]


def test_who_has_nothing_to_train_on_any_more_is_not_waited_for() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"rounds": 2, "each": fd.Rounds(minimum=2)})
    federation.tick()
    assert sorted(federation.learning.cohort(federation.learning.step)) == [0, 1, 3, 4]
    told = federation.ask(3, CheckIn(kinds=(Kind.TRAIN,), examples=0))
    assert isinstance(told, Later)
    assert told.reason == "there is nothing to train on"
    for position in (0, 1, 4):
        federation.visit(position)
    assert federation.lines()[0]["trained"] == 3, "in the first window, without waiting for its end"


def test_who_declines_is_told_of() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    federation.tick()
    seat = federation.check_in(0)
    federation.ask(0, Decline(key=seat.key, reason="rules"))
    federation.ask(0, Decline(key=seat.key, reason="rules"))
    told = [told for event, told in federation.events if event == "declined"]
    assert told == [{"run": "run", "position": 0, "reason": "rules"}]


def test_a_rule_that_needs_so_many_is_given_so_many_or_refused() -> None:
    how: dict[str, Any] = {"name": "run", "task": fd.Task(fd.logistic(2, 2)), "rounds": 1}
    krum = fd.fedavg(OWN, aggregator=fd.krum(1))
    assert Served(**how, algorithm=krum).minimum == 5
    assert Served(**how, algorithm=krum, each=fd.Rounds(minimum=6)).minimum == 6
    with pytest.raises(ConfigurationError, match="needs at least 5 updates, and cohort=4"):
        Served(**how, algorithm=krum, cohort=4)


@pytest.mark.slow
def test_the_final_model_is_the_one_that_everybody_is_given() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN, personal=fd.fine_tune())))
    federation.run()
    finished = federation.check_in(2)
    assert isinstance(finished, Finished)
    assert finished.personal
    assert finished.rounds == 3
    np.testing.assert_array_equal(
        blob.unpack(federation.model).arrays["vector"], federation.learning.state.weights.vector
    )


@pytest.mark.slow
def test_a_run_that_was_begun_as_another_is_refused_before_anybody_is_told_of_it() -> None:
    federation = Federation(trainee_of("plain"))
    federation.coordinator.check()
    federation.tick()
    federation.coordinator.check()  # the same again
    federation.how = {"seed": 99}
    with pytest.raises(CheckpointError, match="'run' was begun with another task, algorithm, cohort or seed"):
        federation.restarted()
    other = Learning(federation.served, open_trainer(federation.trainee.task, seed=99))
    ground = Ground(store=federation.store, blobs=federation.blobs, secret=bytes)
    with pytest.raises(CheckpointError, match="choose another name or folder"):
        Coordinator(ground, [other]).check()


def test_what_is_refused_changes_nothing_and_is_named() -> None:
    """NaN, another shape, another's key, other bytes than announced, the same update twice."""
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"rounds": 1, "each": fd.Rounds(minimum=2)})
    federation.tick()
    told = {position: federation.check_in(position) for position in (0, 1, 3, 4)}
    good = {position: federation.trained(position, answer) for position, answer in told.items()}
    key = {position: answer.key for position, answer in told.items()}
    parcel = parcel_of(blob.unpack(good[0]))
    spoilt = {
        "update": {**parcel.messages["update"], "values": np.full_like(parcel.messages["update"]["values"], np.nan)}
    }
    answer = federation.send(0, key[0], update_blob(parcel._replace(messages={**parcel.messages, **spoilt})))
    assert isinstance(answer, Refused)
    assert answer.code == "not-finite"
    assert federation.send(1, key[1], b"\2" + bytes(7) + b"[]").code == "malformed"
    for wrong in (StartUpload(key=key[3], size=3), Ask(keys=(key[3],))):
        if isinstance(wrong, Ask):
            assert federation.ask(4, wrong).entries[0].state == "discarded", "of others' uploads nothing is said"
        else:
            with pytest.raises(ProtocolError, match="not yours"):
                federation.ask(4, wrong)
    place = federation.ask(3, StartUpload(key=key[3], size=len(good[3])))
    with pytest.raises(ProtocolError, match="no such upload of yours"):
        federation.coordinator.uploads.write(place.upload, 0, b"x", owner=4, now=federation.now)
    federation.coordinator.uploads.write(place.upload, 0, good[3], owner=3, now=federation.now)
    with pytest.raises(UploadRefused, match="other bytes came"):
        federation.ask(3, Submit(key=key[3], upload=place.upload, size=len(good[3]), digest=bytes(32)))
    assert isinstance(federation.send(3, key[3], good[3]), Received)
    again = federation.ask(3, Submit(key=key[3], upload=place.upload, size=1, digest=bytes(32)))
    assert isinstance(again, Received), "it is in the sum already"
    assert isinstance(federation.send(4, key[4], good[4]), Received)
    (line,) = federation.lines()
    assert (line["trained"], len(line["refused"])) == (4, 2)
    with federation.store.begin() as rows:
        assert rows.counted("run", 1) == {3, 4}
        assert check_log(rows.notes())


@pytest.mark.slow
def test_a_round_with_too_few_fails_and_is_tried_again_without_training_anew() -> None:
    each = fd.Rounds(minimum=2, window=10.0, deadline=20.0, retry=5.0)
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"rounds": 1, "each": each})
    federation.tick()
    assert isinstance(federation.visit(0), Received)
    key = federation.held[0][0]
    federation.tick(21.0)
    assert federation.coordinator.runs()[0]["phase"] == "failed"
    federation.tick(6.0)
    told = federation.check_in(0)
    assert isinstance(told, Accepted)
    assert (told.attempt, told.held) == (2, key)
    assert isinstance(federation.send(0, told.key, federation.held[0][1]), Received)
    federation.held[0] = told.key, federation.held[0][1]
    federation.run(order=[1, 3, 4])
    with federation.store.begin() as rows:
        assert rows.counted("run", 1) == {0, 1, 3, 4}


@pytest.mark.slow
def test_a_full_disk_delays_a_commit_and_nothing_else() -> None:
    """The update was received; the model is made once, and written as soon as that can be done."""
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"rounds": 1})
    federation.tick()
    for position in (0, 1, 3):
        federation.visit(position)
    put = federation.blobs.put

    def full(content: bytes) -> str:
        raise StorageError("no space left on device")

    federation.blobs.put = full  # type: ignore[method-assign]
    assert isinstance(federation.visit(4), Received)
    for _ in range(3):
        federation.tick()
    assert federation.coordinator.runs()[0]["phase"] == "aggregating"
    made = federation.coordinator.courses()[0].pending
    federation.blobs.put = put  # type: ignore[method-assign]
    federation.tick()
    assert federation.learning.state is made.state
    assert federation.standing(4) == "counted"


def test_bytes_that_two_have_sent_are_not_removed_for_one_of_them() -> None:
    """A blob is named by its content: what one seat no longer needs may be another's."""
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"keeping": Keeping.DURABLE})
    federation.tick()
    told = [federation.check_in(position) for position in (0, 1)]
    content = federation.trained(0, told[0])
    for position, answer in enumerate(told):
        assert isinstance(federation.send(position, answer.key, content), Received)
    (course,) = federation.coordinator.courses()
    first, second = course.stored.values()
    assert first == second
    course.stored.pop(told[0].key)
    federation.coordinator._driver.discard(first)
    assert federation.blobs.has(first)
    course.stored.clear()
    federation.coordinator._driver.discard(first)
    assert not federation.blobs.has(first)


def test_updates_under_a_key_that_is_lost_are_asked_for_again() -> None:
    """A server whose operator has another key leads: what it cannot read it asks for, and the round goes on."""
    operator = {"operator": Vault(bytes(range(32)))}
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"keeping": Keeping.SEALED}, ground=operator)
    federation.tick()
    for position in (0, 1):
        assert isinstance(federation.visit(position), Received)
    federation.ground = {"operator": Vault(bytes(32))}
    federation.restarted(9)
    assert "round key lost" in [event for event, _ in federation.events]
    assert [federation.standing(position) for position in (0, 1)] == [Stands.AGAIN, Stands.AGAIN]
    federation.run()
    assert [line["trained"] for line in federation.lines()] == [4, 4, 4]


def test_a_run_for_a_population_takes_nobody_else_and_waits_for_nobody_else() -> None:
    """Also where a sampler draws: it draws among those whose run it is."""
    how = {"population": "clinics", "cohort": fd.uniform(2), "rounds": 2, "each": fd.Rounds(minimum=2)}
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how=how)
    with federation.store.begin() as rows:
        for client in rows.clients():
            rows.put_client(
                client._replace(population={1: "clinics", 3: "clinics", 4: "practices"}.get(client.position, ""))
            )
    federation.restarted()
    federation.tick()
    for position in (0, 4):
        told = federation.check_in(position)
        assert isinstance(told, Later)
        assert told.reason == "what runs here is for other populations"
    for _ in range(2):
        for position in (1, 3):
            assert isinstance(federation.visit(position), Received)
        federation.tick()
    assert [line["trained"] for line in federation.lines()] == [2, 2]
    assert isinstance(federation.check_in(1), Finished)
    assert isinstance(federation.check_in(0), Later), "its model is not theirs"


def test_where_too_few_are_left_rounds_wait_and_are_not_passed_over() -> None:
    """A hospital's data is away for a while: nothing is learned, but no round is used up either."""
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"rounds": 3, "each": fd.Rounds(minimum=4)})
    federation.tick()
    for position in (1, 3, 4):
        assert isinstance(federation.visit(position), Received)
    federation.ask(4, CheckIn(examples=0))
    assert isinstance(federation.visit(0), Received)
    for _ in range(20):
        federation.tick()
    assert [line["trained"] for line in federation.lines()] == [4]
    assert federation.coordinator.runs()[0]["phase"] == "idle"
    federation.run(order=[0, 1, 3, 4])
    assert [line["trained"] for line in federation.lines()] == [4, 4, 4]


def test_a_run_whose_own_code_fails_says_so_and_holds_up_no_other() -> None:
    """An algorithm with a mistake in it: its rounds fail with a reason, the clients' answers stand, time goes on."""

    def mistaken(state: Any, update: Any, *rest: Any) -> Any:
        raise ZeroDivisionError("of the algorithm's own")

    algorithm = fd.fedavg(OWN)
    broken = replace(algorithm, aggregator=algorithm.aggregator._replace(decode=mistaken))
    each = fd.Rounds(attempts=2, retry=1.0)
    federation = Federation(plain_trainee(broken), how={"rounds": 1, "each": each})
    federation.tick()
    for position in (0, 1, 3, 4):
        assert isinstance(federation.visit(position), Received)
    federation.tick(2.0)
    for position in (0, 1, 3, 4):
        federation.visit(position)
    federation.tick()
    (run,) = federation.coordinator.runs()
    assert run["phase"] == "over"
    assert "ZeroDivisionError: of the algorithm's own" in run["reason"]


def test_whoever_declines_gives_the_memory_of_an_upload_back() -> None:
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    federation.tick()
    told = federation.check_in(0)
    assert isinstance(told, Accepted)
    assert isinstance(federation.ask(0, StartUpload(key=told.key, size=1000)), Place)
    federation.ask(0, Decline(key=told.key, reason="training"))
    assert federation.coordinator.uploads.taken == 0


def test_nobody_is_given_more_memory_than_the_model_needs() -> None:
    """Who could announce as much as there is would have all of it, and nobody else could send for a minute."""
    federation = Federation(plain_trainee(fd.fedavg(OWN)))
    federation.tick()
    accepted = federation.check_in(0)
    assert isinstance(accepted, Accepted)
    with pytest.raises(TooLarge, match="more than anybody needs") as refused:
        federation.ask(0, StartUpload(key=accepted.key, size=1 << 29, digest=bytes(32)))
    assert refused.value.fatal
    assert federation.coordinator.uploads.taken == 0
    content = federation.trained(0, accepted)
    place = federation.ask(0, StartUpload(key=accepted.key, size=len(content), digest=blob.digest_of(content)))
    assert isinstance(place, Place)
    assert len(content) < place.most < 3 * len(content) + (1 << 21), "what is told is what is let in"
    assert isinstance(federation.send(0, accepted.key, content, place=place), Received)
