"""Property inference tells clients apart by their updates, and noise stops it."""

import numpy as np
import pytest

import foedus as fd
from foedus.audit.properties import Played, infer_property, ridge
from foedus.audit.seen import Victim
from foedus.errors import ConfigurationError, DataError

from .problems import flat, pictures, start, task


def victim():
    return Victim(task=task(flat), before=start(flat), spec=fd.local_sgd(0.1, batch_size=4), examples=pictures(1))


def halves():
    data = pictures(240, seed=2)
    brighter = fd.Examples((np.clip(data.inputs[0] + 0.4, 0, 1),), data.targets)
    return brighter.take(slice(0, 120)), data.take(slice(120, None))


@pytest.mark.slow
def test_a_property_that_is_not_learnt_shows_in_updates_until_there_is_noise():
    having, lacking = halves()
    played = Played(examples=8, shadows=30, tested=30)
    bare = infer_property(victim(), having=having, lacking=lacking, played=played)
    noisy = fd.chain(fd.privacy.local(clip=0.01, noise_multiplier=1.0), fd.mean())
    hidden = infer_property(victim(), having=having, lacking=lacking, through=noisy, played=played)
    assert bare.auc > 0.9
    assert hidden.auc < 0.75


def test_ridge_is_ridge_regression():
    draws = np.random.default_rng(0)
    known, asked = draws.normal(size=(7, 4)), draws.normal(size=(3, 4))
    labels = np.array([1.0, -1, 1, -1, 1, -1, 1])
    rows = known - known.mean(0)
    weight = 0.1 * (rows**2).sum() / 7
    direct = np.linalg.solve(rows.T @ rows + weight * np.eye(4), rows.T @ (labels - labels.mean()))
    assert ridge(known, labels, asked) == pytest.approx((asked - known.mean(0)) @ direct)


def test_too_few_examples_are_refused():
    with pytest.raises(DataError, match="at least twice"):
        infer_property(victim(), having=pictures(10), lacking=pictures(100))
    with pytest.raises(ConfigurationError, match="share"):
        Played(share=1.5)
