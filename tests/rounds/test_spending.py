"""Budgets in the simulator: they end runs in time, survive kills, and refuse what they do not cover."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting")

import foedus as fd
from foedus.core.linear import logistic
from foedus.core.method import Contribution, Gathered, Local, Method, Train, Visit, averaging
from foedus.core.select import Sampler
from foedus.errors import CheckpointError, NoGuarantee
from foedus.privacy import (
    Budget,
    Gaussian,
    Plan,
    Sampled,
    Strategy,
    adaptive,
    banded,
    central,
    correlated,
    gaussian_shares,
    local,
    rdp,
    skellam_shares,
    tree,
    trusted_sum,
)
from foedus.record.checkpoint import Checkpoint
from foedus.record.folder import RunFolder
from foedus.sim.world import phone
from foedus.tree import Layout

BUDGET = Budget(epsilon=3.0, delta=1e-3, hidden=True)
RULE = central(clip=0.5, noise_multiplier=1.0, cohort=6)
EVENT = Sampled(0.15, Gaussian(1.0))


def clients(*, broken: tuple[int, ...] = ()) -> fd.Clients:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = (x @ np.array([1.0, -1.0, 2.0]) > 0).astype(int)
    shares: dict[int | str, Any] = {i: (x[i::40], y[i::40]) for i in range(40)}
    shares |= {i: (np.full_like(shares[i][0], np.nan), shares[i][1]) for i in broken}
    return fd.Clients.of(shares, central_test=(x, y))


def simulated(folder: Path, rule: fd.Aggregator = RULE, **changes: Any) -> fd.Run:
    """A run; ``changes`` of its settings, or of rounds, cohort and clients."""
    own: dict[str, Any] = {"rounds": 60, "cohort": fd.poisson(0.15), "clients": clients()}
    own |= {name: changes.pop(name) for name in list(changes) if name in own}
    population = own.pop("clients")
    settings = fd.Settings(
        folder=folder, progress=False, checkpoint_seconds=0.0, executor=fd.executors.debug(), budget=BUDGET
    )
    task = fd.Task(logistic(3, 2), metrics=[fd.accuracy])
    algorithm = fd.fedavg(fd.local_sgd(lr=0.3, batch_size=5), aggregator=rule)
    return fd.simulate(task, algorithm, population, settings=replace(settings, **changes), **own)


def checkpoint(folder: Path) -> Checkpoint:
    kept = RunFolder(folder)
    try:
        saved = kept.restore()
    finally:
        kept.close()
    assert saved is not None
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULE, adaptive(noise_multiplier=1.0, cohort=20)], ids=lambda r: r.label)
def test_a_run_ends_before_its_budget_would_be_exceeded(tmp_path: Path, rule: fd.Aggregator) -> None:
    run = simulated(tmp_path, rule)
    rounds = len(run.metrics)
    assert 1 < rounds < 60
    assert rdp([(EVENT, rounds)], 1e-3) <= 3.0 < rdp([(EVENT, rounds + 1)], 1e-3)
    told = [line["privacy"]["epsilon"] for line in run.metrics]
    assert told == [rdp([(EVENT, n)], 1e-3) for n in range(1, rounds + 1)]
    assert {line["privacy"]["against"] for line in run.metrics} == {EVENT.neighbours.value}
    assert checkpoint(tmp_path).values["stopped"].startswith("the privacy budget is spent")


@pytest.mark.slow
def test_a_plan_ends_with_its_last_round(tmp_path: Path) -> None:
    plan = Plan(noise_multiplier=1.0, rounds=5, cohort=6, population=40, hidden=True)
    budget = Budget(epsilon=3.0, delta=1e-3, hidden=True, planned=plan.history)
    assert len(simulated(tmp_path, budget=budget).metrics) == 5


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULE, adaptive(noise_multiplier=1.0, cohort=20)], ids=lambda r: r.label)
def test_a_run_killed_at_any_round_spends_what_one_never_killed_does(tmp_path: Path, rule: fd.Aggregator) -> None:
    whole = simulated(tmp_path / "whole", rule, rounds=6)
    for rounds in (2, 3, 6):
        again = simulated(tmp_path / "killed", rule, rounds=rounds)
    assert again.metrics == whole.metrics
    one, other = (checkpoint(tmp_path / name).arrays for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert "privacy.ledger" in one
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.slow
def test_executors_add_the_same_noise(tmp_path: Path) -> None:
    for rule in (RULE, fd.chain(local(clip=0.5, noise_multiplier=9.0), fd.mean())):
        budget = replace(BUDGET, hidden=rule is RULE)
        found = {
            name: simulated(tmp_path / rule.label[:5] / name, rule, rounds=2, executor=executor, budget=budget)
            for name, executor in (
                ("debug", fd.executors.debug()),
                ("processes", fd.executors.processes(workers=2)),
            )
        }
        one, other = (run.metrics[-1]["central"]["loss"] for run in found.values())
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_more_budget_lets_a_run_go_on_but_another_claim_does_not(tmp_path: Path) -> None:
    first = simulated(tmp_path)
    more = simulated(tmp_path, budget=replace(BUDGET, epsilon=4.0))
    assert len(more.metrics) > len(first.metrics)
    assert more.metrics[: len(first.metrics)] == first.metrics
    with pytest.raises(CheckpointError, match="another run"):
        simulated(tmp_path, budget=replace(BUDGET, epsilon=99.0, hidden=False))
    with pytest.raises(CheckpointError, match="another run"):
        simulated(tmp_path, budget=None)


# --- nobody, and NaN ----------------------------------------------------------------------------------------


def nobody_in(rounds: set[int]) -> Sampler:
    """Poisson, as far as it says; empty in some rounds."""
    usual = fd.poisson(0.15)
    empty = np.empty(0, np.int64)
    return usual._replace(sample=lambda p, seed, round: empty if round in rounds else usual.sample(p, seed, round))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULE, adaptive(noise_multiplier=1.0, cohort=20)], ids=lambda r: r.label)
def test_a_round_of_nobody_gets_noise_and_counts(tmp_path: Path, rule: fd.Aggregator) -> None:
    run = simulated(tmp_path, rule, rounds=3, cohort=nobody_in({2}))
    losses = [line["central"]["loss"] for line in run.metrics]
    assert len(set(losses)) == 3, "the model moved in every round"
    assert run.metrics[1]["privacy"]["epsilon"] > run.metrics[0]["privacy"]["epsilon"]


@pytest.mark.slow
def test_clients_with_nan_leave_no_trace_in_the_noisy_sum(tmp_path: Path) -> None:
    """As if they had not come, the divisor included; and if all have NaN, nobody sees that from the model."""
    everybody = tuple(range(40))
    run = simulated(tmp_path / "all", rounds=2, clients=clients(broken=everybody))
    assert all(len(line["refused"]) == line["cohort"] for line in run.metrics)
    empty = simulated(tmp_path / "none", rounds=2, cohort=nobody_in({1, 2}))
    assert np.isfinite(run.metrics[-1]["central"]["loss"])
    same = [simulated_model(r) for r in (run, empty)]
    assert same[0].tobytes() == same[1].tobytes()


def simulated_model(run: fd.Run) -> np.ndarray[Any, np.dtype[Any]]:
    with np.errstate(all="ignore"):
        saved = checkpoint(Path(run.folder))
    return saved.arrays["vector"]


@pytest.mark.slow
def test_without_a_budget_nothing_is_claimed_and_nothing_needs_the_accountant(tmp_path: Path) -> None:
    run = simulated(tmp_path, rounds=2, budget=None)
    assert "privacy" not in run.metrics[-1]


# --- refusals, before anything is trained -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cohort": 6}, "does not let every client take part by itself"),
        ({"cohort": None}, "does not let every client take part by itself"),
        ({"rule": fd.mean()}, "nothing is private"),
        ({"rule": central(clip=1.0, noise_multiplier=0.1, cohort=6)}, "already one round"),
        ({"world": fd.World(device=phone)}, "simulated world"),
        ({"watch": fd.Watch()}, "keeps clients out"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_covered_is_refused_before_it_begins(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(NoGuarantee, match=told):
        simulated(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


# --- what clients are told ----------------------------------------------------------------------------------


def second_channel(rule: fd.Aggregator) -> Method:
    """Clients send their update once more, in a channel that is told something before anything has come in it."""

    def local(visit: Visit) -> Local:
        trained = yield Train()
        brought = Contribution.of(trained, visit)
        assert brought.update is not None
        return brought._replace(sides={"more": brought.update})

    return averaging()._replace(local=local, sides={"more": rule}, label="twice()")


@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULE, adaptive(noise_multiplier=1.0, cohort=20)], ids=lambda r: r.label)
def test_a_round_of_nobody_gets_noise_in_every_channel(tmp_path: Path, rule: fd.Aggregator) -> None:
    """Also where clients come but send nothing in one of them; and a run that goes on ends with the same bytes."""
    seen: dict[int, Any] = {}

    def finish(gathered: Gathered) -> tuple[Any, Any]:
        seen[gathered.round] = gathered.sides["more"]
        return gathered.update, gathered.state

    def local(visit: Visit) -> Local:
        trained = yield Train()
        sides = {} if visit.round == 4 else {"more": np.ones(3)}
        return Contribution.of(trained, visit)._replace(sides=sides)

    method = Method(local, "more()", sides={"more": rule}, finish=finish, counts=False)
    algorithm = fd.Algorithm(client=fd.local_sgd(lr=0.3, batch_size=5), aggregator=rule, method=method)
    task = fd.Task(logistic(3, 2), metrics=[fd.accuracy])
    settings = fd.Settings(
        progress=False, checkpoint_seconds=0.0, executor=fd.executors.debug(), budget=Budget(epsilon=1e3, delta=1e-3)
    )  # fmt: skip

    def run(folder: str, rounds: int) -> fd.Run:
        own = replace(settings, folder=tmp_path / folder)
        return fd.simulate(task, algorithm, clients(), rounds=rounds, cohort=nobody_in({1, 3}), settings=own)

    whole = run("whole", 5)
    assert [len(seen[round]) for round in range(1, 6)] == [8, 3, 3, 3, 3], "the model's length until something came"
    assert all(np.std(seen[round]) > 0 for round in seen)
    found = dict(seen)
    for rounds in (2, 3, 5):
        again = run("killed", rounds)
    assert again.metrics == whole.metrics
    assert all((seen[round] == found[round]).all() for round in found)


TELLING = adaptive(noise_multiplier=1.0, cohort=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"method": second_channel(TELLING)}, {"timing": fd.buffered(3)}, {"timing": fd.hierarchical(2)}],
    ids=lambda changes: next(iter(changes.values())).label,
)
def test_what_clients_are_told_reaches_them_at_every_pace_and_in_every_channel(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    algorithm = replace(fd.fedavg(fd.local_sgd(lr=0.3, batch_size=5), aggregator=TELLING), **changes)

    def run(folder: str, rounds: int) -> fd.Run:
        settings = fd.Settings(
            folder=tmp_path / folder, progress=False, checkpoint_seconds=0.0, executor=fd.executors.debug(),
            world=fd.World(device=phone),
        )  # fmt: skip
        task = fd.Task(logistic(3, 2), metrics=[fd.accuracy])
        return fd.simulate(task, algorithm, clients(), rounds=rounds, cohort=6, settings=settings)

    whole, _ = run("whole", 4), run("cut", 2)
    assert not any("refused" in line for line in whole.metrics)
    assert checkpoint(tmp_path / "whole").arrays["aggregator.clip"] != TELLING.init(Layout((), (), ()))["clip"]
    assert run("cut", 4).metrics == whole.metrics


# --- noise in shares ----------------------------------------------------------------------------------------

PLAIN = Budget(epsilon=1e3, delta=1e-3)


def some(rounds: dict[int, int]) -> Sampler:
    """Eight clients, but in some rounds fewer."""
    usual = fd.uniform(8)
    return usual._replace(sample=lambda p, seed, round: usual.sample(p, seed, round)[: rounds.get(round, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("make", [gaussian_shares, skellam_shares])
def test_a_round_of_too_few_shares_is_not_decoded_and_costs_nothing(tmp_path: Path, make: Any) -> None:
    rule = trusted_sum(make(clip=0.5, noise_multiplier=3.0, cohort=8, honest=5, bits=20), planned=8)
    run = simulated(tmp_path, rule, rounds=5, cohort=some({2: 4, 3: 0, 4: 5}), budget=PLAIN)
    losses = [line["central"]["loss"] for line in run.metrics]
    spent = [line["privacy"]["epsilon"] for line in run.metrics]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert spent == [rdp([(rule.event, n)], 1e-3) for n in (1, 1, 1, 2, 3)]
    again = [
        simulated(tmp_path / "again", rule, rounds=n, cohort=some({2: 4, 3: 0, 4: 5}), budget=PLAIN) for n in (2, 5)
    ]
    assert again[-1].metrics == run.metrics


# --- noise that hangs together over rounds ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [banded(6, separation=4), tree(6, separation=4)], ids=lambda s: s.label)
def test_a_run_with_correlated_noise_goes_on_to_the_same_bytes(tmp_path: Path, strategy: Strategy) -> None:
    """Its noise of earlier rounds is part of what is kept."""
    rule = correlated(strategy, clip=0.5, noise_multiplier=3.0, cohort=8)
    spaced = fd.spaced(8, separation=4)
    whole = simulated(tmp_path / "whole", rule, rounds=6, cohort=spaced, budget=PLAIN)
    for rounds in (1, 3, 6):
        again = simulated(tmp_path / "killed", rule, rounds=rounds, cohort=spaced, budget=PLAIN)
    assert again.metrics == whole.metrics
    one, other = (checkpoint(tmp_path / name).arrays for name in ("whole", "killed"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert [line["privacy"]["epsilon"] for line in whole.metrics] == [rdp([(rule.event, n)], 1e-3) for n in range(1, 7)]
    assert len(simulated(tmp_path / "more", rule, rounds=9, cohort=spaced, budget=PLAIN).metrics) == 6


@pytest.mark.slow
def test_a_budget_ends_a_stream_before_clients_come_too_often(tmp_path: Path) -> None:
    rule = correlated(banded(9, separation=3), clip=0.5, noise_multiplier=1.0, cohort=8)
    enough = Budget(epsilon=rdp([(rule.event, 6)], 1e-3) + 1e-6, delta=1e-3)
    run = simulated(tmp_path, rule, rounds=9, cohort=fd.spaced(8, separation=3), budget=enough)
    assert len(run.metrics) == 6
    with pytest.raises(NoGuarantee, match="spaced"):
        simulated(tmp_path / "other", rule, rounds=9, cohort=8, budget=enough)
