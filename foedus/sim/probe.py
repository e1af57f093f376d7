"""Trying out executors and devices: what ``foedus doctor`` runs, in a process of its own.

    python -m foedus.sim.probe devices         one line of JSON: framework → its devices
    python -m foedus.sim.probe debug ray ...   one line of JSON per executor: a tiny federation in it

Nothing else goes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.client import local_sgd
from foedus.core.compose import fedavg
from foedus.core.linear import logistic
from foedus.core.population import Clients, Examples
from foedus.core.task import Task
from foedus.errors import FoedusError, MissingExtra
from foedus.sim.engine import simulate
from foedus.sim.executors import by_name, debug
from foedus.sim.settings import Settings

AGREE = 1e-3  # relative difference of the weights after two rounds that rounding can explain


class Finding(NamedTuple):
    """What became of one executor's tiny job.

    Attributes:
        name: the executor's.
        works: whether it ran, and agrees with the plain loop.
        told: how long it took, or why it does not work.
        missing: the extra that would help, if something is not installed.
    """

    name: str
    works: bool
    told: str
    missing: str | None = None


def probe(name: str) -> Finding:
    """Two rounds of a tiny federation in an executor, compared with the plain loop."""
    try:
        begin = time.perf_counter()
        found = _tiny(name)
        seconds = time.perf_counter() - begin
        wanted = found if name == debug().name else _tiny(debug().name)
    except MissingExtra as error:
        return Finding(name, False, f"needs {error.package}", error.extra)
    except FoedusError as error:
        return Finding(name, False, str(error))
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}")
    apart = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not apart <= AGREE:
        return Finding(name, False, f"its weights differ from the plain loop's by {apart:.1g} (relative)")
    return Finding(name, True, f"{seconds:.1f} s with its start")


def devices() -> dict[str, list[str]]:
    """The devices that each installed framework sees."""
    found: dict[str, list[str]] = {}
    try:
        import torch

        gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
        found["torch"] = ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    except ImportError:
        pass
    try:
        import jax

        found["jax"] = [f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()]
    except ImportError:
        pass
    return found


def _tiny(name: str) -> NDArray[Any]:
    """The weights [parameter] of a small model after two rounds on four clients."""
    draw = np.random.default_rng(0)
    pool = Examples.of(draw.normal(size=(48, 6)), draw.integers(0, 3, 48))
    clients = Clients.pooled(pool, np.arange(48).reshape(4, 12))
    with tempfile.TemporaryDirectory() as folder:
        run = simulate(
            _task(), fedavg(local_sgd(0.1, batch_size=4)), clients, rounds=2,
            settings=Settings(executor=by_name(name), folder=folder, progress=False, device="cpu"),
        )  # fmt: skip
    return run.weights.vector


def _task() -> Task:
    """A linear classifier: in torch if it is installed, since that is what most people use."""
    try:
        import torch
    except ImportError:
        return Task(logistic(6, 3))
    return Task(lambda: torch.nn.Linear(6, 3), torch.nn.functional.cross_entropy)


def main(names: Sequence[str]) -> None:
    """Answer on standard output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if names == ["devices"]:
        answers.write(json.dumps(devices()) + "\n")
        return
    for name in names:
        answers.write(json.dumps(probe(name)._asdict()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
