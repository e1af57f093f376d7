"""Membership: figures of scores, and attacks on a model that learnt by heart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foedus as fd
from foedus.audit.membership import by_likelihood_ratio, by_loss, confidence, scored
from foedus.backends import Assignment, open_trainer
from foedus.core.batches import plan
from foedus.core.linear import logistic
from foedus.errors import ConfigurationError, DataError

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_figures_are_what_counting_pairs_and_thresholds_gives(inside, outside):
    found = scored(inside, outside)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    levels = [*range(-5, 7)]
    rates = [(np.mean([a >= t for a in inside]), np.mean([b >= t for b in outside])) for t in levels]
    assert found.auc == pytest.approx(np.mean(pairs))
    assert found.advantage == pytest.approx(max(t - f for t, f in rates))
    assert found.tpr == pytest.approx(max(t for t, f in rates if f <= 0.01))


def test_guessing_stays_below_what_chance_gives_19_times_in_20():
    draws = np.random.default_rng(0)
    over = [scored(draws.normal(size=200), draws.normal(size=150)) for _ in range(200)]
    assert np.mean([one.advantage > one.by_chance for one in over]) < 0.09


def test_confidence_is_the_logit_of_the_probability():
    p = np.array([0.1, 0.5, 0.999])
    assert confidence(-np.log(p)) == pytest.approx(np.log(p / (1 - p)))


def overfitted(count=40, features=300):
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(2 * count, features)).astype(np.float32), draws.integers(0, 2, 2 * count)
    task = fd.Task(logistic(features, 2))
    trainer = open_trainer(task, seed=0)

    def fit(examples, number):
        spec = fd.local_sgd(0.5, epochs=30, batch_size=None)
        steps = plan(spec, np.array([len(examples)]), np.array([0]), seed=number, round=1)
        return trainer.train(trainer.initial(), Assignment(spec, examples, steps, 1, number)).weights

    data = fd.Examples.of(x, y)
    return task, fit, data.take(slice(0, count)), data.take(slice(count, None))


def test_what_was_learnt_by_heart_is_told_and_what_was_not_learnt_is_not():
    task, fit, members, others = overfitted()
    weights = fit(members, 0)
    simple = by_loss(task, weights, members=members, others=others)
    ratio = by_likelihood_ratio(task, weights, fit, members=members, others=others, shadows=4)
    assert simple.auc > 0.9
    assert ratio.auc > 0.9
    fresh = open_trainer(task, seed=0).initial()
    assert abs(by_loss(task, fresh, members=members, others=others).auc - 0.5) < 0.15


def test_nonsense_is_refused():
    with pytest.raises(DataError, match="0 and 1"):
        scored([], [1.0])
    task, fit, members, others = overfitted()
    with pytest.raises(ConfigurationError, match="shadows=4"):
        by_likelihood_ratio(task, fit(members, 0), fit, members=members, others=others, shadows=3)
