"""Linear regression by hand, and runs of it: what the tests of methods compare with their papers' pseudocode.

Nothing here uses a model, a layout or an executor: gradients are written down, and weights are [features + 1] with the
intercept last. Only cohorts and the order of batches, which have tests of their own, come from foedus.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import foedus as fd
from foedus.core.batches import plan
from foedus.core.client import LocalSGD
from foedus.core.select import Population

Floats = NDArray[np.float64]

SEED, FEATURES = 5, 3
SIZES = [12, 3, 9, 6, 10]
COUNT = len(SIZES)


def _made() -> list[tuple[Floats, Floats]]:
    rng = np.random.default_rng(0)
    found = []
    for i, n in enumerate(SIZES):  # clients whose optima lie apart
        x = rng.normal(size=(n, FEATURES))
        y = x @ rng.normal(size=FEATURES) + i + 0.1 * rng.normal(size=n)
        found.append((_single(x), _single(y)))
    return found


def _single(values: Floats) -> Floats:
    """Numbers that float32, which examples are held in, holds exactly."""
    return values.astype(np.float32).astype(np.float64)


DATA = _made()
TASK = fd.Task(fd.linear(FEATURES, dtype="float64"), metrics=[fd.rmse])
CLIENTS = fd.Clients.of({f"c{i}": pair for i, pair in enumerate(DATA)})
SHARES = np.array(SIZES) / sum(SIZES)


def design(client: int) -> Floats:
    return np.concatenate([DATA[client][0], np.ones((SIZES[client], 1))], 1)


def gradient(client: int, w: Floats, rows: Any = slice(None)) -> Floats:
    x, y = design(client)[rows], DATA[client][1][rows]
    return x.T @ (x @ w - y) / len(x)


def loss(client: int, w: Floats) -> float:
    return float(np.square(design(client) @ w - DATA[client][1]).mean() / 2)


def optimum(weights: Sequence[float] | Floats = SHARES) -> Floats:
    """Of Σ weight · loss."""
    a = sum(p * design(i).T @ design(i) / SIZES[i] for i, p in enumerate(weights))
    b = sum(p * design(i).T @ DATA[i][1] / SIZES[i] for i, p in enumerate(weights))
    return np.linalg.solve(np.asarray(a), np.asarray(b))


def cohort(size: int, number: int) -> list[int]:
    if size == COUNT:
        return list(range(COUNT))
    return fd.uniform(size).sample(Population(COUNT, np.array(SIZES)), SEED, number).tolist()


def batches(spec: LocalSGD, client: int, number: int, phase: int = 0) -> list[NDArray[np.int32]]:
    """The rows of every local step."""
    own = plan(spec, np.array([SIZES[client]]), np.array([client]), seed=SEED, round=number, phase=phase)
    return [rows[:n] for rows, n in zip(own.rows, own.count, strict=True)]


def descended(
    spec: LocalSGD, client: int, number: int, start: Floats, *, phase: int = 0, shift: Floats | float = 0.0,
    mu: float = 0.0, anchor: Floats | None = None, moving: Floats | float = 1.0, scale: float = 1.0,
) -> Floats:  # fmt: skip
    """Local SGD: y ← y − rate · (gradient + shift + mu · (y − anchor)), with heavy-ball momentum."""
    y, memory, rate = start, np.zeros(FEATURES + 1), spec.rate(number) * scale
    for rows in batches(spec, client, number, phase):
        g = gradient(client, y, rows) + shift
        if anchor is not None:
            g = g + mu * (y - anchor)
        memory = spec.momentum * memory + g * moving
        y = y - rate * memory
    return y


def steps(spec: LocalSGD, client: int) -> int:
    return len(batches(spec, client, 1))


def simulated(
    algorithm: fd.Algorithm, *, rounds: int, size: int = COUNT, executor: Any = None, world: Any = None, **more: Any
) -> fd.Run:
    with tempfile.TemporaryDirectory() as folder:
        executor = executor or fd.executors.debug()
        settings = fd.Settings(folder=Path(folder) / "run", executor=executor, progress=False, world=world)
        asked = None if size == COUNT else size
        return fd.simulate(TASK, algorithm, CLIENTS, rounds=rounds, cohort=asked, seed=SEED, settings=settings, **more)


def final(algorithm: fd.Algorithm, *, rounds: int, size: int = COUNT, **more: Any) -> Floats:
    """The global model after some rounds."""
    return simulated(algorithm, rounds=rounds, size=size, **more).weights.vector
