"""FedJAX with its best settings: the jit backend, one process (its pmap backend no longer runs on today's JAX).

    benchmarks/peers/.venv-fedjax/bin/python benchmarks/peers/fedjax_.py W1 --rounds 12

As released it needs `jax.tree_map`, which JAX has removed; the line that puts it back is below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import measure
import numpy as np
import workloads

# user code begins
import jax
import jax.numpy as jnp

jax.tree_map = jax.tree_util.tree_map
import fedjax
import haiku as hk
# user code ends


def perceptron(x: jax.Array) -> jax.Array:
    return hk.nets.MLP([200, 200, 10])(x)


def convolutional(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 1, -1)
    x = hk.max_pool(jax.nn.relu(hk.Conv2D(32, 5)(x)), 2, 2, "SAME")
    x = hk.max_pool(jax.nn.relu(hk.Conv2D(64, 5)(x)), 2, 2, "SAME")
    return hk.Linear(10)(jax.nn.relu(hk.Linear(512)(hk.Flatten()(x))))


def logistic(x: jax.Array) -> jax.Array:
    return hk.Linear(10)(x)


NETWORKS = {"Perceptron": perceptron, "Convolutional": convolutional, "Logistic": logistic}


class Generated(fedjax.FederatedData):
    """W4: what the client sampler asks of a population whose data is made when it is wanted."""

    # user code begins
    def __init__(self, clients: int) -> None:
        self.ids = range(clients)

    def client_ids(self) -> Iterator[int]:
        yield from self.ids

    def get_client(self, client_id: int) -> fedjax.ClientDataset:
        x, y = workloads.generated_client(int(client_id))
        return fedjax.ClientDataset({"x": x, "y": y})

    def get_clients(self, client_ids: Any) -> Iterator[tuple[int, fedjax.ClientDataset]]:
        for client_id in client_ids:
            yield client_id, self.get_client(client_id)

    def num_clients(self) -> int:
        return len(self.ids)

    # user code ends
    def _absent(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("not asked for by the client sampler")

    slice = client_sizes = client_size = clients = shuffled_clients = _absent
    preprocess_client = preprocess_batch = _absent


def population(chosen: workloads.Workload) -> fedjax.FederatedData:
    if chosen.generated:
        return Generated(chosen.clients)
    x, y = workloads.pool(chosen.image)
    held = enumerate(workloads.partition(chosen))
    # user code begins
    return fedjax.InMemoryFederatedData({client: {"x": x[rows], "y": y[rows]} for client, rows in held})
    # user code ends


def simulate(chosen: workloads.Workload, count: int) -> measure.Rounds:
    rounds = measure.Rounds()
    network = NETWORKS[chosen.network]
    data = population(chosen)

    # user code begins
    model = fedjax.create_model_from_haiku(
        hk.transform(lambda batch: network(batch["x"])),
        {"x": jnp.zeros((1, *chosen.image)), "y": jnp.zeros(1, int)},
        lambda batch, predicted: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], predicted),
    )
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        grad_fn=fedjax.model_grad(model),
        client_optimizer=fedjax.optimizers.sgd(workloads.LEARNING_RATE),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=workloads.BATCH_SIZE, num_epochs=1, drop_remainder=False
        ),
    )
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, chosen.cohort, seed=0)
    for number in range(count):
        sampler.set_round_num(number)
        state, _ = algorithm.apply(state, sampler.sample())
        # user code ends
        jax.block_until_ready(state.params)
        rounds.end()
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=list(workloads.WORKLOADS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    asked = parser.parse_args()
    chosen = workloads.WORKLOADS[asked.workload]
    with measure.Watch() as watch:
        rounds = simulate(chosen, asked.rounds)
    from importlib.metadata import version

    measure.report(
        rounds,
        watch,
        skip=asked.skip,
        peer="fedjax",
        version=version("fedjax"),
        workload=chosen.name,
        clients=chosen.clients,
        user_lines=measure.user_lines(__file__),
    )


if __name__ == "__main__":
    main()
