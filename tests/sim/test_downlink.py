"""Models that travel to clients in fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.aggregate import message_bytes
from foedus.core.method import Contribution, Local, Method, Train, Visit
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError
from foedus.privacy import central
from foedus.record.folder import METRICS
from foedus.sim.world import phone

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 30))
Y = X @ RNG.normal(size=30)
CLIENTS = fd.Clients.of({i: (X[i::4], Y[i::4]) for i in range(4)}).with_test((X, Y))
TASK = fd.Task(fd.linear(30))
CLIENT = fd.local_sgd(lr=0.05, batch_size=5)
LAYOUT = open_trainer(TASK, seed=0).layout
EIGHT = fd.chain(fd.rotate(), fd.quantise(8), fd.mean())


def simulate(folder: Path, algorithm: fd.Algorithm, rounds: int = 5, **how: Any) -> fd.Run:
    settings = fd.Settings(folder=folder, executor=how.pop("executor", fd.executors.debug()), progress=False, **how)
    return fd.simulate(TASK, algorithm, CLIENTS, rounds=rounds, cohort=3, seed=1, settings=settings)


def test_clients_start_from_what_is_left_of_the_model(tmp_path: Path) -> None:
    """A round by hand: the server's model as it is, plus the mean of what clients learned from the one they got."""
    algorithm, received = fd.fedavg(CLIENT, downlink=EIGHT), []

    def local(visit: Visit) -> Local:
        received.append(visit.received)
        return Contribution.of((yield Train()), visit)

    watched = replace(algorithm, method=Method(local, "watched()"))
    before = simulate(tmp_path / "a", algorithm, rounds=3).weights.vector
    same = simulate(tmp_path / "b", watched, rounds=4)
    after = simulate(tmp_path / "a", algorithm, rounds=4)
    context = Context(1, 4, SERVER, layout=LAYOUT, size=LAYOUT.size, channel="model")
    message = EIGHT.encode(Update(before, 1.0), context)
    sent = EIGHT.decode({}, EIGHT.admit(message, context), context)[0].astype(np.float32)
    assert 0 < np.linalg.norm(sent - before) < 0.05 * np.linalg.norm(before)
    assert all(vector.tobytes() == sent.tobytes() for vector in received[-3:])
    assert after.metrics[3]["bytes_down"] == 3 * message_bytes(message)
    assert same.weights.vector.tobytes() == after.weights.vector.tobytes()


def test_eight_bits_take_a_third_of_the_bytes_and_cost_little(tmp_path: Path) -> None:
    plain, fewer = (
        simulate(tmp_path / name, fd.fedavg(CLIENT, downlink=downlink), rounds=30)
        for name, downlink in (("plain", None), ("eight", EIGHT))
    )
    assert fewer.metrics[0]["bytes_down"] < 0.45 * plain.metrics[0]["bytes_down"]
    assert fewer.final["loss"] < 1.5 * plain.final["loss"] + 1e-3
    assert fewer.weights.vector.tobytes() != plain.weights.vector.tobytes()


@pytest.mark.parametrize(
    "timing", [None, fd.buffered(2), fd.hierarchical(2, rounds=2)], ids=["in step", "buffered", "edges"]
)
def test_it_goes_with_every_pace_and_is_resumed_to_the_byte(tmp_path: Path, timing: Any) -> None:
    algorithm = fd.fedavg(CLIENT, downlink=EIGHT, timing=timing)
    world = fd.World(device=phone)
    whole = simulate(tmp_path / "whole", algorithm, rounds=6, world=world, checkpoint_seconds=0)
    simulate(tmp_path / "cut", algorithm, rounds=3, world=world, checkpoint_seconds=0)
    again = simulate(tmp_path / "cut", algorithm, rounds=6, world=world, checkpoint_seconds=0)
    assert (whole.folder / METRICS).read_bytes() == (again.folder / METRICS).read_bytes()


def test_what_cannot_carry_a_model_is_refused() -> None:
    for wrong in (fd.error_feedback(fd.chain(fd.top_k(0.1), fd.mean())), fd.median()):
        with pytest.raises(ConfigurationError, match="the model is one message to all"):
            fd.fedavg(CLIENT, downlink=wrong)
    with pytest.raises(ConfigurationError, match="adds noise for privacy"):
        fd.fedavg(CLIENT, downlink=central(clip=1.0, noise_multiplier=1.0, cohort=3))
    with pytest.raises(ConfigurationError, match=r"foedus\.chain\(rotate\(\), foedus\.mean\(\)\)"):
        fd.fedavg(CLIENT, downlink=fd.rotate())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="stay with the clients"):
        fd.fedavg(CLIENT, downlink=EIGHT, personal=fd.local_parts("bias"))
