"""Small problems that the tests of attacks share: made-up pictures, and networks that learn them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import foedus as fd
from foedus.backends import open_trainer

SIDE = 8


def pictures(count: int, *, seed: int = 0) -> fd.Examples:
    """Blurred blobs of three classes, by where they are: float32 [count, 1, 8, 8] in 0 .. 1."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 3, count)
    centres = np.array([[2, 2], [2, 5], [5, 4]])[labels] + draws.normal(0, 0.4, (count, 2))
    at = np.arange(SIDE)
    width = draws.uniform(0.8, 1.8, count)[:, None, None]
    down = (at[None, :, None] - centres[:, 0, None, None]) ** 2
    across = (at[None, None, :] - centres[:, 1, None, None]) ** 2
    images = np.exp(-(down + across) / (2 * width**2)) + draws.normal(0, 0.05, (count, SIDE, SIDE))
    return fd.Examples.of(images.clip(0, 1)[:, None].astype(np.float32), labels)


def smooth() -> nn.Module:
    """With sigmoids, as deep leakage wants them."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * SIDE * SIDE, 3))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def kinked() -> nn.Module:
    """With ReLUs."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIDE * SIDE, 32), nn.ReLU(),
        nn.Linear(32, 3),
    )  # fmt: skip


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, 3))


def task(network) -> fd.Task:
    return fd.Task(network, torch.nn.functional.cross_entropy, metrics=[fd.accuracy])


def start(network, seed: int = 0):
    return open_trainer(task(network), seed=seed, device="cpu").initial()


def federation(clients: int = 6, each: int = 12, rounds: int = 4, **kwargs) -> fd.Federation:
    data = pictures(clients * each)
    dealt = {i: data.take(np.arange(i * each, (i + 1) * each)) for i in range(clients)}
    algorithm = fd.fedavg(fd.local_sgd(0.2, batch_size=6), **kwargs)
    return fd.Federation(
        task=task(flat), algorithm=algorithm, clients=fd.Clients.of(dealt, central_test=pictures(80, seed=9)),
        rounds=rounds, settings=fd.Settings(progress=False, executor=fd.executors.debug()),
    )  # fmt: skip
