"""Sending when it is worth it: messages saved against accuracy lost (MNIST).

Two rules. The norm rule: a client sends when its model has moved by more than a share of the received model's length
since its last message; the 2NN, 100 clients with a Dirichlet split (alpha 0.5), 20 a round. And LAG (Chen et al.
2018): logistic regression by gradient descent, all of 30 sites in every round, of unequal size and brightness, against
plain gradient descent: messages until the training loss is within 2 % of what 300 rounds of gradient descent reach.

    python experiments/lazy.py              # about four minutes on two cores
    python experiments/lazy.py --rounds 0   # no training: tables of what there is
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from outcome import document, run_folder, store, stored, table
from torch import nn

import foedus as fd

CLIENTS, COHORT, ALPHA, ROUNDS, SEED = 100, 20, 0.5, 80, 0
SHARES = (0.0, 0.03, 0.05, 0.08, 0.12)
SITES, STEPS, NEAR = 30, 300, 0.02
RATE = 0.05


def two_nn() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def simulate(name: str, task: fd.Task, algorithm: fd.Algorithm, clients: fd.Clients, how: dict[str, Any]) -> fd.Run:
    """One run; an unfinished one goes on."""
    return fd.simulate(
        task, algorithm, clients, seed=SEED, **how,
        settings=fd.Settings(executor=fd.executors.compiled(), folder=run_folder("lazy", name), progress=False),
    )  # fmt: skip


def norm_rule(share: float, clients: fd.Clients, rounds: int) -> dict[str, Any]:
    client = fd.local_sgd(lr=0.1, epochs=1, batch_size=20)
    task = fd.Task(two_nn, nn.functional.cross_entropy, metrics=[fd.accuracy])
    algorithm = fd.Algorithm(client=client, method=fd.lazy(share=share))
    how = {"rounds": rounds, "cohort": COHORT, "evaluation": fd.Evaluation(every=2)}
    run = simulate(f"norm {share:g}", task, algorithm, clients, how)
    seen = [m["central"]["accuracy"] for m in run.metrics if "central" in m]
    return {
        "messages": sum(m["senders"] for m in run.metrics),
        "visits": sum(m["trained"] for m in run.metrics),
        "megabytes_up": round(sum(m["bytes_up"] for m in run.metrics) / 1e6, 1),
        "accuracy": round(float(np.mean(seen[-5:])), 4),
        "rounds_to_95": run.rounds_to("accuracy", 0.95),
    }


def sites(data: Any) -> fd.Clients:
    """Sites of unequal size and brightness: some gradients hardly change, which is what LAG saves on."""
    dealt = data.partition(fd.data.dirichlet(SITES, alpha=0.3), seed=SEED)
    dim = {i: 0.2 + 0.8 * (i % 5) / 4 for i in range(SITES)}
    small = {
        i: (dim[i] * dealt.train(i).inputs[0][:500].reshape(-1, 784), dealt.train(i).targets[:500])
        for i in range(SITES)
    }
    return fd.Clients.of(small)


def gradient_descent(name: str, method: Any, clients: fd.Clients, rounds: int) -> dict[str, Any]:
    client = fd.local_sgd(lr=RATE, steps=1, batch_size=None)
    algorithm = fd.Algorithm(client=client, method=method)
    task = fd.Task(lambda: nn.Linear(784, 10), nn.functional.cross_entropy)
    how = {"rounds": rounds, "evaluation": fd.Evaluation(every=0)}
    run = simulate(name, task, algorithm, clients, how)
    return {
        "loss": [round(m["train_loss"], 5) for m in run.metrics],
        "messages": np.cumsum([m["senders"] if method else m["trained"] for m in run.metrics]).tolist(),
    }


def reached(found: dict[str, Any], target: float) -> tuple[int, int] | None:
    """Rounds and messages until the loss is as low as a target."""
    low = [i for i, loss in enumerate(found["loss"]) if loss <= target]
    return (low[0] + 1, found["messages"][low[0]]) if low else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the norm rule; 0 reports what there is")
    options = parser.parse_args()
    known = stored("lazy")
    norm, lag = known.get("norm", {}), known.get("lag", {})
    if options.rounds:
        data = fd.data.mnist()
        clients = data.partition(fd.data.dirichlet(CLIENTS, alpha=ALPHA), seed=SEED)
        norm = {f"{share:g}": norm_rule(share, clients, options.rounds) for share in SHARES}
        own = sites(data)
        methods = {
            "gradient descent": None,
            "LAG, D=10": fd.lag(rounds=10),
            "LAG, D=10, xi=0.5": fd.lag(rounds=10, xi=0.5),
        }
        lag = {name: gradient_descent(name, method, own, STEPS) for name, method in methods.items()}
    full = norm["0"]["messages"]
    header = ("share of the model's length", "messages", "saved", "MB up", "accuracy at the end", "rounds to 95 %")
    rows = [
        [
            s,
            f["messages"],
            f"{1 - f['messages'] / full:.0%}",
            f["megabytes_up"],
            f"{f['accuracy']:.2%}",
            f["rounds_to_95"],
        ]
        for s, f in norm.items()
    ]
    end = lag["gradient descent"]["loss"][-1]
    told = []
    for name, f in lag.items():
        found = reached(f, end * (1 + NEAR))
        told.append([name, *(found or (None, None)), f["messages"][-1], f["loss"][-1]])
    columns = (
        "",
        f"rounds to a loss within {NEAR:.0%}",
        "messages until then",
        f"messages in {STEPS} rounds",
        "loss at the end",
    )
    document("lazy", f"{table(header, rows)}\n\n{table(columns, told)}")
    store("lazy", {"clients": CLIENTS, "cohort": COHORT, "alpha": ALPHA, "seed": SEED, "norm": norm, "lag": lag})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
