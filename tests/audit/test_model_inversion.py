"""The finished model tells what its classes look like."""

import numpy as np
import pytest

import foedus as fd
from foedus.audit.inversion import Knowledge
from foedus.audit.model_inversion import imagine
from foedus.backends import Assignment, open_trainer
from foedus.core.batches import plan
from foedus.errors import ConfigurationError

from .problems import SIDE, flat, pictures, start, task

KNOWN = Knowledge(shape=(1, SIDE, SIDE), classes=3)


@pytest.mark.slow
def test_classes_are_recognised_in_a_trained_model_and_not_in_a_fresh_one():
    data = pictures(300)
    trainer, spec = open_trainer(task(flat), seed=0, device="cpu"), fd.local_sgd(0.2, epochs=10, batch_size=20)
    steps = plan(spec, np.array([300]), np.array([0]), seed=0, round=1)
    trained = trainer.train(trainer.initial(), Assignment(spec, data, steps, 1, 0)).weights
    means = np.stack([data.inputs[0][data.targets == c].mean(0) for c in range(3)])
    found = imagine(task(flat), trained, KNOWN, steps=150)
    assert found.likeness(means)["recognised"] == 1
    assert found.likeness(means)["correlation"] > 0.4
    fresh = imagine(task(flat), start(flat), KNOWN, steps=150)
    assert fresh.likeness(means)["correlation"] < 0.3


def test_without_classes_it_is_refused():
    with pytest.raises(ConfigurationError, match="classes=10"):
        imagine(task(flat), start(flat), Knowledge(shape=(1, SIDE, SIDE)))
