"""Federation at other paces than round by round: as updates come, every so often, by edges, with partial work."""

from __future__ import annotations

import itertools
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
CLIENTS = fd.Clients.of({i: (X[a:b], Y[a:b]) for i, (a, b) in enumerate(itertools.pairwise(AT))}).with_test(
    (X, Y)
)
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
    from foedus.sim.debug import Debug
    from foedus.sim.work import Job, Orders

    job = Job(TASK, fd.fedavg(CLIENT), CLIENTS, 3)
    session, start = Debug().open(job), open_trainer(TASK, seed=3).initial()
    model, models = start.vector, [start.vector]
    under_way: list[tuple[float, int, int, int]] = []  # time, serial, client, version
    now, serial, versions = 0.0, 0, {0: start.vector}
    for step in range(steps):
        versions[step] = model
        buffer: list[tuple[int, int]] = []
        tick = (
            np.inf if timing.seconds is None else (np.floor(now / timing.seconds + 1e-9) + 1) * timing.seconds
        )
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
    world = fd.World(
        device=lambda draw: Device(speed=float(draw.pareto(0.8) + 0.01), download=1e9, upload=1e9)
    )
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
def test_what_cannot_be_timed_is_refused(
    tmp_path: Path, timing: Buffered, how: dict[str, Any], told: str
) -> None:
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


# --- by edges ---------------------------------------------------------------------------------------------------


def test_edges_that_merge_partial_sums_change_no_bit(tmp_path: Path) -> None:
    flat = simulate(tmp_path / "a", fd.fedavg(CLIENT), world=None)
    edges = simulate(tmp_path / "b", fd.fedavg(CLIENT, timing=fd.hierarchical(3)), world=None)
    assert flat.weights.vector.tobytes() == edges.weights.vector.tobytes()
    assert [m["edges"]["count"] for m in edges.metrics if m["edges"]["count"] > 1]


def test_edges_average_on_their_own_in_between(tmp_path: Path) -> None:
    """One round of two edge rounds, against two runs of two rounds over each edge's clients."""
    algorithm = fd.fedavg(
        fd.local_sgd(lr=0.05, steps=1, batch_size=None), timing=fd.hierarchical(2, rounds=2)
    )
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
