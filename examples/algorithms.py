"""FedAvg, FedProx and FedAdam on skewed data: algorithms are values, so a sweep over them is one call."""

from rich.console import Console
from torch import nn

import foedus as fd


def network() -> nn.Module:
    """[B, 1, 8, 8] -> [B, 10]"""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


task = fd.Task(network, nn.functional.cross_entropy, metrics=[fd.accuracy])
clients = fd.data.digits().partition(fd.data.dirichlet(20, alpha=0.1), seed=0)

PROXIMAL = fd.proximal(0.1)


def algorithm(name: str, lr: float) -> fd.Algorithm:
    """One line each: what differs from FedAvg is what the paper says."""
    match name:
        case "FedProx":
            return fd.fedavg(fd.local_sgd(lr, epochs=3, batch_size=10, penalty=PROXIMAL))
        case "FedAdam":
            return fd.fedavg(fd.local_sgd(lr, epochs=3, batch_size=10), server=fd.adam(lr=0.02))
        case _:
            return fd.fedavg(fd.local_sgd(lr, epochs=3, batch_size=10))


def variant(name: str, lr: float) -> fd.Federation:
    """The whole federation for one combination of values."""
    return fd.Federation(task=task, algorithm=algorithm(name, lr), clients=clients, cohort=5, rounds=15)


if __name__ == "__main__":
    grid = {"name": ["FedAvg", "FedProx", "FedAdam"], "lr": [0.03, 0.1]}
    sweep = fd.sweep(variant, grid, target=0.7)
    Console().print(sweep.table())
    sweep.plot()
