"""Small models of every backend, and work for them: what the suites of trainers and of cohorts share.

All read 6 numbers and choose among 3 classes, so that one set of examples fits all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import foedus as fd
from foedus.backends import Assignment
from foedus.core.batches import plan
from foedus.core.client import Client
from foedus.core.task import NumpyModel

FEATURES, CLASSES = 6, 3


class Member(NamedTuple):
    """A model of a backend.

    * ``task(dtype)``: dtype is float32 or float64.
    * ``steady``: whether training and evaluation compute the same, so that a step's loss can be checked: no dropout,
      no statistics of the batch.
    * ``buffers``, ``frozen``: whether it has any; ``mixes``: whether examples of one batch change each other.
    * ``compiles``: whether every new shape costs a second, so that tests use few.
    """

    task: Callable[[str], fd.Task]
    steady: bool = True
    buffers: bool = False
    frozen: bool = False
    mixes: bool = False
    compiles: bool = False


def cross_entropy(output: Any, target: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1)[:, 0]


def jax_task(dtype: str, dropout: float = 0.0) -> fd.Task:
    def init(key: Any) -> Any:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return {"out": {"w": rng.normal(size=(5, CLASSES)).astype(dtype), "b": np.zeros(CLASSES, dtype)},
                "first": rng.normal(size=(FEATURES, 5)).astype(dtype) / 2}  # fmt: skip

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        hidden = jnp.tanh(x @ p["first"])
        if train and dropout:
            hidden = jnp.where(jax.random.bernoulli(key, 1 - dropout, hidden.shape), hidden / (1 - dropout), 0)
        return hidden @ p["out"]["w"] + p["out"]["b"]

    return fd.Task(fd.JaxModel(init, apply), cross_entropy, metrics=[fd.accuracy])


def torch_task(dtype: str, layers: Callable[[], list[nn.Module]], frozen: int | None = None) -> fd.Task:
    def net() -> nn.Module:
        module = nn.Sequential(*layers()).to(getattr(torch, dtype))
        if frozen is not None:
            module[frozen].requires_grad_(False)
        return module

    return fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


def single(dtype: str) -> fd.Task:
    """Logistic regression that takes no client axis: a cohort computes it client by client."""
    made = fd.logistic(FEATURES, CLASSES, dtype=dtype)  # type: ignore[arg-type]

    def rough(generator: np.random.Generator) -> dict[str, Any]:
        return {n: a + generator.normal(size=a.shape).astype(dtype) for n, a in made.init(generator).items()}

    return fd.Task(NumpyModel(rough, made.predict, made.gradient), metrics=[fd.accuracy])


class Shared(nn.Module):
    """A layer registered under two names, and applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(FEATURES, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.again, self.head = self.middle, self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.middle(self.first(x))))))


LINEAR = lambda: [nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)]  # noqa: E731
NORMED = lambda: [nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)]  # noqa: E731
DROPPED = lambda: [nn.Linear(FEATURES, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, CLASSES)]  # noqa: E731

MEMBERS = {
    "numpy": Member(lambda dtype: fd.Task(fd.logistic(FEATURES, CLASSES, dtype=dtype), metrics=[fd.accuracy])),  # type: ignore[arg-type]
    "numpy, client by client": Member(single),
    "torch": Member(lambda dtype: torch_task(dtype, LINEAR)),
    "torch, frozen": Member(lambda dtype: torch_task(dtype, LINEAR, frozen=0), frozen=True),
    "torch, dropout": Member(lambda dtype: torch_task(dtype, DROPPED), steady=False),
    "torch, batch norm": Member(lambda dtype: torch_task(dtype, NORMED), steady=False, buffers=True, mixes=True),
    "torch, shared layers": Member(lambda dtype: torch_task(dtype, lambda: [Shared()])),
    "jax": Member(jax_task, compiles=True),
    "jax, dropout": Member(lambda dtype: jax_task(dtype, 0.4), steady=False, compiles=True),
}


def params(*names: str) -> list[Any]:
    """Members as parameters of a test; those that compile are slow."""
    return [pytest.param(MEMBERS[n], id=n, marks=[pytest.mark.slow] * MEMBERS[n].compiles) for n in names]


STEADY = [name for name, member in MEMBERS.items() if member.steady]
NAMES = [name for name in MEMBERS if name != "jax"]  # the one with dropout does the same, and more

PLAIN = fd.local_sgd(lr=0.1, epochs=2, batch_size=4)
EVERYTHING = fd.local_sgd(
    lr=lambda r: 0.2 / r, steps=5, batch_size=4, momentum=0.8, weight_decay=0.1, clip_norm=0.5, penalty=fd.proximal(0.3)
)


def examples(count: int = 12, seed: int = 0, dtype: str = "float32") -> fd.Examples:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES)).astype(dtype)
    return fd.Examples.of(x, rng.integers(CLASSES, size=count), keep_dtype=True)


def assignment(own: fd.Examples, spec: Client = PLAIN, *, client: int = 3, round: int = 2, **more: Any) -> Assignment:
    """One client's round: client 3 in round 2 unless said otherwise."""
    steps = plan(spec, np.array([len(own)]), np.array([client]), seed=5, round=round, limit=more.pop("limit", None))
    return Assignment(spec, own, steps, round, client, **more)
