"""The networks of the workloads as a user would write them, and the loss: ordinary torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

loss = nn.functional.cross_entropy


class Perceptron(nn.Module):
    """784-200-200-10 with ReLU: the "2NN" of McMahan et al. 2017, 199,210 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(784, 200)
        self.hidden2 = nn.Linear(200, 200)
        self.output = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 784] -> [batch, 10]
        return self.output(torch.relu(self.hidden2(torch.relu(self.hidden1(x)))))


class Convolutional(nn.Module):
    """Two 5x5 convolutions and a layer of 512: the "CNN" of McMahan et al. 2017, 1,663,370 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(64 * 7 * 7, 512)
        self.output = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 1, 28, 28] -> [batch, 10]
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.output(torch.relu(self.hidden(torch.flatten(x, 1))))


class Logistic(nn.Module):
    """Multinomial logistic regression, 784-10, 7,850 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 784] -> [batch, 10]
        return self.output(x)


NETWORKS: dict[str, type[nn.Module]] = {n.__name__: n for n in (Perceptron, Convolutional, Logistic)}
