"""Adaptive server optimisers beside federated averaging on skewed data (Reddi et al., ICLR 2021, arXiv 2003.00295).

Fashion-MNIST, 100 clients, each class spread over them by a Dirichlet draw (alpha 0.1: most clients hold two or
three classes, and between a handful and some thousands of pictures); 10 clients a round, one epoch on batches of
20. A client's work is the same for all; the server's step is that of FedAvg, FedAvgM (momentum), FedAdagrad, FedAdam
or FedYogi.

Learning rates of client and server are the best of a grid after ``TUNE`` rounds on 5,000 training pictures kept
apart; then each algorithm runs with three seeds, and the test set is looked at for the first time.

    python experiments/adaptive.py                       # about half an hour on two cores
    python experiments/adaptive.py --only FedAdam --seeds 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, table, wanted
from torch import nn

import foedus as fd

CLIENTS, COHORT, ALPHA, BATCH = 100, 10, 0.1, 20
TUNE, ROUNDS, EVERY, SEEDS = 40, 200, 5, (0, 1, 2)
HELD_OUT, LAST, TARGET = 5000, 50, 0.8  # pictures to tune on; rounds averaged at the end; accuracy to reach
RATES = (0.02, 0.05, 0.1, 0.2)


class Server(NamedTuple):
    """A server optimiser and the server learning rates to try."""

    make: Callable[[float], Any]
    rates: tuple[float, ...]


SERVERS = {
    "FedAvg": Server(lambda lr: fd.sgd(lr), (1.0,)),
    "FedAvgM": Server(lambda lr: fd.momentum(lr, beta=0.9), (0.3, 1.0)),
    "FedAdagrad": Server(lambda lr: fd.adagrad(lr), (0.03, 0.1)),
    "FedAdam": Server(lambda lr: fd.adam(lr), (0.003, 0.01, 0.03)),
    "FedYogi": Server(lambda lr: fd.yogi(lr), (0.003, 0.01, 0.03)),
}


def net() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


TASK = fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


def simulate(name: str, rates: tuple[float, float], data: Any, *, rounds: int, seed: int, options: Any) -> fd.Run:
    """One run of an algorithm with (client, server) learning rates; an unfinished one goes on."""
    local, server = rates
    client = fd.local_sgd(lr=local, epochs=1, batch_size=BATCH)
    algorithm = fd.fedavg(client, server=SERVERS[name].make(server))
    clients = data.partition(fd.data.dirichlet(CLIENTS, alpha=ALPHA), seed=seed)
    return fd.simulate(
        TASK, algorithm, clients, cohort=COHORT, rounds=rounds, seed=seed, evaluation=fd.Evaluation(every=EVERY),
        settings=fd.Settings(
            executor=fd.executors.by_name(options.executor), progress=False,
            folder=run_folder("adaptive", f"{data.name} {name} {local:g} {server:g} {seed}"),
        ),
    )  # fmt: skip


def last(run: fd.Run, rounds: int) -> float:
    """Mean accuracy over the last rounds' evaluations: skewed data makes curves jump."""
    seen = [m["central"]["accuracy"] for m in run.metrics if "central" in m]
    return float(np.mean(seen[-max(1, rounds // EVERY) :]))


def tune(name: str, data: Any, options: Any) -> dict[tuple[float, float], float]:
    """(client, server) learning rates -> accuracy on the held-out pictures over the last 20 of the tuning rounds."""
    grid = product(RATES, SERVERS[name].rates)
    return {r: last(simulate(name, r, data, rounds=TUNE, seed=0, options=options), 20) for r in grid}


def measure(name: str, tuned: Any, final: Any, options: Any) -> dict[str, Any]:
    grid = tune(name, tuned, options)
    rates = max(grid, key=lambda r: grid[r])
    print(f"{name}: learning rates (client, server) {rates}, {grid[rates]:.4f} on held-out pictures", flush=True)
    seeds = SEEDS[: options.seeds]
    runs = [simulate(name, rates, final, rounds=options.rounds, seed=s, options=options) for s in seeds]
    ends = [last(r, LAST) for r in runs]
    reached = [r.rounds_to("accuracy", TARGET) for r in runs]
    curves = [[m["central"]["accuracy"] for m in r.metrics if "central" in m] for r in runs]
    print(f"{name}: {ends}, {reached}", flush=True)
    return {
        "client_lr": rates[0],
        "server_lr": rates[1],
        "tuning": {f"{c:g}, {s:g}": round(a, 4) for (c, s), a in grid.items()},
        "accuracy": [round(e, 4) for e in ends],
        "rounds_to_target": [r and round(r, 1) for r in reached],
        "rounds": min(len(r.metrics) for r in runs),
        "curve": np.round(np.mean(curves, axis=0), 4).tolist(),
    }


def lines(found: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for name, f in found.items():
        accuracy, reached = np.array(f["accuracy"]), f["rounds_to_target"]
        text = f"{accuracy.mean():.4f} ± {accuracy.std():.4f}"
        when = " / ".join("–" if r is None else f"{r:.0f}" for r in reached)
        rows.append([name, f["client_lr"], f["server_lr"], text, when])
    return rows


def draw(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, f in found.items():
        at = EVERY * np.arange(1, len(f["curve"]) + 1)
        axis.plot(at, f["curve"], label=name, lw=1.4)
    axis.set(xlabel="communication round", ylabel=f"test accuracy, mean of {len(SEEDS)} seeds", ylim=(0.4, None))
    axis.set(title=f"Fashion-MNIST, Dirichlet({ALPHA}) over {CLIENTS} clients, {COHORT} a round")
    axis.legend()
    figure.tight_layout()
    figure.savefig(figure_path("adaptive"), dpi=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help=f"some of {', '.join(SERVERS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of the final runs")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds")
    parser.add_argument("--executor", default="auto", help="auto, debug, processes, ...")
    options = parser.parse_args()
    final = fd.data.fashion_mnist()
    kept = final.train.take(slice(None, -HELD_OUT))
    held = final.train.take(slice(-HELD_OUT, None))
    tuned = fd.data.from_arrays(kept.inputs[0], kept.targets, test=held, name="tuning")
    found = {n: measure(n, tuned, final, options) for n in SERVERS if wanted(n, options.only)}
    header = (
        "algorithm",
        "client lr",
        "server lr",
        f"accuracy, last {LAST}",
        f"rounds to {TARGET:.0%}, by seed",
    )
    print(table(header, lines(found)))
    if len(found) == len(SERVERS) and options.rounds == ROUNDS and options.seeds == len(SEEDS):
        document("adaptive", table(header, lines(found)))
        about = {
            "clients": CLIENTS,
            "cohort": COHORT,
            "alpha": ALPHA,
            "batch": BATCH,
            "rounds": options.rounds,
        }
        store("adaptive", about | {"tune_rounds": TUNE, "target": TARGET, "every": EVERY, "found": found})
        draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
