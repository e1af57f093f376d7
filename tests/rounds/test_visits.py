"""Mistakes in a method of the user's own: refused by the method's name, with what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.method import (
    Consult,
    Contribution,
    Gathered,
    Local,
    Measure,
    Method,
    Train,
    Visit,
    averaging,
    plain,
)
from foedus.errors import ConfigurationError, TrainingError
from foedus.rounds.brought import check_contribution, check_own, check_request, finished, first_state, sent_down
from foedus.tree import Layout

LOCAL = fd.local_sgd(lr=0.1, batch_size=4)
LAYOUT = Layout(("w",), ((5,),), ("float32",))
FIVE, THREE = np.zeros(5, np.float32), np.zeros(3, np.float32)
SEEN = Visit(FIVE, np.zeros(0, np.float32), {}, {}, 0, 1, 0, 4, LOCAL, LAYOUT)


def ran(folder: Path, method: Method | None = None, **how: Any) -> fd.Run:
    draw = np.random.default_rng(0)
    data = {f"c{i}": (draw.normal(size=(6, 4)), draw.normal(size=6)) for i in range(2)}
    settings = fd.Settings(folder=folder, executor=how.pop("executor", fd.executors.debug()), progress=False)
    algorithm = how.pop("algorithm", None) or fd.Algorithm(client=LOCAL, method=method)
    return fd.simulate(fd.Task(fd.linear(4)), algorithm, fd.Clients.of(data), rounds=2, settings=settings, **how)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Train(start=THREE), r"mine\(\): Train\(start=...\) has shape \(3,\); the model has 5 parameters"),
        (Train(anchor=THREE), r"Train\(anchor"),
        (Train(shift=[0.0] * 5), r"Train\(shift=...\) must be a flat numpy array of floats, and is \[0.0"),  # type: ignore[arg-type]
        (Train(mask=np.ones(2, bool)), r"Train\(mask"),
        (Train(buffers=THREE), r"the model has 0 buffers"),
        (Train(spec="sgd"), r"e.g. local_sgd\(lr=0.1\); not 'sgd'"),  # type: ignore[arg-type]
        (Measure(THREE), r"Measure\(vector\) has shape"),
        (Measure(None), r"Measure\(visit.received\)"),  # type: ignore[arg-type]
        (Consult(3), r"a function of examples; not 3"),  # type: ignore[arg-type]
        (3, r"yields Train"),
    ],
)
def test_requests(request_: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        check_request("mine()", request_, SEEN)


@pytest.mark.parametrize(
    ("brought", "told"),
    [
        (None, "must return a Contribution"),
        (Contribution([0.0] * 5), r"Contribution\(update\) must be a flat"),  # type: ignore[arg-type]
        (Contribution(1.0), "of type float"),  # type: ignore[arg-type]
        (Contribution(np.array(1.0)), r"of shape \(\)"),
        (Contribution(np.zeros(5, int)), "an array of int64"),
        (Contribution(THREE), "the model has 5 parameters"),
        (Contribution(FIVE, weight="a"), r"Contribution\(weight=...\) must be a number, and is 'a'"),  # type: ignore[arg-type]
        (Contribution(FIVE, buffers=THREE), "0 buffers"),
        (Contribution(FIVE, sides={"a": 1.0}), r"sides={'a': ...}\) must be a flat"),  # type: ignore[dict-item]
        (Contribution(FIVE, sides={"a": None}), "leave a channel out"),  # type: ignore[dict-item]
        (Contribution(FIVE, sides={"buffers": FIVE}), "the model's own"),
        (Contribution(FIVE, kept={"n": "x"}), r"and has 'x' .* as 'n'"),  # type: ignore[dict-item]
        (Contribution(FIVE, kept={"n": np.array([None])}), "an array of object"),
        (Contribution(FIVE, kept=[1]), "must be a dict by name"),  # type: ignore[arg-type]
        (Contribution(FIVE, report={"x": "y"}), r"report={'x': ...}\) must be a number"),  # type: ignore[dict-item]
        (Contribution(FIVE, loss=None), "loss"),  # type: ignore[arg-type]
    ],
)
def test_contributions(brought: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        check_contribution("mine()", brought, SEEN)


def test_what_is_right_passes() -> None:
    check_request("mine()", Train(start=FIVE, mask=np.ones(5, bool), spec=LOCAL), SEEN)
    right = Contribution(
        FIVE, weight=np.float32(2), sides={"a": THREE}, kept={"n": 3, "v": np.array(1)}, report={"x": 1}
    )  # type: ignore[dict-item]
    check_contribution("mine()", right, SEEN)
    assert check_own("mine()", (FIVE, SEEN.buffers), SEEN).vector is FIVE


@pytest.mark.parametrize("found", [FIVE, (FIVE, None), (THREE, SEEN.buffers), [FIVE, SEEN.buffers]])
def test_models_of_clients_own(found: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"mine\(\).*personal\(visit\)"):
        check_own("mine()", found, SEEN)


@pytest.mark.parametrize(
    ("finish", "told"),
    [
        (lambda g: (THREE, g.state), r"the update that finish\(gathered\) returns has shape \(3,\)"),
        (lambda g: g.update, "must return the update and the state"),
        (lambda g: (g.update, None), "must be a dict by name"),
    ],
)
def test_the_servers_finish(finish: Callable[[Gathered], Any], told: str) -> None:
    gathered = Gathered({}, FIVE, FIVE, {}, 1, 1, 1, 0.1)
    with pytest.raises(ConfigurationError, match=told):
        finished(Method(plain, "mine()", finish=finish), gathered)
    assert finished(averaging(), gathered) == (FIVE, {})


def test_the_servers_first_state_and_what_it_sends() -> None:
    with pytest.raises(ConfigurationError, match=r"init\(vector, population\) gives must be a dict"):
        first_state(Method(plain, "mine()", init=lambda vector, population: None), FIVE, 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match=r"down\(state\) gives must be a dict by name, and is \[1\]"):
        sent_down(Method(plain, "mine()", down=lambda state: [1]), {}, 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(TrainingError, match=r"mine\(\) failed in down\(state\) in round 4: KeyError") as caught:
        sent_down(Method(plain, "mine()", down=lambda state: {"a": state["b"]}), {}, 4)
    assert isinstance(caught.value.__cause__, KeyError)


def broken(visit: Visit) -> Local:
    trained = yield Train()
    if visit.round == 2:
        raise ZeroDivisionError("of mine")
    return Contribution.of(trained, visit)


def asking(visit: Visit) -> Local:
    yield Consult(lambda examples: examples.nothing)  # type: ignore[attr-defined]
    return Contribution(visit.received)


def early(visit: Visit) -> Local:
    raise KeyError(visit.client)


@pytest.mark.parametrize("executor", [fd.executors.debug, fd.executors.vectorised])
@pytest.mark.parametrize(("local", "number"), [(broken, 2), (asking, 1), (early, 1)])
def test_faults_of_a_methods_own_code_name_client_and_round(
    tmp_path: Path, executor: Callable[[], Any], local: Callable[[Visit], Local], number: int
) -> None:
    with pytest.raises(TrainingError, match=rf"mine\(\) failed.*'c0' in round {number}") as caught:
        ran(tmp_path, Method(local, "mine()"), executor=executor(), cohort=1 if number > 2 else None)
    assert (caught.value.client, caught.value.round) == ("c0", number)
    assert isinstance(caught.value.__cause__, ZeroDivisionError | AttributeError | KeyError)


def test_functions_that_are_no_generators(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"<lambda>\(visit\) must be a generator, and gave Contribution"):
        ran(tmp_path, Method(lambda visit: Contribution(visit.received), "mine()"))  # type: ignore[arg-type,return-value]
    method = averaging()._replace(label="mine()", personal=lambda visit: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match=r"must be a generator, and gave None"):
        ran(tmp_path / "own", method, evaluation=fd.Evaluation(clients=True))


@dataclass
class Falling:
    """A schedule that cannot be hashed: a dataclass that compares by value."""

    first: float

    def __call__(self, number: int) -> float:
        return self.first / number


@pytest.mark.parametrize("executor", [fd.executors.debug, fd.executors.vectorised])
@pytest.mark.parametrize("make", [
    lambda spec: fd.fedavg(spec, personal=fd.ditto(0.3)), lambda spec: fd.fedavg(spec, personal=fd.fine_tune()),
    lambda spec: fd.fednova(spec),
])  # fmt: skip
def test_schedules_without_a_hash(tmp_path: Path, executor: Callable[[], Any], make: Any) -> None:
    found = []
    for i, lr in enumerate((Falling(0.1), lambda number: 0.1 / number)):
        algorithm = make(fd.local_sgd(lr=lr, batch_size=4, momentum=0.5))
        run = ran(tmp_path / str(i), algorithm=algorithm, executor=executor(), evaluation=fd.Evaluation(clients=True))
        found.append(run.weights.vector)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("personal", [fd.local_parts, fd.ditto, fd.fine_tune, fd.fedrep])
def test_uncalled_personal_values(personal: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"write personal=foedus.{personal.__name__}\\("):
        fd.fedavg(LOCAL, personal=personal)
