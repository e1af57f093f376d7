"""The coordinator over the memory transport: messages in, messages out, at a time of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.net.sealing import Vault

from ..conformance.test_methods import METHODS, population, task
from .federations import Federation
from .test_learning import MORE, simulated
from .trainees import Trainee

ALL = METHODS | MORE


def trainee_of(name: str) -> Trainee:
    clients = population(ragged="fedbn" not in name)
    return Trainee(task(normal="fedbn" in name), ALL[name](), clients.with_test(clients.train(0)), seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_method_over_messages_ends_with_the_bits_of_the_simulation(tmp_path: Path, name: str) -> None:
    trainee = trainee_of(name)
    how: dict[str, Any] = {} if "krum" in name or "median" in name else {"cohort": fd.uniform(3)}
    federation = Federation(trainee, how=how)
    federation.run(order=[4, 2, 0, 3, 1])
    wanted = simulated(trainee_of(name), tmp_path / "run", **how)
    state = federation.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, wanted.weights.vector)
    np.testing.assert_array_equal(state.weights.buffers, wanted.weights.buffers)
    lines = federation.lines()
    assert [line["round"] for line in lines] == [1, 2, 3]
    for found, line in zip(lines, wanted.metrics, strict=True):
        assert (found["central"], found["trained"], found["bytes_up"]) == (
            line["central"], line["trained"], line["bytes_up"],
        )  # fmt: skip


# --- restarts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold, option II", "adam", "median", "edges, two rounds, feedback", "lag"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_server_killed_after_any_few_uploads_goes_on_to_the_same_model(name: str, after: int) -> None:
    """In every round: whoever was in the lost sum is asked to send the same bytes again, and nobody trains twice."""
    trainee = trainee_of(name)
    federation = Federation(trainee, ground={"memory": Vault(bytes(32))})
    trainings: list[tuple[int, int]] = []
    plain = trainee.update

    def update(data: Any, position: int, **how: Any) -> bytes:
        trainings.append((trainee.orders(data, position).round, position))
        return plain(data, position, **how)

    trainee.update = update  # type: ignore[method-assign]
    for kill in range(1, 60):
        federation.tick()
        if federation.coordinator.courses()[0].state.phase == "over":
            break
        for position in [4, 0, 3, 1][:after]:
            federation.visit(position)
        federation.restarted(kill)
        for position in [4, 0, 3, 1]:
            if position in federation.held:
                federation.again(position)
            federation.visit(position)
    federation.run()
    wanted = Federation(trainee_of(name))
    wanted.run()
    for found, other in zip(federation.learning.state.weights, wanted.learning.state.weights, strict=True):
        np.testing.assert_array_equal(found, other)
    assert [line["round"] for line in federation.lines()] == [1, 2, 3]
    if "edges" not in name:  # those train twice in a round
        assert len(trainings) == len(set(trainings)), "nobody trains twice for one round"
