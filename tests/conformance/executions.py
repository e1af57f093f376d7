"""Running one round of local work in an executor, and comparing what came of it: what tests of executors share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import foedus as fd
from foedus.backends import open_trainer
from foedus.core.client import LocalSGD
from foedus.core.values import Message
from foedus.rounds.work import BUFFERS, Executor, Job, Orders, Outcome

WORDS, CLASSES = 11, 5  # what sequences are made of, and what there is to choose among


# --- models


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = (
            nn.Embedding(WORDS, 6),
            nn.LSTM(6, 7, num_layers=2, dropout=0.3, batch_first=True),
        )
        self.scores = nn.Linear(7, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.layers(self.words(x))[0]).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(WORDS, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.scores = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.words(x)
        return self.scores(self.norm(words + self.attention(words, words, words, need_weights=False)[0]).mean(1))


class TiedAndFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.frozen = nn.Embedding(WORDS, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scores = nn.Linear(6, WORDS, bias=False)
        self.scores.weight = self.words.weight
        self.frozen.requires_grad_(False)
        self.middle.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(torch.tanh(self.frozen(torch.relu(self.middle(self.words(x)))))).transpose(1, 2)


class SharedLayers(nn.Module):
    """Layers registered under two names each, among them a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(WORDS, 6), nn.GRU(6, 6, batch_first=True)
        self.scores = nn.Linear(6, WORDS)
        self.again, self.head = self.layers, self.scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.layers(self.words(x))[0])[0]).transpose(1, 2)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.words, self.scores = nn.Linear(64, 6), nn.Embedding(WORDS, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.scores(torch.tanh(self.image(x.flatten(1))) * self.words(words).mean(1))


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# --- running


def everyone() -> fd.Aggregator:
    """Keeps every single update, in the order of the clients."""

    def merge(a: Message, b: Message) -> Message:
        both = {name: np.concatenate([a[name], b[name]]) for name in a}
        return {name: array[np.argsort(both["client"])] for name, array in both.items()}

    return fd.Aggregator(
        init=lambda layout: {},
        encode=lambda update, context: {"values": update.vector[None], "client": np.array([context.client])},
        merge=merge,
        decode=lambda state, message, context: (message["values"], state),
        additive=False,
        label="everyone()",
    )


def ran(executor: Executor, task: fd.Task, clients: fd.Clients, spec: LocalSGD, **orders: Any) -> Outcome:
    algorithm = fd.Algorithm(client=spec, aggregator=everyone(), buffers=everyone())
    start = open_trainer(task, seed=3).initial()
    with executor.open(Job(task, algorithm, clients, seed=3)) as session:
        return session.run(Orders(2, start, np.arange(len(clients)), **orders))


def rows(message: Message | None) -> Any:
    return [] if message is None else message["values"]


def assert_alike(found: Outcome, wanted: Outcome, tolerance: float) -> None:
    """Same clients, examples and steps; updates and buffers within a tolerance relative to their norm."""
    told = ("clients", "examples", "steps", "refused")
    assert [getattr(found, f) for f in told] == [getattr(wanted, f) for f in told]
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=10 * tolerance)
    for mine, plain in ((found.message, wanted.message), (found.buffers, wanted.buffers)):
        assert (mine is None) == (plain is None)
        for a, b in zip(rows(mine), rows(plain), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    assert found.kept.keys() == wanted.kept.keys()
    for client, own in found.kept.items():
        np.testing.assert_allclose(own[BUFFERS], wanted.kept[client][BUFFERS], rtol=tolerance, atol=tolerance)
