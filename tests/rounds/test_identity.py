"""A folder takes only the run that it holds: whatever of it is written as code, or as a value, is compared."""

from __future__ import annotations

import functools
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foedus as fd
from foedus.core.client import Penalty
from foedus.errors import CheckpointError
from foedus.sim.world import Device

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 4)).astype(np.float32), RNG.integers(0, 3, 12)
CLIENTS = fd.Clients.of({"a": (X[:6], Y[:6]), "b": (X[6:], Y[6:])}, central_test=(X, Y))
CE = nn.functional.cross_entropy


class Net(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Bent(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(x))


def frozen(value: float) -> Any:
    def make() -> nn.Module:
        net = Net()
        net.layer.bias.requires_grad_(False).fill_(value)
        return net

    return make


def device(speed: float) -> Any:
    return lambda draw: Device(speed, 1e6, 1e6)


def go(folder: Path, *, rounds: int = 1, **changes: Any) -> fd.Run:
    task = fd.Task(changes.get("model", Net), changes.get("loss", CE), metrics=changes.get("metrics", ()))
    local = fd.local_sgd(lr=changes.get("lr", 0.1), penalty=changes.get("penalty"))
    world = fd.World(device=changes["device"]) if "device" in changes else None
    settings = fd.Settings(folder=folder, world=world, progress=False, executor=fd.executors.debug())
    return fd.simulate(task, fd.fedavg(local), CLIENTS, rounds=rounds, settings=settings, cohort=changes.get("cohort"))


def metric(by: float) -> list[fd.Metric]:
    return [fd.Metric("hits", lambda output, target: by * (output.argmax(1) == target))]


def penalty(by: float) -> Penalty:
    return Penalty(lambda w, r: by * w.sum(), lambda w, r: by + 0 * w, "mine")


TRACES = [lambda r: np.arange(2), lambda r: np.arange(1)]
CHANGES: dict[str, tuple[str, list[Any]]] = {
    "a partial's argument": ("loss", [functools.partial(CE, label_smoothing=s) for s in (0.1, 0.9)]),
    "a lambda": ("loss", [lambda o, y: CE(o, y), lambda o, y: 5 * CE(o, y)]),
    "a loss module's weights": ("loss", [nn.CrossEntropyLoss(w) for w in (None, torch.tensor([1.0, 2, 3]))]),
    "a loss module's setting": ("loss", [nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.5)]),
    "a schedule": ("lr", [lambda r: 0.1 / r, lambda r: 0.2 / r]),
    "another forward": ("model", [Net, Bent]),
    "another forward behind a lambda": ("model", [lambda: Net(), lambda: Bent()]),
    "what is frozen": ("model", [frozen(0.0), frozen(1.0)]),
    "a metric": ("metrics", [metric(1.0), metric(2.0)]),
    "a penalty": ("penalty", [penalty(0.1), penalty(0.2)]),
    "a device": ("device", [device(1.0), device(2.0)]),
    "a trace": ("cohort", [fd.available(trace, fd.uniform(1)) for trace in TRACES]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_and_the_same_goes_on(name: str, tmp_path: Path) -> None:
    field, (one, other) = CHANGES[name]
    go(tmp_path / "run", **{field: one})
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"holds another run: the .*not what it was"):
        go(tmp_path / "moved", **{field: other})
    assert len(go(tmp_path / "moved", rounds=2, **{field: one}).metrics) == 2


def test_the_pieces_that_differ_are_named(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(CheckpointError, match="the model, the loss are not what they were"):
        go(tmp_path, model=Bent, loss=lambda o, y: 2 * CE(o, y))
    told = json.loads((tmp_path / "run.json").read_text())["pieces"]
    assert {"model", "loss", "metrics", "local training", "cohort", "world", "data"} <= set(told)
    (tmp_path / "run.json").write_text(
        (tmp_path / "run.json").read_text().replace(f'"python": "{platform.python_version()}"', '"python": "3.1"')
    )
    with pytest.raises(CheckpointError, match=r"Python is 3.1 there"):
        go(tmp_path, model=Bent)
