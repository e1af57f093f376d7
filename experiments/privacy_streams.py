"""Fixed against adaptive clipping, and noise that hangs together over rounds against fresh noise.

Logistic regression on MNIST, 500 clients with pictures dealt by class (Dirichlet, α = 0.3), cohorts of 50, 100 rounds.

*Clipping*: the bound C of central noise, far too small, about right and far too large, beside the one that follows the
median (Andrew et al. 2021), from a start that is far too small or too large. ε = 4, hidden Poisson cohorts.

*Streams*: nobody has to be sampled in secret. Fresh Gaussian noise in every round, where every client may come in
every round or, counted, at most ten times; a tree; and bands, with clients that come back after ten rounds. ε is that
of the whole run. Every cell is trained with five seeds, which also deal the pictures.

    OPENBLAS_NUM_THREADS=1 nice -n 19 python experiments/privacy_streams.py   # a quarter of an hour on one core
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from outcome import document, over_seeds, run_folder, store, table, with_deviation
from torch import nn

import foedus as fd

CLIENTS, COHORT, ROUNDS, DELTA, SEPARATION = 500, 50, 100, 10**-3.5, 10
EPSILONS = (1.0, 4.0)
CLIP, RATE, BATCH = 0.3, 0.1, 30
SEEDS = (0, 1, 2, 3, 4)
EVERY, LAST = 5, 3  # rounds between evaluations, and how many of these are averaged at the end


def task() -> fd.Task:
    """Logistic regression on pictures."""
    return fd.Task(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), nn.functional.cross_entropy, metrics=[fd.accuracy]
    )


def found(name: str, rule: Any, cohort: Any) -> dict[str, Any]:
    """Over the seeds."""
    told = over_seeds([accuracy(name, rule, cohort, seed) for seed in SEEDS])
    print(f"{name:60} {with_deviation(told)}", flush=True)
    return told


def accuracy(name: str, rule: Any, cohort: Any, seed: int) -> float:
    """The mean of the last evaluations."""
    clients = fd.data.mnist().partition(fd.data.dirichlet(CLIENTS, alpha=0.3), seed=seed)
    settings = fd.Settings(
        folder=run_folder("privacy_streams", f"{name} {seed}"), executor=fd.executors.vectorised(), progress=False
    )  # fmt: skip
    algorithm = fd.fedavg(fd.local_sgd(lr=RATE, batch_size=BATCH), aggregator=rule)
    run = fd.simulate(
        task(), algorithm, clients, rounds=ROUNDS, cohort=cohort, evaluation=fd.Evaluation(every=EVERY),
        seed=seed, settings=settings,
    )  # fmt: skip
    seen = [line["central"]["accuracy"] for line in run.metrics if "central" in line]
    return statistics.fmean(seen[-LAST:])


def clipping() -> dict[str, dict[str, Any]]:
    """Accuracy by way to clip."""
    z = fd.calibrate(4.0, DELTA, rounds=ROUNDS, cohort=COHORT, population=CLIENTS, hidden=True)
    poisson, cells = fd.poisson(COHORT / CLIENTS), {}
    for norm in (0.03, 0.3, 3.0):
        rule = fd.privacy.central(clip=norm, noise_multiplier=z, cohort=COHORT)
        cells[f"fixed, C = {norm:g}"] = found(f"fixed {norm:g}", rule, poisson)
    for start in (0.03, 3.0):
        rule = fd.privacy.adaptive(noise_multiplier=z, cohort=COHORT, start=start)
        cells[f"adaptive, from C = {start:g}"] = found(f"adaptive {start:g}", rule, poisson)
    return cells


def ways(epsilon: float) -> dict[str, Any]:
    """Rules that cost ε in the whole run."""
    once = fd.calibrate(epsilon, DELTA, rounds=1, cohort=COHORT)
    told = {"clip": CLIP, "noise_multiplier": once, "cohort": COHORT}
    often = ROUNDS // SEPARATION
    return {
        "fresh noise, a client may come every time": fd.privacy.central(
            clip=CLIP, noise_multiplier=fd.calibrate(epsilon, DELTA, rounds=ROUNDS, cohort=COHORT), cohort=COHORT
        ),
        "fresh noise, a client comes 10 times": fd.privacy.correlated(
            fd.privacy.banded(ROUNDS, separation=SEPARATION, bands=1), **told
        ),
        "tree": fd.privacy.correlated(fd.privacy.tree(ROUNDS, separation=SEPARATION), **told),
        f"{often} bands": fd.privacy.correlated(fd.privacy.banded(ROUNDS, separation=SEPARATION), **told),
    }


def main() -> None:
    torch.set_num_threads(1)
    clipped = clipping()
    streams = {
        f"{way}, ε = {epsilon:g}": found(f"{way} {epsilon:g}", rule, fd.spaced(COHORT, separation=SEPARATION))
        for epsilon in EPSILONS
        for way, rule in ways(epsilon).items()
    }
    told = {"clients": CLIENTS, "cohort": COHORT, "rounds": ROUNDS, "delta": DELTA, "separation": SEPARATION}
    told |= {"seeds": len(SEEDS)}
    store("privacy_streams", {"settings": told, "clipping": clipped, "streams": streams})
    document(
        "privacy",
        table(["clipping, ε = 4", "accuracy"], [[way, with_deviation(cell)] for way, cell in clipped.items()]),
        mark="clipping",
    )
    rows = [[way, *(with_deviation(streams[f"{way}, ε = {e:g}"]) for e in EPSILONS)] for way in ways(EPSILONS[0])]
    document("privacy", table(["", *(f"ε = {e:g}" for e in EPSILONS)], rows), mark="streams")


if __name__ == "__main__":
    main()
