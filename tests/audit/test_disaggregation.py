"""A server that sends different models reads one client's update out of a sum."""

import numpy as np
import pytest
import torch

import foedus as fd
from foedus.audit.disaggregation import disaggregate
from foedus.audit.seen import Victim
from foedus.core.aggregate import lift
from foedus.errors import ConfigurationError

from .problems import kinked, pictures, smooth, start, task


def victim(network=kinked):
    spec = fd.local_sgd(0.1, batch_size=None)
    return Victim(task=task(network), before=start(network), spec=spec, examples=pictures(3))


OTHERS = [pictures(5, seed=i) for i in range(1, 8)]


def masked(clients):
    """The plain mean, with every message under masks that cancel in the sum of all clients 0 … clients − 1."""
    plain = fd.mean()

    def admit(message, context):
        hidden = dict(lift(message))
        for name in ("high", "low"):
            draws = (np.random.default_rng([i % clients, len(name)]) for i in (context.client, context.client + 1))
            own, following = (d.integers(-(2**63), 2**63 - 1, hidden[name].shape) for d in draws)
            hidden[name] = hidden[name] + own - following  # modulo 2^64
        return hidden

    return plain._replace(admit=admit, merge=lambda a, b: {name: a[name] + b[name] for name in a}, encode_all=None)


def test_the_sum_is_the_victims_update_where_the_others_are_switched_off():
    found = disaggregate(victim(), OTHERS)
    assert found.likeness > 0.9999
    assert found.honest < 0.9
    assert found.exposed > 0.95
    assert found.clients == 8


def test_masks_that_cancel_change_nothing():
    from foedus.audit.disaggregation import _sum, switched_off
    from foedus.backends import open_trainer

    one, trainer = victim(), open_trainer(task(kinked), seed=0, device="cpu")
    dead = switched_off(one.before, trainer.layout)
    with np.errstate(over="ignore"):
        hidden = _sum(one, dead, OTHERS, masked(len(OTHERS) + 1), trainer)
    assert (hidden == _sum(one, dead, OTHERS, fd.mean(), trainer)).all()


def test_sigmoids_are_switched_off_too():
    def deep():
        return torch.nn.Sequential(smooth()[:3], torch.nn.Linear(512, 16), torch.nn.Sigmoid(), torch.nn.Linear(16, 3))

    assert disaggregate(victim(deep), OTHERS).likeness > 0.999


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(ConfigurationError, match="single updates"):
        disaggregate(victim(), OTHERS, through=fd.median())
    linear = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))  # noqa: E731
    with pytest.raises(ConfigurationError, match="switched off"):
        disaggregate(victim(linear), OTHERS)
