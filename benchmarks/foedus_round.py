"""foedus on one workload, through its public API and with its default settings unless told otherwise.

    python benchmarks/foedus_round.py W1                       # auto chooses the executor
    python benchmarks/foedus_round.py W4 --clients 1000000     # a population of a million
    python benchmarks/foedus_round.py W2 --executor processes --processes 1
    python benchmarks/foedus_round.py W1 --jax                 # the network written in jax
    python benchmarks/foedus_round.py W1 --executor ray        # a local cluster of two nodes of one core

A round ends when its figures are handed on, which the engine does last; the time from one end to the next holds
sampling, reading, stacking, training, aggregation, the record and the checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from typing import Any

import measure
import workloads

# user code begins
import foedus as fd

# user code ends


class Ends:
    """A sink that notes when rounds end."""

    def __init__(self, rounds: measure.Rounds) -> None:
        self._rounds = rounds

    def open(self, folder: Any, configuration: Any) -> Ends:  # noqa: ARG002
        return self

    def write(self, round: int, figures: Any, *, at: float) -> None:  # noqa: ARG002
        self._rounds.end()

    def close(self) -> None: ...


def torch_task(chosen: workloads.Workload) -> fd.Task:
    import models

    # user code begins
    return fd.Task(model=models.NETWORKS[chosen.network], loss=models.loss)
    # user code ends


def jax_task(chosen: workloads.Workload) -> fd.Task:
    """W1 or W3 as a jax user would write it."""
    import jax
    import jax.numpy as jnp

    layers = {"Perceptron": 3, "Logistic": 1}[chosen.network]
    widths = [784, 200, 200, 10] if layers == 3 else [784, 10]

    def init(key: Any) -> Any:
        keys, shapes = jax.random.split(key, layers), pairwise(widths)
        return {
            f"layer{i}": {
                "w": jax.random.uniform(keys[i], shape, jnp.float32, -1, 1) * shape[0] ** -0.5,
                "b": jnp.zeros(shape[1], jnp.float32),
            }
            for i, shape in enumerate(shapes)
        }

    def apply(parameters: Any, x: Any, *, train: bool, key: Any) -> Any:
        for i in range(layers):
            x = x @ parameters[f"layer{i}"]["w"] + parameters[f"layer{i}"]["b"]
            x = jax.nn.relu(x) if i < layers - 1 else x
        return x

    def loss(output: Any, target: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], axis=1)[:, 0]

    return fd.Task(model=fd.JaxModel(init, apply), loss=loss)


def population(chosen: workloads.Workload) -> fd.Clients:
    if chosen.generated:
        return fd.Clients.generated(workloads.generated_client, chosen.clients)
    x, y = workloads.pool(chosen.image)
    rows = workloads.partition(chosen)
    # user code begins
    return fd.Clients.pooled(fd.Examples.of(x, y), rows)
    # user code ends


def simulate(
    chosen: workloads.Workload, task: fd.Task, count: int, *, settings: fd.Settings
) -> tuple[measure.Rounds, fd.Run]:
    rounds = measure.Rounds()
    clients = population(chosen)
    settings = replace(settings, sinks=[Ends(rounds)])
    # user code begins
    algorithm = fd.fedavg(client=fd.local_sgd(lr=workloads.LEARNING_RATE, epochs=1, batch_size=workloads.BATCH_SIZE))
    run = fd.simulate(
        task,
        algorithm,
        clients,
        cohort=chosen.cohort,
        rounds=count,
        evaluation=fd.Evaluation(every=0),
        settings=settings,
    )
    # user code ends
    return rounds, run


@contextmanager
def executor(name: str, processes: int) -> Iterator[Any]:
    """The executor that was asked for, with the cluster that it needs."""
    if name == "processes":
        yield fd.executors.processes(workers=processes)
    elif name == "ray":
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        try:
            yield fd.executors.ray(address=cluster.address)
        finally:
            cluster.shutdown()
    else:
        yield fd.executors.by_name(name)


def version() -> str:
    try:
        return metadata.version("foedus")
    except metadata.PackageNotFoundError:  # run from the sources
        return "source"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(workloads.WORKLOADS | workloads.FOR_GPU))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    parser.add_argument("--clients", type=int, help="another number of clients, e.g. 1000000 for W4")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--processes", type=int, default=2, help="workers of the executor processes")
    parser.add_argument("--device", help='e.g. "cuda"; by default a GPU if the framework sees one')
    parser.add_argument("--jax", action="store_true", help="the network written in jax (W1 and W3)")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    chosen = workloads.workload(asked.workload, clients=asked.clients)
    with (
        measure.Watch() as watch,
        tempfile.TemporaryDirectory(prefix="foedus-benchmark-") as folder,
        executor(asked.executor, asked.processes) as picked,
    ):
        task = jax_task(chosen) if asked.jax else torch_task(chosen)
        settings = fd.Settings(executor=picked, folder=f"{folder}/run", progress=False, device=asked.device)
        rounds, run = simulate(chosen, task, asked.rounds, settings=settings)
        used, device = run.record.configuration["executor"], run.record.configuration["device"]
    measure.report(
        rounds,
        watch,
        skip=asked.skip,
        peer="foedus",
        version=version(),
        workload=chosen.name,
        clients=chosen.clients,
        executor=used,
        device=device,
        user_lines=measure.user_lines(__file__),
    )


if __name__ == "__main__":
    main()
