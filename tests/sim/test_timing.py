"""Federation at other paces than round by round: as updates come, every so often, by edges, with partial work."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.timing import Buffered, constant, hinge, polynomial
from foedus.errors import ConfigurationError, NothingToAggregate
from foedus.record.folder import CHECKPOINT, METRICS
from foedus.sim.world import Device

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
Y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.1 * RNG.normal(size=60)
SIZES = [12, 3, 9, 6, 10, 8, 7, 5]
AT = np.cumsum([0, *SIZES])
PARTS = {i: (X[a:b], Y[a:b]) for i, (a, b) in enumerate(itertools.pairwise(AT))}
CLIENTS = fd.Clients.of(PARTS).with_test((X, Y))
TASK = fd.Task(fd.linear(4, dtype="float64"))
CLIENT = fd.local_sgd(lr=0.05, epochs=2, batch_size=4)


def steady(draw: np.random.Generator) -> Device:
    """Everybody alike: a second for each example, nothing else takes time."""
    return Device(speed=1.0, download=1e18, upload=1e18)


def uneven(draw: np.random.Generator) -> Device:
    return Device(speed=float(np.exp(draw.normal(0.0, 1.5))), download=1e6, upload=1e5, dropout=0.15)


def simulate(folder: Path, algorithm: fd.Algorithm, **how: Any) -> fd.Run:
    world = how.pop("world", fd.World(device=uneven))
    rounds, cohort = how.pop("rounds", 6), how.pop("cohort", 4)
    settings = fd.Settings(
        folder=folder, world=world, executor=how.pop("executor", fd.executors.debug()), progress=False,
        checkpoint_seconds=0,
    )  # fmt: skip
    return fd.simulate(TASK, algorithm, CLIENTS, rounds=rounds, cohort=cohort, seed=3, settings=settings)


# --- staleness --------------------------------------------------------------------------------------------------


def test_staleness_weights_are_the_papers() -> None:
    assert [constant().weight(age) for age in (0, 9)] == [1.0, 1.0]
    np.testing.assert_allclose([polynomial(0.5).weight(a) for a in range(4)], [1, 2**-0.5, 3**-0.5, 0.5])
    np.testing.assert_allclose([hinge(10, 4).weight(a) for a in (0, 4, 5, 6)], [1, 1, 1 / 11, 1 / 21])


# --- as they come -----------------------------------------------------------------------------------------------


def brute_force(timing: Buffered, at_once: int, steps: int) -> list[np.ndarray]:
    """The event loop written out, one client after another, with the plain trainer: the models after every step."""
    from foedus.backends import open_trainer
    from foedus.core.random import generator
    from foedus.rounds.debug import Debug
    from foedus.rounds.work import Job, Orders

    job = Job(TASK, fd.fedavg(CLIENT), CLIENTS, 3)
    session, start = Debug().open(job), open_trainer(TASK, seed=3).initial()
    model, models = start.vector, [start.vector]
    under_way: list[tuple[float, int, int, int]] = []  # time, serial, client, version
    now, serial, versions = 0.0, 0, {0: start.vector}
    for step in range(steps):
        versions[step] = model
        buffer: list[tuple[int, int]] = []
        tick = np.inf if timing.seconds is None else (np.floor(now / timing.seconds + 1e-9) + 1) * timing.seconds
        while timing.size is None or len(buffer) < timing.size:
            while len(under_way) < at_once and len(under_way) + len(buffer) < len(CLIENTS):
                draw = generator(3, "set out", serial)
                busy = {c for _, _, c, _ in under_way} | {c for c, _ in buffer}
                while (client := int(draw.integers(len(CLIENTS)))) in busy:
                    pass
                under_way.append((now + 2 * SIZES[client], serial, client, step))
                serial += 1
            first = min(under_way)
            if first[0] > tick:
                now = float(tick)
                break
            under_way.remove(first)
            now = first[0]
            buffer.append((first[2], first[3]))
        total, weights, pull = np.zeros(5), 0.0, np.zeros(5)
        for client, version in buffer:
            begun = start._replace(vector=versions[version])
            out = session.run(Orders(version + 1, begun, np.array([client])))
            assert out.message is not None
            change = fd.mean().decode({}, out.message, None)[0]  # type: ignore[arg-type]
            scale = timing.staleness.weight(step - version) * (timing.mixing or 1.0)
            total, weights = total + scale * change * SIZES[client], weights + SIZES[client]
            pull += scale * (versions[version] - model) if timing.mixing else 0.0
        model = model + (total / weights if weights else 0) + pull
        models.append(model)
    return models


@pytest.mark.parametrize(
    "timing",
    [
        fd.buffered(3),
        fd.buffered(2, staleness=hinge(1.0, 0.0)),
        fd.asynchronous(0.6),
        fd.semi_synchronous(20.0, staleness=constant()),
    ],
    ids=lambda t: t.label,
)
def test_every_step_is_that_of_the_event_loop_written_out(tmp_path: Path, timing: Buffered) -> None:
    algorithm = fd.fedavg(CLIENT, timing=timing)
    wanted = brute_force(timing, at_once=4, steps=5)
    for steps in (1, 3, 5):
        run = simulate(tmp_path / str(steps), algorithm, world=fd.World(device=steady), rounds=steps)
        np.testing.assert_allclose(run.weights.vector, wanted[steps], rtol=1e-9, atol=1e-12)


def test_with_everybody_at_once_and_a_buffer_for_all_it_is_federated_averaging(tmp_path: Path) -> None:
    timing = fd.buffered(len(CLIENTS), staleness=constant())
    as_they_come = simulate(
        tmp_path / "a", fd.fedavg(CLIENT, timing=timing), cohort=len(CLIENTS), world=fd.World(device=steady)
    )
    in_step = simulate(tmp_path / "b", fd.fedavg(CLIENT), cohort=len(CLIENTS), world=fd.World(device=steady))
    assert as_they_come.weights.vector.tobytes() == in_step.weights.vector.tobytes()


@pytest.mark.parametrize(
    "timing", [fd.buffered(3), fd.asynchronous(), fd.semi_synchronous(30.0)], ids=lambda t: t.label
)
def test_a_run_cut_short_goes_on_to_the_same_bytes(tmp_path: Path, timing: Buffered) -> None:
    algorithm = fd.fedavg(CLIENT, server=fd.momentum(beta=0.5), timing=timing)
    whole = simulate(tmp_path / "whole", algorithm, rounds=9)
    for cut in (2, 5, 9):
        again = simulate(tmp_path / "cut", algorithm, rounds=cut)
    assert (whole.folder / METRICS).read_bytes() == (again.folder / METRICS).read_bytes()
    assert whole.weights.vector.tobytes() == again.weights.vector.tobytes()
    assert (whole.folder / CHECKPOINT).exists()


def test_the_record_tells_time_and_staleness(tmp_path: Path) -> None:
    run = simulate(tmp_path, fd.fedavg(CLIENT, timing=fd.buffered(2)), rounds=12)
    seconds = [m["simulated"]["elapsed_seconds"] for m in run.metrics]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert {m["trained"] for m in run.metrics} == {2}
    assert max(m["staleness"]["most"] for m in run.metrics) >= 2
    assert all(m["bytes_up"] > 0 for m in run.metrics)


def test_slow_clients_hold_up_rounds_but_not_buffers(tmp_path: Path) -> None:
    world = fd.World(device=lambda draw: Device(speed=float(draw.pareto(0.8) + 0.01), download=1e9, upload=1e9))
    buffered = simulate(tmp_path / "a", fd.fedavg(CLIENT, timing=fd.buffered(4)), world=world, rounds=30)
    in_step = simulate(tmp_path / "b", fd.fedavg(CLIENT), world=world, rounds=30)
    spent = [r.metrics[-1]["simulated"]["elapsed_seconds"] for r in (buffered, in_step)]
    assert spent[0] < 0.7 * spent[1]


@pytest.mark.parametrize(
    ("timing", "how", "told"),
    [
        (fd.buffered(3), {"world": None}, "without a simulated world nothing takes time"),
        (fd.buffered(3), {"cohort": None}, "give cohort= a number"),
        (fd.buffered(9), {}, "waits for 9 updates from different clients, and there are 8"),
    ],
)
def test_what_cannot_be_timed_is_refused(tmp_path: Path, timing: Buffered, how: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        simulate(tmp_path, fd.fedavg(CLIENT, timing=timing), **how)


def test_sums_of_updates_as_they_are_sent_are_refused_where_stale_ones_are_scaled() -> None:
    method = fd.feddyn(CLIENT).method
    with pytest.raises(ConfigurationError, match="scales stale ones down"):
        fd.Algorithm(client=CLIENT, method=method, timing=fd.buffered(2))
    even = fd.buffered(2, staleness=constant())
    assert fd.Algorithm(client=CLIENT, method=method, timing=even).timing is even
    assert fd.Algorithm(client=CLIENT, method=fd.scaffold(CLIENT).method, timing=fd.buffered(2)).method is not None


def test_a_world_in_which_everybody_is_lost_ends_with_an_error(tmp_path: Path) -> None:
    world = fd.World(device=lambda draw: Device(1.0, 1.0, 1.0, dropout=1.0))
    with pytest.raises(NothingToAggregate, match="were lost in the simulated world"):
        simulate(tmp_path, fd.fedavg(CLIENT, timing=fd.buffered(2)), world=world)


class Stop(Exception):
    pass


@pytest.mark.parametrize("moment", [0, 3, 7, 12])
def test_a_round_that_is_broken_off_leaves_everybody_under_way(tmp_path: Path, moment: int) -> None:
    """Ctrl-C while a step's updates are being made: what is saved then is the state before the round."""
    calls = [0]

    def data(i: int) -> tuple[np.ndarray, np.ndarray]:
        calls[0] += 1
        if calls[0] == moment + 12:
            raise KeyboardInterrupt
        return PARTS[i]

    broken = fd.Clients.generated(data, len(PARTS), sizes=SIZES).with_test((X, Y))
    algorithm = fd.fedavg(CLIENT, timing=fd.buffered(2))
    how = {"rounds": 14, "cohort": 4, "seed": 3}

    def settings(name: str) -> fd.Settings:
        return fd.Settings(
            folder=tmp_path / name, world=fd.World(device=uneven), executor=fd.executors.debug(), progress=False
        )

    with pytest.raises(KeyboardInterrupt):
        fd.simulate(TASK, algorithm, broken, settings=settings("cut"), **how)  # type: ignore[arg-type]
    again = fd.simulate(TASK, algorithm, broken, settings=settings("cut"), **how)  # type: ignore[arg-type]
    whole = fd.simulate(TASK, algorithm, broken, settings=settings("whole"), **how)  # type: ignore[arg-type]
    assert (again.folder / METRICS).read_bytes() == (whole.folder / METRICS).read_bytes()


@pytest.mark.parametrize(
    "timing", [fd.asynchronous(0.6), fd.semi_synchronous(3.0), fd.hierarchical(2, rounds=2)], ids=lambda t: t.label
)
def test_one_broken_client_stops_nobody_else(tmp_path: Path, timing: Any) -> None:
    parts = dict(PARTS) | {2: (np.full((9, 4), np.nan), np.zeros(9))}
    clients = fd.Clients.of(parts).with_test((X, Y))
    settings = fd.Settings(
        folder=tmp_path, world=fd.World(device=steady), executor=fd.executors.debug(), progress=False
    )
    run = fd.simulate(TASK, fd.fedavg(CLIENT, timing=timing), clients, rounds=25, cohort=4, seed=3, settings=settings)
    assert {r["client"] for m in run.metrics for r in m.get("refused", [])} == {2}
    assert np.isfinite(run.final["loss"])


def test_mixing_models_is_the_same_whatever_a_method_makes_of_updates(tmp_path: Path) -> None:
    """FedNova of one update is the update; with mixing, the model pulled towards is not scaled by it."""
    timing = fd.asynchronous(1.0, staleness=constant())
    plain = simulate(tmp_path / "a", fd.fedavg(CLIENT, timing=timing), rounds=9)
    nova = simulate(tmp_path / "b", replace(fd.fednova(CLIENT), timing=timing), rounds=9)
    np.testing.assert_allclose(nova.weights.vector, plain.weights.vector, rtol=1e-9)


def test_models_that_travel_beside_the_update_are_scaled_like_it(tmp_path: Path) -> None:
    """IFCA of one cluster is federated averaging, stale or not."""
    timing = fd.buffered(2)
    plain = simulate(tmp_path / "a", fd.fedavg(CLIENT, timing=timing), rounds=8)
    one = simulate(tmp_path / "b", replace(fd.fedavg(CLIENT, personal=fd.ifca(1)), timing=timing), rounds=8)
    np.testing.assert_allclose(one.weights.vector, plain.weights.vector, rtol=1e-9)


@pytest.mark.parametrize("timing", [fd.buffered(1), fd.asynchronous(0.5)], ids=lambda t: t.label)
def test_statistics_of_stale_clients_are_averaged_not_added_up(tmp_path: Path, timing: Any) -> None:
    from torch import nn

    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))  # noqa: E731
    task = fd.Task(make, nn.functional.mse_loss)
    small = {i: (0.01 * x.astype("f4"), y[:, None].astype("f4")) for i, (x, y) in PARTS.items()}
    settings = fd.Settings(
        folder=tmp_path, world=fd.World(device=uneven), executor=fd.executors.debug(), progress=False
    )
    algorithm = fd.fedavg(fd.local_sgd(lr=0.01, epochs=4, batch_size=None), timing=timing)
    run = fd.simulate(task, algorithm, fd.Clients.of(small), rounds=30, cohort=6, seed=0, settings=settings)
    assert (run.parameters["1.running_var"] > 0).all()


def test_a_buffer_that_can_never_fill_ends_with_an_error(tmp_path: Path) -> None:
    world = fd.World(device=lambda draw: Device(1.0, 1e9, 1e9, dropout=1.0 if draw.random() < 0.9 else 0.0))
    with pytest.raises(NothingToAggregate, match="give a smaller buffer"):
        simulate(tmp_path, fd.fedavg(CLIENT, timing=fd.buffered(7)), world=world, rounds=3)


@pytest.mark.parametrize(
    "rule", [{"deadline": 9.0}, {"over_selection": 1.5}, {"minimum": 2}], ids=lambda rule: next(iter(rule))
)
def test_rules_of_rounds_are_refused_where_nobody_waits(tmp_path: Path, rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="is about rounds that wait for a cohort"):
        simulate(tmp_path, fd.fedavg(CLIENT, timing=fd.buffered(2)), world=fd.World(device=steady, **rule))


# --- by edges ---------------------------------------------------------------------------------------------------


def test_edges_that_merge_partial_sums_change_no_bit(tmp_path: Path) -> None:
    flat = simulate(tmp_path / "a", fd.fedavg(CLIENT), world=None)
    edges = simulate(tmp_path / "b", fd.fedavg(CLIENT, timing=fd.hierarchical(3)), world=None)
    assert flat.weights.vector.tobytes() == edges.weights.vector.tobytes()
    assert [m["edges"]["count"] for m in edges.metrics if m["edges"]["count"] > 1]


def test_edges_average_on_their_own_in_between(tmp_path: Path) -> None:
    """One round of two edge rounds, against two runs of two rounds over each edge's clients."""
    algorithm = fd.fedavg(fd.local_sgd(lr=0.05, steps=1, batch_size=None), timing=fd.hierarchical(2, rounds=2))
    run = simulate(tmp_path / "edges", algorithm, world=None, rounds=1, cohort=None)
    start = simulate(tmp_path / "none", algorithm, world=None, rounds=0, cohort=None)
    mean = np.zeros(5)
    for edge in (0, 1):
        own = [i for i in range(len(CLIENTS)) if i % 2 == edge]
        settings = fd.Settings(
            folder=tmp_path / f"edge{edge}",
            executor=fd.executors.debug(),
            progress=False,
            start=start.parameters,
        )
        plain = fd.fedavg(fd.local_sgd(lr=0.05, steps=1, batch_size=None))
        alone = fd.simulate(TASK, plain, CLIENTS.subset(own), rounds=2, seed=3, settings=settings)
        mean += alone.weights.vector * sum(SIZES[i] for i in own) / sum(SIZES)
    np.testing.assert_allclose(run.weights.vector, mean, rtol=1e-12)
    assert run.metrics[0]["edges"]["bytes_up"] == 2 * (5 * 8 + 8)


@pytest.mark.parametrize("server", [fd.sgd(0.5), fd.adam(0.1), fd.momentum()], ids=lambda s: s.label)
def test_the_server_takes_its_step_once_after_the_edges(tmp_path: Path, server: Any) -> None:
    """One edge and two rounds of it: averaging twice, then one step of the server along the sum."""
    client = fd.local_sgd(lr=0.05, steps=1, batch_size=None)
    how: dict[str, Any] = {"world": None, "cohort": None}
    algorithm = fd.fedavg(client, server=server, timing=fd.hierarchical(1, rounds=2))
    run = simulate(tmp_path / "a", algorithm, rounds=1, **how)
    twice = simulate(tmp_path / "b", fd.fedavg(client), rounds=2, **how).weights.vector
    start = simulate(tmp_path / "c", fd.fedavg(client), rounds=0, **how).weights.vector
    wanted, _ = server.step(server.init(start), start, twice - start, 1)
    np.testing.assert_allclose(run.weights.vector, wanted, rtol=1e-9)


def test_what_clients_keep_goes_on_between_rounds_of_the_edges(tmp_path: Path) -> None:
    from torch import nn

    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))  # noqa: E731
    task = fd.Task(make, nn.functional.mse_loss, average_buffers=False)
    data = {i: (x.astype("f4"), y[:, None].astype("f4")) for i, (x, y) in PARTS.items()}
    settings = fd.Settings(folder=tmp_path, executor=fd.executors.debug(), progress=False, checkpoint_seconds=0)
    algorithm = fd.fedavg(fd.local_sgd(lr=0.01, steps=3), timing=fd.hierarchical(2, rounds=4))
    fd.simulate(task, algorithm, fd.Clients.of(data), rounds=1, seed=0, settings=settings)
    from foedus.record.folder import KEPT
    from foedus.record.kept import Kept

    kept = Kept(tmp_path / KEPT).read(range(len(PARTS)))
    assert {int(k["buffers"][-1]) for k in kept.values()} == {12}


def test_an_edge_whose_update_is_refused_is_named(tmp_path: Path) -> None:
    algorithm = fd.fedavg(CLIENT, timing=fd.hierarchical(2, rounds=4), gate=fd.Gate(max_norm=0.4))
    try:
        run = simulate(tmp_path, algorithm, world=None, cohort=None, rounds=3)
        told = str([m.get("refused") for m in run.metrics])
    except NothingToAggregate as error:
        told = str(error)
    assert "edge" in told


def test_an_edge_function_that_names_no_edges_is_refused(tmp_path: Path) -> None:
    timing = fd.hierarchical(lambda clients: clients / 2)
    with pytest.raises(ConfigurationError, match="must give the number of an edge"):
        simulate(tmp_path, fd.fedavg(CLIENT, timing=timing), world=None)


# --- partial work -----------------------------------------------------------------------------------------------


def test_slow_clients_do_what_they_can_before_the_deadline(tmp_path: Path) -> None:
    late = fd.World(device=steady, deadline=10.0)
    partial = fd.World(device=steady, deadline=10.0, partial_work=True)
    lost = simulate(tmp_path / "a", fd.fedavg(CLIENT), world=late, cohort=len(CLIENTS), rounds=2)
    kept = simulate(tmp_path / "b", fd.fedavg(CLIENT), world=partial, cohort=len(CLIENTS), rounds=2)
    assert lost.metrics[0]["trained"] == sum(2 * n <= 10 for n in SIZES)
    assert kept.metrics[0]["trained"] == len(CLIENTS)
    planned = [2 * -(-n // 4) for n in SIZES]
    made = [int(p * min(1.0, 10 / (2 * n)) + 1e-9) for p, n in zip(planned, SIZES, strict=True)]
    assert kept.metrics[0]["steps"] == sum(made)


def test_partial_work_needs_a_deadline() -> None:
    with pytest.raises(ConfigurationError, match="needs a deadline"):
        fd.World(device=steady, partial_work=True)
