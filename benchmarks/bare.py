"""L, the yardstick: federated averaging as a bare eager torch loop in two processes of one thread each.

No engine at all: what a careful person writes by hand. Each round samples the cohort, each process trains its
part of it with the data shuffled, the parts are averaged; all of that is in the figure. `--by-hand` writes
the update of the weights out instead of calling `torch.optim.SGD`, which costs about 30 microseconds a step:
the stricter yardstick.

    python benchmarks/bare.py W1                          # L on W1
    python benchmarks/bare.py W3 --by-hand                # the stricter yardstick on W3
    python benchmarks/bare.py W2 --processes 1 --rounds 4 # one process, to see how the machine scales
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

import models
import numpy as np
import torch
import torch.multiprocessing as mp
import workloads
from measure import Rounds, Watch, report
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Client = Callable[[int], tuple[Tensor, Tensor]]
Step = Callable[[Tensor, Tensor], None]


def client_data(chosen: workloads.Workload) -> Client:
    """The function from a client's number to its examples, in a new random order at every call."""
    if chosen.generated:

        def generate(client: int) -> tuple[Tensor, Tensor]:
            x, y = workloads.generated_client(client)
            order = torch.randperm(len(y))
            return torch.from_numpy(x)[order], torch.from_numpy(y)[order]

        return generate
    x, y = map(torch.from_numpy, workloads.pool(chosen.image))
    rows = torch.from_numpy(np.stack(workloads.partition(chosen)))  # [client, example]

    def shuffle(client: int) -> tuple[Tensor, Tensor]:
        order = rows[client][torch.randperm(rows.shape[1])]
        return x[order], y[order]

    return shuffle


def with_optimiser(network: nn.Module) -> Step:
    optimiser = torch.optim.SGD(network.parameters(), lr=workloads.LEARNING_RATE)

    def step(x: Tensor, y: Tensor) -> None:
        optimiser.zero_grad()
        models.loss(network(x), y).backward()
        optimiser.step()

    return step


def by_hand(network: nn.Module) -> Step:
    leaves = list(network.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        gradients = torch.autograd.grad(models.loss(network(x), y), leaves)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.sub_(gradient, alpha=workloads.LEARNING_RATE)

    return step


class World(NamedTuple):
    """What the processes share: the weights, this round's cohort, one partial sum for each process."""

    weights: Tensor  # [parameter]
    cohort: Tensor  # [client]; negative when there is no more to do
    sums: Tensor  # [process, parameter]
    barrier: Barrier


class Trainer:
    """One process's part of a round."""

    def __init__(self, chosen: workloads.Workload, rank: int, step: Callable[[nn.Module], Step]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        self.rank, self.client, self.prepare = rank, client_data(chosen), step
        self.network = models.NETWORKS[chosen.network]()

    def share(self, world: World) -> None:
        """Train this process's part of the cohort and leave the sum of its weights in the shared memory."""
        total = world.sums[self.rank].zero_()
        for number in world.cohort[self.rank :: len(world.sums)].tolist():
            vector_to_parameters(world.weights.clone(), self.network.parameters())
            step = self.prepare(self.network)
            for x, y in zip(*(d.split(workloads.BATCH_SIZE) for d in self.client(number)), strict=True):
                step(x, y)
            total += parameters_to_vector(self.network.parameters()).detach()


def follow(rank: int, chosen: workloads.Workload, world: World, step: Callable[[nn.Module], Step]) -> None:
    """The life of every process but the first."""
    trainer = Trainer(chosen, rank, step)
    while True:
        world.barrier.wait()
        if world.cohort[0] < 0:
            return
        trainer.share(world)
        world.barrier.wait()


def run(chosen: workloads.Workload, *, processes: int, count: int, step: Callable[[nn.Module], Step]) -> Rounds:
    """`count` rounds of federated averaging; this process is the first of the `processes`."""
    rounds, sample = Rounds(), np.random.default_rng(0)
    start = parameters_to_vector(models.NETWORKS[chosen.network]().parameters()).detach()
    world = World(
        weights=start.clone().share_memory_(),
        cohort=torch.zeros(chosen.cohort, dtype=torch.int64).share_memory_(),
        sums=torch.zeros(processes, len(start)).share_memory_(),
        barrier=mp.get_context("spawn").Barrier(processes),
    )
    crowd = [
        mp.get_context("spawn").Process(target=follow, args=(rank, chosen, world, step)) for rank in range(1, processes)
    ]
    for process in crowd:
        process.start()
    trainer = Trainer(chosen, 0, step)
    for _ in range(count):
        world.cohort.copy_(torch.from_numpy(sample.choice(chosen.clients, chosen.cohort, replace=False)))
        world.barrier.wait()
        trainer.share(world)
        world.barrier.wait()
        world.weights.copy_(world.sums.sum(0) / chosen.cohort)
        rounds.end()
    world.cohort.fill_(-1)
    world.barrier.wait()
    for process in crowd:
        process.join()
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--by-hand", action="store_true", help="write the update out, without torch.optim")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    asked = parser.parse_args()
    chosen = workloads.workload(asked.workload)
    with Watch() as watch:
        step = by_hand if asked.by_hand else with_optimiser
        rounds = run(chosen, processes=asked.processes, count=asked.rounds, step=step)
    report(
        rounds,
        watch,
        skip=asked.skip,
        peer="bare torch by hand" if asked.by_hand else "bare torch",
        version=torch.__version__,
        workload=chosen.name,
    )


if __name__ == "__main__":
    main()
