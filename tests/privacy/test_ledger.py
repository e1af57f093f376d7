"""The ledger counts what was released, once; and no sequence of releases passes a budget."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("dp_accounting")

from foedus.errors import BudgetSpent, CheckpointError, ConfigurationError, NoGuarantee
from foedus.privacy.accounting import pld, rdp
from foedus.privacy.claims import Plan
from foedus.privacy.events import (
    Concentrated,
    Event,
    Gaussian,
    LocalGaussian,
    Sampled,
    Tree,
    as_json,
    of_json,
    together,
)
from foedus.privacy.ledger import (
    Budget,
    Ledger,
    allows,
    charged,
    ledger_json,
    ledger_state,
    of_ledger_json,
    of_ledger_state,
    spent,
)

EVENTS = [Gaussian(1.5), Sampled(0.01, Gaussian(1.5)), Concentrated(0.25)]
events = st.sampled_from(EVENTS)


def after(releases: list[Event]) -> Ledger:
    ledger = Ledger()
    for round, event in enumerate(releases, 1):
        ledger = charged(ledger, event, round=round)
    return ledger


# --- counting -----------------------------------------------------------------------------------------------


@given(st.lists(events, max_size=12))
def test_a_ledger_counts_every_release_whatever_the_order(releases: list[Event]) -> None:
    assert dict(after(releases).counts) == {event: releases.count(event) for event in set(releases)}


def test_the_same_bytes_again_are_one_release_and_fresh_noise_is_another() -> None:
    once = charged(Ledger(), EVENTS[0], round=4, release="digest of the first attempt")
    assert charged(once, EVENTS[0], round=4, release="digest of the first attempt") is once
    twice = charged(once, EVENTS[0], round=4, release="digest of the second")
    assert twice.counts == ((EVENTS[0], 2),)
    assert charged(twice, EVENTS[0], round=4, release="digest of the first attempt") is twice
    assert charged(twice, EVENTS[0], round=5).counts == ((EVENTS[0], 3),)


def test_rounds_do_not_go_back() -> None:
    with pytest.raises(NoGuarantee, match="round 2 comes after round 3"):
        charged(charged(Ledger(), EVENTS[0], round=3), EVENTS[0], round=2)


@pytest.mark.parametrize(
    ("event", "told"), [("noise", "no event"), (None, "no event"), (LocalGaussian(1.0), "different neighbours")]
)
def test_what_cannot_be_accounted_for_changes_nothing(event: object, told: str) -> None:
    ledger = after([EVENTS[0]])
    with pytest.raises(NoGuarantee, match=told):
        charged(ledger, event, round=2)  # type: ignore[arg-type]
    assert ledger == after([EVENTS[0]])


# --- checkpoints --------------------------------------------------------------------------------------------


@given(st.lists(events, max_size=12))
def test_a_ledger_survives_json_and_arrays(releases: list[Event]) -> None:
    ledger = after(releases)
    assert of_ledger_json(json.loads(json.dumps(ledger_json(ledger)))) == ledger
    state = {name: array.copy() for name, array in ledger_state(ledger).items()}
    assert of_ledger_state(state) == ledger
    assert of_ledger_state({}) == Ledger()


@pytest.mark.parametrize("event", [*EVENTS, LocalGaussian(2.0), Tree(7.0, 2000)])
def test_events_survive_json(event: Event) -> None:
    assert of_json(json.loads(json.dumps(as_json(event)))) == event


@pytest.mark.parametrize(
    "told", [{}, {"version": 99}, {"version": 1}, {"version": 1, "counts": [{"event": "Gaussian"}]}]
)
def test_a_damaged_ledger_is_no_empty_one(told: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="privacy ledger"):
        of_ledger_json(told)
    with pytest.raises(CheckpointError, match="damaged"):
        of_ledger_state({"ledger": np.frombuffer(b"{half", np.uint8)})


def test_a_ledger_of_unknown_events_is_refused() -> None:
    told = ledger_json(after([EVENTS[0]]))
    told["counts"][0]["event"] = "Shuffled"
    with pytest.raises(NoGuarantee, match="Shuffled"):
        of_ledger_json(told)


# --- budgets ------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.lists(events, min_size=1, max_size=20), st.floats(0.5, 10))
def test_no_sequence_of_releases_passes_a_budget(wanted: list[Event], epsilon: float) -> None:
    budget, ledger = Budget(epsilon=epsilon, delta=1e-5), Ledger()
    for round, event in enumerate(wanted, 1):
        if allows(ledger, event, budget):
            ledger = charged(ledger, event, round=round, budget=budget)
            continue
        with pytest.raises(BudgetSpent, match=f"round {round} would exceed"):
            charged(ledger, event, round=round, budget=budget)
        assert rdp([*ledger.counts, (event, 1)], 1e-5) > epsilon
    assert spent(ledger, 1e-5) <= epsilon


def test_a_release_that_is_counted_already_may_be_repeated_when_all_is_spent() -> None:
    budget = Budget(epsilon=5.0, delta=1e-5)
    ledger = charged(Ledger(), Gaussian(1.0), round=1, release="a", budget=budget)
    assert not allows(ledger, Gaussian(1.0), budget)
    assert charged(ledger, Gaussian(1.0), round=1, release="a", budget=budget) is ledger


def test_a_plan_is_kept_to_the_letter_and_costs_less() -> None:
    plan = Plan(noise_multiplier=1.0, rounds=20, cohort=100, population=1000, hidden=True)
    epsilon = pld(plan.history, 1e-5)
    budget, loose = Budget(epsilon=epsilon, delta=1e-5, planned=plan.history), Budget(epsilon=epsilon, delta=1e-5)
    ledger, rounds = Ledger(), {budget: 0, loose: 0}
    for kept in rounds:
        ledger = Ledger()
        while allows(ledger, plan.event, kept):
            rounds[kept] += 1
            ledger = charged(ledger, plan.event, round=rounds[kept], budget=kept)
    assert rounds[budget] == 20
    assert 0 < rounds[loose] < 20, "the filter needs more for the same"
    assert not allows(Ledger(), Gaussian(1.5), budget), "what is not in the plan"


def test_a_plan_beyond_the_budget_is_refused_when_built() -> None:
    with pytest.raises(NoGuarantee, match="the plan costs"):
        Budget(epsilon=1.0, delta=1e-5, planned=((Gaussian(1.0), 5),))


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"epsilon": -1}])
def test_budgets_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Budget(**({"epsilon": 1.0, "delta": 1e-5} | wrong))


# --- several sums in one round ------------------------------------------------------------------------------


@given(st.lists(st.floats(0.3, 10), min_size=1, max_size=5))
def test_sums_of_one_round_together_cost_what_they_cost_one_after_another(multipliers: list[float]) -> None:
    joint = together([Gaussian(z) for z in multipliers])
    assert rdp([(joint, 1)], 1e-5) == pytest.approx(rdp([(Gaussian(z), 1) for z in multipliers], 1e-5), rel=1e-9)


@pytest.mark.parametrize("mixed", [[], [Gaussian(1.0), LocalGaussian(1.0)], [Gaussian(1.0), Concentrated(1.0)]])
def test_what_a_round_releases_is_not_guessed(mixed: list[Event]) -> None:
    with pytest.raises(NoGuarantee, match="releases at once"):
        together(mixed)
