"""Canaries measure what noise promises, and find what nothing hides."""

from dataclasses import replace

import numpy as np
import pytest

import foedus as fd
from foedus.audit.canaries import (
    Lookout,
    canaries_in,
    cosines,
    direction,
    empirical,
    in_final_model,
    in_messages,
    sending,
    told_apart,
    with_canaries,
)
from foedus.backends import open_trainer
from foedus.errors import ConfigurationError, DataError
from foedus.sim.federation import run_federation

from .problems import federation, flat, task

DELTA = 1e-5
SIZE = 2000


def layout():
    return open_trainer(task(flat), seed=0, device="cpu").layout


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [0.1, 1.0, 6.0])
def test_two_normal_distributions_are_told_apart_as_the_accountant_says(multiplier):
    pytest.importorskip("dp_accounting")
    claimed = fd.privacy.pld([(fd.privacy.Gaussian(multiplier), 1)], DELTA)
    assert told_apart(1 / multiplier, delta=DELTA) == pytest.approx(claimed, rel=2e-3, abs=2e-3)


def mechanism(multiplier, *, seed, count=40, rounds=1):
    """What a lookout finds in noisy sums of canaries."""
    lookout, draws = Lookout(seed, count), np.random.default_rng(seed)
    total = sum(direction(seed, i, SIZE).astype(float) for i in range(count))
    for _ in range(rounds):
        lookout.see(np.zeros(SIZE), total + multiplier * draws.normal(size=SIZE))
    return lookout.found(DELTA)


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_the_empirical_epsilon_of_a_known_mechanism_is_below_the_true_one(multiplier):
    pytest.importorskip("dp_accounting")
    true = fd.privacy.pld([(fd.privacy.Gaussian(multiplier), 3)], DELTA)
    found = [mechanism(multiplier, seed=seed, count=24, rounds=3) for seed in range(8)]
    assert sum(one.least > true for one in found) <= 1
    assert np.mean([one.epsilon for one in found]) < 1.15 * true
    assert np.mean([one.epsilon for one in found]) > 0.6 * true


@pytest.mark.slow
def test_without_noise_epsilon_is_far_above_zero_and_much_noise_brings_it_down():
    bare, drowned = mechanism(0.0, seed=1), mechanism(200.0, seed=1)
    assert bare.least > 40  # 40 of them in 2000 dimensions hide each other a little
    assert drowned.least < 0.5


def test_directions_are_of_length_one_and_their_own():
    rows = np.stack([direction(0, i, SIZE) for i in range(5)])
    assert rows @ rows.T == pytest.approx(np.eye(5), abs=0.12)
    assert (direction(0, 1, SIZE) == rows[1]).all()
    assert cosines(rows[2], 0, 5)[2] == pytest.approx(np.sqrt(SIZE), rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "bound"),
    [
        (fd.mean(), None),
        (fd.chain(fd.clip(0.5), fd.mean()), 0.5),
        (fd.chain(fd.rotate(), fd.quantise(bits=8), fd.mean()), None),
        (fd.sign_majority(), None),
        (fd.multi_krum(1), None),
        (fd.chain(fd.clip(0.5), fd.trimmed_mean(0.2)), 0.5),
        (fd.chain(fd.clip(0.5), fd.masked(fd.Withstand(clients=6, corrupt=0.0), bits=20, least=4)), 0.5),
        (fd.privacy.central(clip=2.0, noise_multiplier=1.0, cohort=7), 2.0),
        (fd.chain(fd.privacy.local(clip=3.0, noise_multiplier=1.0), fd.mean()), 3.0),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_the_bound_of_clipping_is_found(rule, bound):
    found = sending(rule, layout(), 0)
    assert found is None if bound is None else found == pytest.approx(2 * bound, rel=0.05)


@pytest.mark.slow
def test_canaries_enter_a_federation_and_are_found_in_its_model(tmp_path):
    plain = federation()
    entered = with_canaries(plain, layout(), count=10)
    assert canaries_in(plain) is None
    assert canaries_in(entered) == 10
    assert len(entered.clients) == len(plain.clients) + 10
    settings = replace(entered.settings, folder=tmp_path / "run")
    run = run_federation(replace(entered, settings=settings))
    first = open_trainer(task(flat), seed=0, device="cpu").initial()
    found = in_final_model(first.vector, run.weights.vector, seed=0, count=10)
    assert found.least > 3


def test_cohorts_grow_with_the_population():
    cohort = with_canaries(replace(federation(), cohort=3), layout(), count=6).cohort
    assert cohort == 6


@pytest.mark.slow
def test_one_message_tells_all_unless_its_client_added_noise():
    bare = in_messages(fd.chain(fd.clip(1.0), fd.mean()), layout(), seed=0, count=8)
    noisy = in_messages(
        fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=8.0), fd.mean()), layout(), seed=0, count=8
    )
    assert bare.least > 100
    assert noisy.least < 1


@pytest.mark.slow
def test_all_messages_of_a_client_tell_as_much_as_independent_noise_lets_through():
    """A direction of length 1 under noise of 8 is told, by 64 messages, as one under noise of 1 by one."""
    rule = fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=8.0), fd.mean())
    all_of_them = in_messages(rule, layout(), seed=0, count=40, messages=64)
    assert all_of_them.label == "64 messages of one client"
    assert all_of_them.epsilon == pytest.approx(told_apart(1.0, delta=1e-5), rel=0.35)
    assert all_of_them.epsilon > 5 * in_messages(rule, layout(), seed=0, count=40).epsilon


def test_where_sums_have_no_room_for_more_canaries_take_the_place_of_clients():
    plain = federation(aggregator=fd.chain(fd.clip(0.5), fd.masked(fd.Withstand(clients=6, corrupt=0.0), least=4)))
    entered = with_canaries(replace(plain, cohort=5), layout(), count=30)
    assert canaries_in(entered) == 3
    assert list(entered.clients.ids) == [0, 1, 2, "canary 0", "canary 1", "canary 2"]
    assert entered.cohort == 5
    roomy = federation(aggregator=fd.masked(fd.Withstand(clients=40, corrupt=0.0), least=5))
    assert len(with_canaries(roomy, layout(), count=30).clients) == 36


def test_what_cannot_have_canaries_is_refused():
    hostile = fd.Adversary(clients=[0], attack=fd.attacks.sign_flip())
    attacked = replace(federation(), settings=fd.Settings(adversary=hostile))
    with pytest.raises(ConfigurationError, match="attackers already"):
        with_canaries(attacked, layout())
    streaming = replace(federation(), clients=federation().clients.arriving(2))
    with pytest.raises(ConfigurationError, match="arrives over rounds"):
        with_canaries(streaming, layout())
    with pytest.raises(DataError, match="at least 2"):
        empirical([1.0], [0.0, 1.0])
