"""A model written in JAX: two functions, one that makes parameters and one that applies them."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

import foedus as fd

Parameters = dict[str, dict[str, jax.Array]]


def init(key: jax.Array) -> Parameters:
    """Fresh parameters of a network with one hidden layer."""
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (64, 32)) / 8, "b": jnp.zeros(32)},
        "scores": {"w": jax.random.normal(second, (32, 10)) / 6, "b": jnp.zeros(10)},
    }


def apply(parameters: Parameters, x: jax.Array, *, train: bool, key: jax.Array) -> jax.Array:
    """Images [B, 1, 8, 8] -> scores [B, 10]. ``train`` and ``key`` are for dropout, which this has none of."""
    hidden = x.reshape(len(x), -1) @ parameters["hidden"]["w"] + parameters["hidden"]["b"]
    return jax.nn.relu(hidden) @ parameters["scores"]["w"] + parameters["scores"]["b"]


def cross_entropy(scores: jax.Array, labels: ArrayLike) -> jax.Array:
    """One value per example, [B]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.asarray(labels)[:, None], axis=-1)[:, 0]


task = fd.Task(fd.JaxModel(init, apply), cross_entropy, metrics=[fd.accuracy])
clients = fd.data.digits().partition(fd.data.iid(10), seed=0)
algorithm = fd.fedavg(fd.local_sgd(lr=0.2, epochs=1, batch_size=10))

if __name__ == "__main__":
    run = fd.simulate(task, algorithm, clients, rounds=20)
    print(run)
    print({name: layer["w"].shape for name, layer in run.model.items()})
