"""The yardstick of a jax task: federated averaging in one jitted `shard_map` over two devices, no engine.

Each device scans over its clients and over each client's steps; the examples stay on the devices and a round
sends the shuffled row numbers only. Sampling, shuffling, training and averaging are all in the figure.

    python benchmarks/bare_jax.py W1
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import workloads
from jax.sharding import Mesh, PartitionSpec
from measure import Rounds, Watch, report

Params = list[tuple[jax.Array, jax.Array]]
WIDTHS = {"Perceptron": (784, 200, 200, 10), "Logistic": (784, 10)}


def init(widths: tuple[int, ...]) -> Params:
    generator = np.random.default_rng(0)
    return [
        (
            jnp.asarray(generator.uniform(-1, 1, (fan_in, fan_out)) / np.sqrt(fan_in), jnp.float32),
            jnp.zeros(fan_out, jnp.float32),
        )
        for fan_in, fan_out in pairwise(widths)
    ]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    scores = jax.nn.log_softmax(x @ weight + bias)
    return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()


def round_of(x: jax.Array, y: jax.Array, params: Params, rows: jax.Array) -> Params:
    """One device's part: `rows [client, step, batch]` of the pool; the sum over all devices comes back."""

    def step(weights: Params, batch: jax.Array) -> tuple[Params, None]:
        slope = jax.grad(loss)(weights, x[batch], y[batch])
        return jax.tree.map(lambda w, g: w - workloads.LEARNING_RATE * g, weights, slope), None

    def client(total: Params, batches: jax.Array) -> tuple[Params, None]:
        trained, _ = jax.lax.scan(step, params, batches)
        return jax.tree.map(jnp.add, total, trained), None

    zero = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(client, zero, rows)
    return jax.tree.map(lambda leaf: jax.lax.psum(leaf, "device"), total)


def run(chosen: workloads.Workload, count: int) -> Rounds:
    rounds, sample = Rounds(), np.random.default_rng(0)
    whole, split = PartitionSpec(), PartitionSpec("device")
    mesh = Mesh(np.array(jax.devices()), ("device",))
    together = jax.shard_map(
        round_of, mesh=mesh, in_specs=(whole, whole, whole, split), out_specs=whole, check_vma=False
    )

    @jax.jit
    def average(x: jax.Array, y: jax.Array, params: Params, rows: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf / chosen.cohort, together(x, y, params, rows))

    everywhere = jax.sharding.NamedSharding(mesh, whole)
    x, y = (jax.device_put(part, everywhere) for part in workloads.pool(chosen.image))
    held, params = np.stack(workloads.partition(chosen)).astype(np.int32), init(WIDTHS[chosen.network])
    for _ in range(count):
        cohort = sample.choice(chosen.clients, chosen.cohort, replace=False)
        rows = sample.permuted(held[cohort], axis=1).reshape(chosen.cohort, -1, workloads.BATCH_SIZE)
        params = jax.block_until_ready(average(x, y, params, rows))
        rounds.end()
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["W1", "W3"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first rounds left out of the median (default 2)")
    asked = parser.parse_args()
    with Watch() as watch:
        rounds = run(workloads.WORKLOADS[asked.workload], asked.rounds)
    report(rounds, watch, skip=asked.skip, peer="bare jax", version=jax.__version__, workload=asked.workload)


if __name__ == "__main__":
    main()
