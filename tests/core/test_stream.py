"""Populations whose data arrives over rounds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import foedus as fd
from foedus.core.method import Consult, Contribution, Local, Method, Visit
from foedus.errors import ConfigurationError, DataError
from foedus.record.folder import METRICS
from foedus.sim.world import Device


def numbered(sizes: list[int]) -> fd.Clients:
    """Client i has the examples (i, 0), (i, 1), ... in this order."""
    data = {i: (np.array([[i, k] for k in range(n)], float).reshape(n, 2), np.arange(n)) for i, n in enumerate(sizes)}
    return fd.Clients.of(data)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.none() | st.integers(1, 6),
    st.integers(1, 9),
)
def test_what_has_arrived_is_a_window_of_each_clients_own_order(
    sizes: list[int], per_round: int, window: int | None, round: int
) -> None:
    clients = numbered(sizes).arriving(per_round, window=window)
    now = clients.at(round)
    for i, size in enumerate(sizes):
        whole = list(range(size))[: round * per_round]
        wanted = whole if window is None else whole[-window:]
        assert now.train(i).targets.tolist() == wanted
        assert all(x == i for x in now.train(i).inputs[0][:, 0])
    assert now.sizes is not None
    assert now.sizes.tolist() == [len(now.train(i)) for i in range(len(sizes))]
    assert len(clients) == len(sizes)


def test_populations_that_stay_are_the_same_in_every_round() -> None:
    clients = numbered([3])
    assert clients.at(1) is clients
    assert clients.at(99) is clients


def turning(round: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """A straight line whose slope turns from 1 to −1 in round 10."""
    x = np.random.default_rng([round, client]).normal(size=(20, 1))
    return x, x[:, 0] * (1.0 if round < 10 else -1.0)


def population(round: int) -> fd.Clients:
    make = partial(turning, round)
    return fd.Clients.generated(make, 4, test=partial(turning, round + 1), sizes=[20] * 4)


EXECUTORS = [fd.executors.debug(), fd.executors.processes(2), fd.executors.vectorised()]


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda e: e.name)
def test_drift_is_seen_in_the_federated_evaluation_and_followed(tmp_path: Path, executor: object) -> None:
    settings = fd.Settings(folder=tmp_path, executor=executor, progress=False)  # type: ignore[arg-type]
    algorithm = fd.fedavg(fd.local_sgd(lr=0.3, epochs=2, batch_size=10))
    run = fd.simulate(
        fd.Task(fd.linear(1)), algorithm, fd.Clients.streamed(population), rounds=20, seed=0,
        evaluation=fd.Evaluation(clients=True), settings=settings,
    )  # fmt: skip
    loss = [m["clients"]["loss"]["mean"] for m in run.metrics]
    assert loss[7] < 0.02, "learned"
    assert loss[8] > 1.0, "the next round's data is another"
    assert loss[18] < 0.02, "and followed"


@pytest.mark.parametrize("window", [None, 8])
def test_executors_agree_on_what_arrives(tmp_path: Path, window: int | None) -> None:
    rng = np.random.default_rng(0)
    data = {
        i: fd.Examples.of(rng.normal(size=(n, 3)), rng.normal(size=n), keep_dtype=True)
        for i, n in enumerate([30, 7, 18])
    }
    clients = fd.Clients.of(data).arriving(4, window=window)
    found = {}
    for executor in (fd.executors.debug(), fd.executors.vectorised()):
        settings = fd.Settings(folder=tmp_path / executor.name, executor=executor, progress=False)
        task = fd.Task(fd.linear(3, dtype="float64"))
        algorithm = fd.fedavg(fd.local_sgd(lr=0.05, batch_size=5))
        run = fd.simulate(task, algorithm, clients, rounds=6, seed=0, settings=settings)
        found[executor.name] = run.weights.vector
        held = [min(n, 4 * r) if window is None else min(n, 4 * r, window) for r in range(1, 7) for n in (30, 7, 18)]
        assert [m["examples"] for m in run.metrics] == np.reshape(held, (6, 3)).sum(1).tolist()
    np.testing.assert_allclose(found["vectorised"], found["debug"], rtol=1e-10)


def looked_at(visit: Visit) -> Local:
    """Nothing learned; how many examples the client's own function was given, beside how many there are to train on."""
    found = yield Consult(len)
    report = {"looked_at": float(found), "there": float(visit.examples)}
    return Contribution(np.zeros_like(visit.received), buffers=visit.buffers, report=report)


@pytest.mark.parametrize("executor", [fd.executors.debug(), fd.executors.vectorised()], ids=lambda e: e.name)
def test_a_methods_own_function_is_given_what_has_arrived(tmp_path: Path, executor: object) -> None:
    clients = fd.Clients.of({i: (np.zeros((9, 2)), np.arange(9)) for i in range(3)}).arriving(4)
    algorithm = fd.Algorithm(client=fd.local_sgd(lr=0.1), method=Method(looked_at, "looked_at()"))
    settings = fd.Settings(folder=tmp_path, executor=executor, progress=False)  # type: ignore[arg-type]
    run = fd.simulate(fd.Task(fd.linear(2)), algorithm, clients, rounds=3, seed=0, settings=settings)
    assert [m["report"] for m in run.metrics] == [{"looked_at": n, "there": n} for n in (4.0, 8.0, 9.0)]


def test_a_run_cut_short_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    clients, task = numbered([9, 5]).map(lambda e: e).arriving(2), fd.Task(fd.linear(2))
    algorithm = fd.fedavg(fd.local_sgd(lr=0.01, batch_size=2))

    def run(folder: str, rounds: int) -> bytes:
        settings = fd.Settings(folder=tmp_path / folder, executor=fd.executors.debug(), progress=False)
        return (fd.simulate(task, algorithm, clients, rounds=rounds, settings=settings).folder / METRICS).read_bytes()

    run("cut", 3)
    assert run("cut", 6) == run("whole", 6)


def test_a_stream_in_a_world_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    clients, task = numbered([9, 5, 7]).arriving(1), fd.Task(fd.linear(2))
    algorithm = fd.fedavg(fd.local_sgd(lr=0.001, batch_size=2, epochs=3))
    device = lambda draw: fd_device(speed=float(draw.uniform(1, 3)))  # noqa: E731

    def run(folder: str, rounds: int) -> bytes:
        world = fd.World(device=device, deadline=6.0, partial_work=True)
        settings = fd.Settings(folder=tmp_path / folder, executor=fd.executors.debug(), progress=False, world=world)
        return (fd.simulate(task, algorithm, clients, rounds=rounds, settings=settings).folder / METRICS).read_bytes()

    for rounds in range(1, 7):
        again = run("cut", rounds)
    assert again == run("whole", 6)


def fd_device(speed: float) -> Device:
    return Device(speed=speed, download=1e9, upload=1e9)


def test_what_cannot_stream_is_refused() -> None:
    streaming = numbered([4]).arriving(1)
    for change in (
        lambda c: c.map(lambda e: e), lambda c: c.split(), lambda c: c.subset([0]), lambda c: c.arriving(1),
        lambda c: c.with_test(None),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match="Change it before it streams"):
            change(streaming)
    with pytest.raises(ConfigurationError, match="needs a resident population"):
        fd.Clients.generated(lambda i: ([[0.0]], [0]), 2).arriving(1)
    with pytest.raises(DataError, match="gives other clients in round 2"):
        fd.Clients.streamed(lambda r: numbered([1] * r)).at(2)
    with pytest.raises(DataError, match="gives another pool of examples in round 2"):
        fd.Clients.streamed(lambda r: numbered([r])).at(2)


def test_streams_differ_in_their_fingerprints() -> None:
    prints = {
        numbered([4]).fingerprint(),
        numbered([4]).arriving(1).fingerprint(),
        numbered([4]).arriving(2).fingerprint(),
    }
    assert len(prints) == 3


def made_again(round: int) -> fd.Clients:
    """A function whose pool is another object every time, as in another process."""
    examples = np.arange(12.0).reshape(6, 2), np.arange(6)
    return fd.Clients.pooled(fd.Examples((examples[0],), examples[1]), [[0, 1], [2 + round % 2]])


def test_a_pool_that_is_made_again_is_the_same_pool() -> None:
    clients = fd.Clients.streamed(made_again)
    first, later = clients.pool, clients.at(2).pool
    assert first is not None
    assert later is not None
    assert later[0] is first[0]
    assert clients.at(2) is clients.at(2)
    assert clients.at(2).train(1).targets.tolist() == [2]
    with pytest.raises(DataError, match="another pool of examples in round 2"):
        fd.Clients.streamed(lambda r: fd.Clients.of({"a": ([[float(r)]], [0])})).at(2)


def test_functions_that_give_no_population_are_told() -> None:
    with pytest.raises(ConfigurationError, match=r"takes a function from the round.*not 3"):
        fd.Clients.streamed(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gives None in round 1"):
        fd.Clients.streamed(lambda r: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match=r"failed in round 1: ZeroDivisionError"):
        fd.Clients.streamed(lambda r: fd.Clients.of({"a": ([[r / 0]], [0])}))
    assert fd.Clients.streamed(made_again).fingerprint() == fd.Clients.streamed(made_again).fingerprint()
    one, two = (fd.Clients.streamed(lambda r, k=k: made_again(r + k - k)) for k in (2, 4))
    assert one.fingerprint() != two.fingerprint()
