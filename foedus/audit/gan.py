"""Reconstruction by a participant: pictures of a class that the attacker has none of, from the models alone.

The attacker is an ordinary client. The model that it receives every round is the discriminator of a GAN: it trains a
generator until the model takes what that makes for the class it wants, then labels these pictures as another class,
trains on them and sends its update like everybody else. So the others are made to teach the model, and thereby the
generator, ever more of what the class really looks like (Hitaj, Ateniese, Perez-Cruz 2017, "Deep models under the
GAN").

It needs no more than any client has, the models of every round; so hiding updates from the server, by secure
aggregation or encryption, does not touch it. What it learns is a class's common look, not one person's picture, unless
a class is one person.

This file imports torch, and is imported on use. Not here: who is whom in a federation (an experiment does that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from foedus.core.checks import check_whole
from foedus.core.client import LocalTraining, LoopContext, local_training
from foedus.core.examples import Examples
from foedus.core.random import key
from foedus.errors import ConfigurationError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What the attacker is after, and how hard it tries.

    Attributes:
        attacker: its id among the clients.
        target: the class whose pictures it wants; it has none.
        decoy: the class that its own pictures are labelled as; may be one that nobody else has.
        shape: of a picture: channels, height, width; height and width are multiples of 4.
        limits: the smallest and the largest value of a pixel.
        steps: of the generator in each round.
        fakes: pictures that it adds to its own data in each round.
        since: the first round in which it attacks: before, the model knows too little.

    Example:
        >>> Aim(attacker="mallory", target=3, decoy=10, shape=(1, 28, 28)).limits
        (0.0, 1.0)
    """

    attacker: object
    target: int
    decoy: int
    shape: tuple[int, int, int]
    limits: tuple[float, float] = (0.0, 1.0)
    steps: int = 60
    fakes: int = 300
    since: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "fakes", "since"):
            check_whole(name, getattr(self, name))
        if len(self.shape) != 3 or any(side % 4 for side in self.shape[1:]):
            raise ConfigurationError(
                f"the generator makes pictures of (channels, height, width), height and width multiples of 4; not of "
                f"{self.shape}. Pad the pictures: Clients.map(...)"
            )
        if self.target == self.decoy:
            raise ConfigurationError(f"target and decoy are both {self.target}: the attack is in their difference")


class Impostor:
    """A client that attacks, and how all train: the value behind ``local_training(loop=...)``.

    Its generator lives in this object, so the run has to train in this process (``executors.debug()``), and goes on
    only as long as the process does.

    Example:
        >>> impostor = Impostor(Aim(attacker="mallory", target=3, decoy=10, shape=(1, 28, 28)))
        >>> impostor.training(lr=0.1).batch_size, impostor.pictures(2).shape
        (32, (2, 1, 28, 28))
    """

    def __init__(self, aim: Aim, *, seed: int = 0, latent: int = 64) -> None:
        self.aim, self._latent = aim, latent
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "impostor") >> 1)
            self._generator = _generator(aim.shape, latent)
        self._optimiser = torch.optim.Adam(self._generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self._draws = torch.Generator().manual_seed(key(seed, "latent") >> 1)

    def training(self, *, lr: float, batch_size: int = 32, epochs: int = 1) -> LocalTraining:
        """How all clients of the federation train, for ``fedavg(...)``: by plain steps; the attacker attacks before."""
        return local_training(loop=self.loop, lr=lr, batch_size=batch_size, epochs=epochs)

    def loop(self, module: Any, examples: Examples, context: LoopContext) -> float:
        """One client's local training."""
        inputs, targets = (torch.from_numpy(np.array(a)) for a in (examples.inputs[0], examples.targets))
        batches = [np.asarray(b) for b in context.batches]
        if context.client == self.aim.attacker and context.round >= self.aim.since:
            self._improve(module, context)
            made = torch.from_numpy(self.pictures(self.aim.fakes))
            batches = _with_more(batches, len(inputs), len(made))
            inputs = torch.cat([inputs, made])
            targets = torch.cat([targets, torch.full((len(made),), self.aim.decoy)])
        return _descended(module, inputs, targets, batches, context)

    def pictures(self, count: int) -> Array:
        """What the generator makes, [count, channels, height, width]."""
        with torch.no_grad():
            made: Array = self._made(count).numpy()
        return made

    def _made(self, count: int) -> torch.Tensor:
        low, high = self.aim.limits
        noise = torch.randn(count, self._latent, generator=self._draws)
        made: torch.Tensor = low + (high - low) * self._generator(noise)
        return made

    def _improve(self, module: Any, context: LoopContext) -> None:
        """Train the generator against the model as it was received; the model stays as it is."""
        module.eval()
        wanted = torch.full((64,), self.aim.target)
        for _ in range(self.aim.steps):
            loss = context.loss(module(self._made(64)), wanted)
            loss = loss.mean() if loss.ndim else loss
            slopes = torch.autograd.grad(loss, list(self._generator.parameters()))
            for parameter, slope in zip(self._generator.parameters(), slopes, strict=True):
                parameter.grad = slope
            self._optimiser.step()
        module.train()


def _generator(shape: tuple[int, int, int], latent: int) -> nn.Module:
    """From noise [B, latent] to pictures in 0 .. 1, [B, channels, height, width]."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Linear(latent, 64 * (height // 4) * (width // 4)), nn.Unflatten(1, (64, height // 4, width // 4)),
        nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def _with_more(batches: list[Array], before: int, more: int) -> list[Array]:
    """The batches, each with its share of rows that were added behind the others."""
    parts = np.array_split(np.arange(before, before + more), max(len(batches), 1))
    return [np.concatenate([own, extra]) for own, extra in zip(batches, parts, strict=False)]


def _descended(
    module: Any, inputs: torch.Tensor, targets: torch.Tensor, batches: list[Array], context: LoopContext
) -> float:
    """Plain steps down the loss; its mean."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = 0.0
    for rows in batches:
        at = torch.from_numpy(np.asarray(rows, np.int64))
        loss = context.loss(module(inputs[at]), targets[at])
        loss = loss.mean() if loss.ndim else loss
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter -= context.lr * slope
        total += float(loss.detach())
    return total / max(len(batches), 1)
