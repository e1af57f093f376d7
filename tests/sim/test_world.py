"""Simulated worlds: laws of a round that hold whatever the devices, and figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import foedus as fd
from foedus.core.linear import logistic
from foedus.errors import ConfigurationError
from foedus.sim.world import Device, Load, Passage, World, pass_round, phone, silo

rates = st.floats(1e-3, 1e9)


@st.composite
def devices(draw: st.DrawFn) -> Any:
    """A population in which every kind of device occurs; some never drop out, some always do."""
    seed, chances = (
        draw(st.integers(0, 2**32)),
        draw(st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=1)),
    )

    def make(generator: np.random.Generator) -> Device:
        own = np.random.default_rng([seed, int(generator.integers(2**32))])
        speed, down, up = 10.0 ** own.uniform(-2, 8, 3)
        return Device(speed, down, up, own.uniform(0, 100), own.uniform(0, 1e-3), float(own.choice(chances)))

    return make


@st.composite
def rounds(draw: st.DrawFn) -> tuple[World, np.ndarray, Load, dict[str, int]]:
    count = draw(st.integers(0, 12))
    deadline = draw(st.none() | st.floats(1e-3, 1e6))
    world = World(device=draw(devices()), deadline=deadline)
    clients = np.array(draw(st.permutations(range(40)))[:count], np.int64)
    examples = np.array(draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)), np.int64)
    load = Load(draw(st.integers(0, 10**8)), draw(st.integers(0, 10**8)), examples)
    how = {
        "goal": draw(st.integers(1, 14)),
        "seed": draw(st.integers(0, 99)),
        "round": draw(st.integers(1, 99)),
    }
    return world, clients, load, how


@given(rounds())
def test_laws_of_a_round(case: tuple[World, np.ndarray, Load, dict[str, int]]) -> None:
    world, clients, load, how = case
    found = pass_round(world, clients, load, **how)
    assert found.counted.sum() <= how["goal"]
    assert 0 <= found.seconds < np.inf
    assert world.deadline is None or found.seconds <= world.deadline
    # everyone is exactly one of counted, dropped, late, or has nothing to train on, and then sends nothing
    idle = (load.examples == 0) & ~found.dropped
    assert (found.counted.astype(int) + found.dropped + found.late + idle == 1).all()
    assert (found.up[load.examples == 0] == 0).all()
    # what is counted was sent whole, and nobody sends or receives more than there is
    assert (found.up[found.counted] == load.up).all()
    assert (found.down[found.counted] == load.down).all()
    assert ((found.up >= 0) & (found.up <= load.up)).all()
    assert ((found.down >= 0) & (found.down <= load.down)).all()
    # nobody computes longer than the round, nor than its work
    assert ((found.compute >= 0) & (found.compute <= found.seconds * (1 + 1e-9) + 1e-9)).all()
    assert (found.energy >= 0).all()
    assert np.isfinite(found.energy).all()


def test_clients_without_data_do_not_fill_a_round() -> None:
    world = World(device=lambda draw: Device(10.0, 1e6, 1e6), over_selection=3.0)
    load = Load(1000, 1000, np.array([0, 0, 50, 0, 0, 0]))
    found = pass_round(world, np.arange(6), load, goal=2, seed=0, round=1)
    assert found.counted.tolist() == [False, False, True, False, False, False]
    assert not found.late.any()


@given(rounds())
def test_a_round_is_counted_randomness(case: tuple[World, np.ndarray, Load, dict[str, int]]) -> None:
    world, clients, load, how = case
    one, two = (pass_round(world, clients, load, **how) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@given(rounds(), st.randoms())
def test_the_order_in_which_clients_are_listed_does_not_matter(case: Any, shuffler: Any) -> None:
    world, clients, load, how = case
    order = np.array(shuffler.sample(range(len(clients)), len(clients)), np.int64)
    one = pass_round(world, clients, load, **how)
    two = pass_round(world, clients[order], load._replace(examples=load.examples[order]), **how)
    assert one.seconds == two.seconds
    np.testing.assert_array_equal(one.dropped[order], two.dropped)
    np.testing.assert_array_equal(one.compute[order], two.compute)


@given(rounds())
def test_a_longer_deadline_counts_no_fewer(case: Any) -> None:
    world, clients, load, how = case
    longer = World(device=world.device, deadline=None if world.deadline is None else 2 * world.deadline)
    short, long = (pass_round(w, clients, load, **how) for w in (world, longer))
    assert (long.counted >= short.counted).all()


def fixed(*made: Device) -> Any:
    """Devices by position: the first draw of client i's own generator tells which client it is."""
    from foedus.core.random import generator

    known = {float(generator(0, "device", i).random()): d for i, d in enumerate(made)}
    return lambda draw: known[float(draw.random())]


def passed(world: World, examples: list[int], goal: int) -> Passage:
    load = Load(1000, 500, np.array(examples, np.int64))
    return pass_round(world, np.arange(len(examples)), load, goal=goal, seed=0, round=1)


FAST, SLOW = Device(100.0, 1000.0, 500.0, 10.0, 0.01), Device(10.0, 500.0, 100.0, 2.0, 0.0)


def test_times_bytes_and_joules_worked_out_by_hand() -> None:
    """Fast: 1 s down, 2 s of 200 examples, 1 s up. Slow: 2 s, 20 s, 5 s."""
    found = passed(World(device=fixed(FAST, SLOW)), [200, 200], goal=2)
    assert found.seconds == pytest.approx(27)
    assert found.counted.tolist() == [True, True]
    assert found.compute.tolist() == pytest.approx([2, 20])
    assert found.energy.tolist() == pytest.approx([2 * 10 + 1500 * 0.01, 20 * 2])
    assert (found.up.tolist(), found.down.tolist()) == ([500, 500], [1000, 1000])


def test_a_straggler_is_cut_off_at_the_deadline_and_has_worked_in_vain() -> None:
    found = passed(World(device=fixed(FAST, SLOW), deadline=10.0), [200, 200], goal=2)
    assert found.seconds == 10
    assert found.counted.tolist() == [True, False]
    assert found.late.tolist() == [False, True]
    assert found.compute.tolist() == pytest.approx([2, 8])
    assert found.up.tolist() == [500, 0]


def test_the_round_closes_when_enough_have_answered() -> None:
    found = passed(World(device=fixed(SLOW, FAST, FAST)), [200, 100, 200], goal=1)
    assert found.seconds == pytest.approx(3)
    assert found.counted.tolist() == [False, True, False]
    assert found.up.tolist() == [0, 500, 0], "the second had just finished training"


def test_ties_count_no_more_than_the_goal() -> None:
    found = passed(World(device=fixed(FAST, FAST, FAST)), [200, 200, 200], goal=2)
    assert found.counted.sum() == 2
    assert found.late.sum() == 1


def test_a_round_in_which_all_are_lost_ends_with_the_last_of_them() -> None:
    lost = FAST._replace(dropout=1.0)
    found = passed(World(device=fixed(lost, lost)), [200, 200], goal=1)
    assert not found.counted.any()
    assert 0 < found.seconds < 4
    assert passed(World(device=fixed(lost, lost), deadline=10.0), [200, 200], goal=1).seconds == 10


def test_nobody_asked_takes_no_time() -> None:
    found = passed(World(device=phone), [], goal=1)
    assert (found.seconds, len(found.counted)) == (0, 0)


@pytest.mark.parametrize(("kind", "dropout", "speed"), [(phone, 0.08, 100), (silo, 0.005, 5000)])
def test_ready_made_devices_are_what_they_say(kind: Any, dropout: float, speed: float) -> None:
    made = [kind(np.random.default_rng(i)) for i in range(2000)]
    assert {d.dropout for d in made} == {dropout}
    assert np.median([d.speed for d in made]) == pytest.approx(speed, rel=0.1)


def test_dropouts_come_as_often_as_they_should() -> None:
    world = World(device=lambda g: FAST._replace(dropout=0.3))
    many = pass_round(world, np.arange(4000), Load(1, 1, np.ones(4000, np.int64)), goal=4000, seed=1, round=1)
    assert many.dropped.mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: World(device=phone, over_selection=0.5), "over_selection"),
        (lambda: World(device=phone, over_selection=float("nan")), "over_selection"),
        (lambda: World(device=phone, deadline=0.0), "deadline"),
        (lambda: World(device=phone, deadline="1 h"), "deadline must be a number .*, in seconds"),  # type: ignore[arg-type]
        (lambda: World(device=phone, over_selection="2"), "over_selection"),  # type: ignore[arg-type]
        (lambda: World(device=phone, minimum=0), "minimum"),
        (lambda: World(device=phone, minimum=1.5), "minimum"),  # type: ignore[arg-type]
        (lambda: World(device=FAST), "function"),  # type: ignore[arg-type]
        (
            lambda: passed(World(device=fixed(FAST._replace(speed=0.0))), [1], 1),
            "no device can be .*speed=0.0",
        ),
        (lambda: passed(World(device=fixed(FAST._replace(dropout=1.5))), [1], 1), "dropout is a chance"),
        (lambda: passed(World(device=fixed(FAST._replace(upload=float("nan")))), [1], 1), "no device can be"),
    ],
)
def test_worlds_that_cannot_be_are_refused(build: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        build()


# --- in a run -----------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(300, 4))
Y = (X.sum(1) > 0).astype(int)
CLIENTS = fd.Clients.of({i: (X[i::30], Y[i::30]) for i in range(30)}, central_test=(X, Y))


def run(folder: Path, world: World | None, *, rounds: int = 12, cohort: Any = 8) -> fd.Run:
    settings = fd.Settings(folder=folder, world=world, progress=False, executor=fd.executors.debug())
    algorithm = fd.fedavg(fd.local_sgd(lr=0.2, epochs=2, batch_size=4))
    return fd.simulate(
        fd.Task(logistic(4, 2), metrics=[fd.accuracy]),
        algorithm,
        CLIENTS,
        rounds=rounds,
        cohort=cohort,
        settings=settings,
    )


@pytest.mark.parametrize("over_selection", [1.0, 1.25, 1.3, 1.7, 5.0])
def test_never_more_than_the_cohort_that_was_wanted_is_counted(tmp_path: Path, over_selection: float) -> None:
    done = run(tmp_path, World(device=phone, over_selection=over_selection))
    for m in done.metrics:
        assert m["cohort"] == min(30, int(np.ceil(8 * over_selection - 1e-9)))
        assert m["trained"] <= 8
        assert m["trained"] + m["simulated"]["dropped"] + m["simulated"]["late"] == m["cohort"]


def test_over_selection_makes_up_for_dropouts(tmp_path: Path) -> None:
    device = lambda g: phone(g)._replace(dropout=0.4)  # noqa: E731
    few, many = (
        np.mean([m["trained"] for m in run(tmp_path / str(o), World(device=device, over_selection=o)).metrics])
        for o in (1.0, 2.5)
    )
    assert few < 6
    assert many > 7.5


def test_totals_add_up_and_go_on_after_a_break(tmp_path: Path) -> None:
    world = World(device=phone, over_selection=1.5, deadline=30.0)
    run(tmp_path, world, rounds=5)
    done = run(tmp_path, world, rounds=12)
    simulated = [m["simulated"] for m in done.metrics]
    assert simulated[-1]["elapsed_seconds"] == pytest.approx(sum(s["seconds"] for s in simulated))
    from foedus.record.folder import lines

    costs = lines(tmp_path / "costs.jsonl")
    assert sum(c["bytes_up"] for c in costs) == sum(m["bytes_up"] for m in done.metrics)
    assert sum(c["bytes_down"] for c in costs) == sum(m["bytes_down"] for m in done.metrics)
    assert sum(c["energy_joules"] for c in costs) == pytest.approx(sum(s["energy_joules"] for s in simulated))
    assert sum(c["compute_seconds"] for c in costs) == pytest.approx(sum(s["compute_seconds"] for s in simulated))
    assert sum(c["rounds"] for c in costs) == sum(m["cohort"] for m in done.metrics)


def test_too_few_answers_leave_the_model_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, World(device=lambda g: phone(g)._replace(dropout=0.9), minimum=8), rounds=4)
    assert not done.weights.vector.any()


def test_a_world_changes_who_is_counted_and_nothing_else(tmp_path: Path) -> None:
    """Devices that never fail and are waited for give the run without a world."""
    plain = run(tmp_path / "plain", None)
    perfect = run(tmp_path / "perfect", World(device=lambda g: FAST))
    assert plain.weights.vector.tobytes() == perfect.weights.vector.tobytes()
    keys = set(plain.metrics[0])
    assert [{k: m[k] for k in keys} for m in perfect.metrics] == plain.metrics
