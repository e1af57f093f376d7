"""What a server learns, without messages: the same bits as a simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import open_trainer
from foedus.net.learning import Gathering, Learning
from foedus.net.served import Served
from foedus.net.store import Enrolled
from foedus.protocol import blob
from foedus.rounds.freight import parcel_of

from ..conformance.test_methods import METHODS, population, task
from .trainees import Trainee

OWN = fd.local_sgd(lr=0.1, epochs=1, batch_size=4)
MORE: dict[str, Callable[[], fd.Algorithm]] = {
    "adam": lambda: fd.fedavg(OWN, server=fd.adam(lr=0.01)),
    "median": lambda: fd.fedavg(OWN, aggregator=fd.median()),
    "krum": lambda: fd.fedavg(OWN, aggregator=fd.krum(attackers=0)),
    "quantised": lambda: fd.fedavg(OWN, aggregator=fd.chain(fd.rotate(), fd.quantise(4), fd.mean())),
    "downlink": lambda: fd.fedavg(OWN, downlink=fd.chain(fd.rotate(), fd.quantise(8), fd.mean())),
    "feedback": lambda: fd.fedavg(OWN, aggregator=fd.error_feedback(fd.chain(fd.top_k(0.2), fd.mean()))),
    "edges": lambda: fd.fedavg(OWN, timing=fd.hierarchical(2)),
    "edges, two rounds": lambda: fd.fedavg(OWN, timing=fd.hierarchical(2, rounds=2)),
    "edges, two rounds, feedback": lambda: fd.fedavg(
        OWN, timing=fd.hierarchical(2, rounds=2), aggregator=fd.error_feedback(fd.chain(fd.top_k(0.2), fd.mean()))
    ),
}


def served(trainee: Trainee, **how: Any) -> Learning:
    """A run on the server, with everybody enrolled."""
    how = {"rounds": 3, "cohort": None, "seed": trainee.seed} | how
    what = Served(
        name="run", task=trainee.task, algorithm=trainee.algorithm, central_test=trainee.clients.central_test, **how
    )
    learning = Learning(what, open_trainer(what.task, seed=what.seed))
    sizes = trainee.clients.sizes
    assert sizes is not None
    told = enumerate(zip(trainee.clients.ids, sizes.tolist(), strict=True))
    learning.enrolled([Enrolled(p, str(i), b"", 0.0, examples=n) for p, (i, n) in told])
    learning.begin()
    return learning


def step(learning: Learning, trainee: Trainee) -> dict[str, Any] | None:
    asked = learning.cohort(learning.step)
    assert asked is not None
    gathering = Gathering(learning.step, seats=len(asked))
    for position in np.random.default_rng(0).permutation(asked).tolist():
        content = trainee.update(learning.orders_for(position), position)
        parcel = parcel_of(blob.unpack(content))
        learning.take(gathering, position, parcel, version=learning.step.round, scale=1.0)
        trainee.let_in(position, content)
    made = learning.commit(gathering, asked)
    learning.settle(made)
    return made.line


def learned(trainee: Trainee, **how: Any) -> tuple[Learning, list[dict[str, Any]]]:
    learning, lines = served(trainee, **how), []
    while learning.over is None:
        if (line := step(learning, trainee)) is not None:
            lines.append(line)
    return learning, lines


def simulated(trainee: Trainee, folder: Path, **how: Any) -> fd.Run:
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False, checkpoint_seconds=1e9)
    how = {"rounds": 3, "cohort": None, "seed": trainee.seed} | how
    return fd.simulate(trainee.task, trainee.algorithm, trainee.clients, settings=settings, **how)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_every_method_ends_with_the_bits_of_the_simulation(tmp_path: Path, name: str) -> None:
    clients = population(ragged="fedbn" not in name)
    clients = clients.with_test(clients.train(0))
    trainee = Trainee(task(normal="fedbn" in name), (METHODS | MORE)[name](), clients, seed=2)
    how: dict[str, Any] = {} if "krum" in name or "median" in name else {"cohort": fd.uniform(3)}
    wanted = simulated(trainee, tmp_path / "run", **how)
    learning, lines = learned(trainee, **how)
    assert learning.state is not None
    np.testing.assert_array_equal(learning.state.weights.vector, wanted.weights.vector)
    np.testing.assert_array_equal(learning.state.weights.buffers, wanted.weights.buffers)
    for found, line in zip(lines, wanted.metrics, strict=True):
        line.pop("cohort")  # a simulation counts clients without examples, who are not asked here
        assert {name: found[name] for name in line if "bytes" not in name and name != "train_loss"} == {
            name: value for name, value in line.items() if "bytes" not in name and name != "train_loss"
        }
        assert found["bytes_up"] == line["bytes_up"]
        np.testing.assert_allclose(found["train_loss"], line["train_loss"])
