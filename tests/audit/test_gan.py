"""The impostor rebuilds a class that it has none of, from the models alone."""

from dataclasses import replace

import numpy as np
import pytest

import foedus as fd
from foedus.audit.gan import Aim, Impostor
from foedus.errors import ConfigurationError

from .problems import SIDE, pictures, task

AIM = Aim(attacker="bad", target=2, decoy=3, shape=(1, SIDE, SIDE), steps=40, fakes=40, since=2)


def network():
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.LeakyReLU(0.2), nn.Linear(32, 4))


@pytest.mark.slow
def test_it_finds_where_the_blobs_of_a_class_are(tmp_path):
    data = pictures(360)
    lacking = data.take(240 + np.flatnonzero(data.targets[240:] != 2))
    clients = fd.Clients.of({"a": data.take(slice(0, 120)), "b": data.take(slice(120, 240)), "bad": lacking})
    impostor = Impostor(AIM)
    fd.simulate(
        task(network), fd.fedavg(impostor.training(lr=0.3, batch_size=20)), clients, rounds=12,
        settings=fd.Settings(folder=tmp_path / "run", progress=False, executor=fd.executors.debug()),
    )  # fmt: skip
    made = impostor.pictures(64).mean(0)
    means = [data.inputs[0][data.targets == c].mean(0) for c in range(3)]
    likeness = [float(np.corrcoef(made.ravel(), mean.ravel())[0, 1]) for mean in means]
    assert int(np.argmax(likeness)) == 2


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ConfigurationError, match="multiples of 4"):
        replace(AIM, shape=(1, 9, 8))
    with pytest.raises(ConfigurationError, match="both 2"):
        replace(AIM, decoy=2)
