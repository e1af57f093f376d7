"""The workloads that every engine is timed on, as plain values: numpy only, so that any peer reads them.

Plain SGD with learning rate 0.1, cross entropy, batches of 10, one local epoch, no evaluation, data in memory
as MNIST-shaped float32 (McMahan et al. 2017 for the two networks):

- W1: 784-200-200-10 perceptron, 100 clients of 600 examples, 10 a round (600 local steps a round).
- W2: the convolutional network of 1,663,370 parameters, the same clients (600 steps).
- W3: logistic regression, 1,000 clients of 60 examples, 100 a round (600 steps).
- W4: logistic regression, 100,000 clients of 20 examples that exist only as a function, 1,000 a round
  (2,000 steps).
- W5, for a GPU only: the convolutional network, 1,000 clients of 60 examples, all in every round (6,000 steps).

The data is MNIST where `FOEDUS_DATA` points to it, else random of the same shape: the arithmetic is the same.
Not here: the networks (`models.py`), the clock (`measure.py`), any engine.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 0.1
BATCH_SIZE = 10
FEATURES = 784
CLASSES = 10

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Workload:
    """One line of the table: how many clients, how big, how many a round, and which network."""

    name: str
    network: str  # a class of models.py
    image: tuple[int, ...]  # shape of one input
    clients: int
    examples: int  # per client
    cohort: int
    generated: bool  # client data is a function of the client's number

    @property
    def steps(self) -> int:
        """Local steps of a whole round."""
        return self.cohort * -(-self.examples // BATCH_SIZE)


WORKLOADS = {
    "W1": Workload("W1", "Perceptron", (FEATURES,), 100, 600, 10, generated=False),
    "W2": Workload("W2", "Convolutional", (1, 28, 28), 100, 600, 10, generated=False),
    "W3": Workload("W3", "Logistic", (FEATURES,), 1000, 60, 100, generated=False),
    "W4": Workload("W4", "Logistic", (FEATURES,), 100_000, 20, 1000, generated=True),
}


FOR_GPU = {
    "W5": Workload("W5", "Convolutional", (1, 28, 28), 1000, 60, 1000, generated=False),
}


def workload(name: str, *, clients: int | None = None) -> Workload:
    """The workload of that name, with another number of clients if one is given (W4 with a million)."""
    chosen = (WORKLOADS | FOR_GPU)[name]
    return chosen if clients is None else replace(chosen, clients=clients)


def generated_client(client: int) -> tuple[Array, Array]:
    """The examples of one client of W4, `x [20, 784]` float32 and `y [20]` int64: a function of its number.

    Normal noise in which one feature marks the class. Every engine calls exactly this.
    """
    generator = np.random.Generator(np.random.Philox(key=client))
    x = generator.standard_normal((20, FEATURES), dtype=np.float32)
    y = generator.integers(0, CLASSES, 20)
    x[np.arange(20), y] += 4.0
    return x, y


def pool(image: tuple[int, ...]) -> tuple[Array, Array]:
    """All examples, `x [60000, *image]` float32 in [0, 1], `y [60000]` int64: MNIST, or random numbers."""
    folder = Path(os.environ.get("FOEDUS_DATA", "")) / "mnist"
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        generator = np.random.default_rng(0)
        x = generator.random((60_000, *image), dtype=np.float32)
        return x, generator.integers(0, CLASSES, 60_000)
    pixels = np.frombuffer(_content(folder / "train-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_content(folder / "train-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    return np.divide(pixels, 255, dtype=np.float32).reshape(-1, *image), labels.astype(np.int64)


def partition(chosen: Workload) -> list[Array]:
    """Rows of the pool that each client holds, shuffled (IID): `clients` arrays of `[examples]` int64."""
    rows = np.random.default_rng(0).permutation(60_000)[: chosen.clients * chosen.examples]
    return list(rows.reshape(chosen.clients, chosen.examples))


def _content(path: Path) -> bytes:
    with gzip.open(path) as stream:
        return stream.read()
