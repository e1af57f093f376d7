"""Accuracy against ε: central noise, noise in shares at 16 bits, and local noise, on MNIST and Fashion-MNIST.

Logistic regression (7,850 parameters), 500 clients of 120 pictures dealt at random, a Poisson cohort of 100 a round, 60
rounds, δ = 10⁻³·⁵. Every row is a way to add noise, every column an ε for the whole run, found by ``foedus.calibrate``:

- *central, hidden*: the server adds noise, and nobody sees who takes part: sampling counts;
- *central*: the same, but who takes part may be seen, so that every client is thought to take part in every round;
- *shares*: discrete Gaussian and Skellam shares of every client, sums modulo 2¹⁶, half of the cohort honest;
- *local*: every client hides by itself.

Every cell is trained with five seeds, which also deal the pictures.

    OPENBLAS_NUM_THREADS=1 nice -n 19 python experiments/privacy_accuracy.py   # a quarter of an hour on one core
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from outcome import document, over_seeds, run_folder, store, table, wanted, with_deviation
from torch import nn

import foedus as fd

CLIENTS, COHORT, ROUNDS, DELTA = 500, 100, 60, 10**-3.5
HONEST = COHORT // 2
EPSILONS = (1.0, 4.0, 16.0)
CLIP, RATE, BATCH, EPOCHS = 0.5, 0.1, 30, 1
SEEDS = (0, 1, 2, 3, 4)
EVERY, LAST = 3, 3  # rounds between evaluations, and how many of these are averaged at the end
DATA = {"MNIST": fd.data.mnist, "Fashion-MNIST": fd.data.fashion_mnist}


def task() -> fd.Task:
    """Logistic regression on pictures."""
    return fd.Task(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), nn.functional.cross_entropy, metrics=[fd.accuracy]
    )


def noise(epsilon: float, *, hidden: bool = False) -> float:
    """The multiplier that a run takes."""
    return fd.calibrate(epsilon, DELTA, rounds=ROUNDS, cohort=COHORT, population=CLIENTS, hidden=hidden)


def central(epsilon: float, hidden: bool) -> Any:
    return fd.privacy.central(clip=CLIP, noise_multiplier=noise(epsilon, hidden=hidden), cohort=COHORT)


def shares(epsilon: float, make: Callable[..., Any]) -> Any:
    """Room for twice the cohort: how many come varies."""
    part = make(clip=CLIP, noise_multiplier=noise(epsilon), cohort=2 * COHORT, honest=HONEST, bits=16)
    return fd.privacy.trusted_sum(part, planned=COHORT)


def local(epsilon: float) -> Any:
    return fd.chain(fd.privacy.local(clip=CLIP, noise_multiplier=2 * noise(epsilon)), fd.mean())


WAYS: dict[str, Callable[[float], Any]] = {
    "central, hidden cohorts": lambda e: central(e, True),
    "central": lambda e: central(e, False),
    "discrete Gaussian shares, 16 bits": lambda e: shares(e, fd.privacy.gaussian_shares),
    "Skellam shares, 16 bits": lambda e: shares(e, fd.privacy.skellam_shares),
    "local": local,
}


def accuracy(data: str, name: str, rule: Any, seed: int) -> float:
    """The mean of the last evaluations."""
    clients = DATA[data]().partition(fd.data.iid(CLIENTS), seed=seed)
    run = fd.simulate(
        task(),
        fd.fedavg(fd.local_sgd(lr=RATE, batch_size=BATCH, epochs=EPOCHS), aggregator=rule),
        clients,
        rounds=ROUNDS,
        cohort=fd.poisson(COHORT / CLIENTS),
        seed=seed,
        evaluation=fd.Evaluation(every=EVERY),
        settings=fd.Settings(
            folder=run_folder("privacy_accuracy", f"{data} {name} {seed}"), executor=fd.executors.vectorised(),
            progress=False,
        ),
    )  # fmt: skip
    seen = [line["central"]["accuracy"] for line in run.metrics if "central" in line]
    return statistics.fmean(seen[-LAST:])


def found(data: str, name: str, rule: Any) -> dict[str, Any]:
    """Over the seeds."""
    values = [accuracy(data, name, rule, seed) for seed in SEEDS]
    print(f"{data:14} {name:50} {with_deviation(over_seeds(values))}", flush=True)
    return over_seeds(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="parts of names of data sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for data in DATA:
        if not wanted(data, options.only):
            continue
        plain = fd.chain(fd.clip(CLIP), fd.mean(weighted=False))
        results[data] = {"no noise, clipped": found(data, "no noise, clipped", plain)}
        for way, rule in WAYS.items():
            for epsilon in EPSILONS:
                results[data][f"{way}, ε = {epsilon:g}"] = found(data, f"{way}, {epsilon:g}", rule(epsilon))
    told = {"clients": CLIENTS, "cohort": COHORT, "rounds": ROUNDS, "delta": DELTA, "clip": CLIP, "seeds": len(SEEDS)}
    store("privacy_accuracy", {"settings": told, "accuracy": results})
    document("privacy", "\n\n".join(shown(data, rows) for data, rows in results.items()))


def shown(data: str, rows: dict[str, Any]) -> str:
    """A data set's table: ways by ε."""
    header = ["", *(f"ε = {epsilon:g}" for epsilon in EPSILONS)]
    lines = [[way, *(with_deviation(rows[f"{way}, ε = {e:g}"]) for e in EPSILONS)] for way in WAYS]
    return f"**{data}** (without noise: {with_deviation(rows['no noise, clipped'])})\n\n{table(header, lines)}"


if __name__ == "__main__":
    main()
