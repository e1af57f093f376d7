"""Algorithms against data that differs from client to client, on MNIST and Fashion-MNIST (2NN).

FedAvg, FedProx, SCAFFOLD, FedNova, FedDyn, FedAdam and FedYogi, and momentum of the clients' own, begun anew in every
round or averaged; 100 clients dealt out evenly at random (IID), by a Dirichlet draw over classes (alpha 0.1), by
McMahan's shards (two a client), and with very uneven sizes; 10 clients a round, one epoch on batches of 10, learning
rate 0.1 for all but those with momentum. What each algorithm has of its own (mu, alpha, the server's learning rate,
that of momentum) is the best of a few after ``TUNE`` rounds of the Dirichlet split with another seed. Rounds to
a stated accuracy, and the accuracy at the end, over three seeds.

    python experiments/noniid.py                               # about an hour on two cores
    python experiments/noniid.py --only "mnist dirichlet" --seeds 1
    python experiments/noniid.py --rounds 0                    # no training: tables of what there is

Stop it whenever you like; started again it goes on. What is stored is not computed again, unless ROUNDS has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd

CLIENTS, COHORT, BATCH, RATE = 100, 10, 10, 0.1
ROUNDS, EVERY, LAST, SEEDS = 80, 4, 20, (0, 1, 2)  # of LAST rounds the mean is the accuracy at the end
TUNE, TUNING_SEED = 24, 9
TARGETS = {
    "mnist": {"iid": 0.96, "dirichlet": 0.93, "shards": 0.90, "quantity": 0.96},
    "fashion": {"iid": 0.85, "dirichlet": 0.75, "shards": 0.75, "quantity": 0.85},
}


class Candidate(NamedTuple):
    """An algorithm, as a function of the one value of its own, and the values to try."""

    make: Callable[[float], fd.Algorithm]
    values: tuple[float, ...] = (0.0,)


def client(penalty: Any = None) -> Any:
    return fd.local_sgd(lr=RATE, epochs=1, batch_size=BATCH, penalty=penalty)


def heavy(lr: float) -> Any:
    """With momentum, whose steps add up to ten times the learning rate."""
    return fd.local_sgd(lr=lr, epochs=1, batch_size=BATCH, momentum=0.9)


CANDIDATES = {
    "FedAvg": Candidate(lambda _: fd.fedavg(client())),
    "FedProx": Candidate(lambda mu: fd.fedavg(client(fd.proximal(mu))), (0.01, 0.1)),
    "SCAFFOLD": Candidate(lambda _: fd.scaffold(client())),
    "FedNova": Candidate(lambda _: fd.fednova(client())),
    "FedDyn": Candidate(lambda alpha: fd.feddyn(client(), alpha=alpha), (0.01, 0.1)),
    "FedAdam": Candidate(lambda lr: fd.fedavg(client(), server=fd.adam(lr)), (0.003, 0.01)),
    "local momentum": Candidate(lambda lr: fd.fedavg(heavy(lr)), (0.003, 0.01)),
    "averaged momentum": Candidate(lambda lr: fd.averaged_momentum(heavy(lr)), (0.003, 0.01)),
    "FedYogi": Candidate(lambda lr: fd.fedavg(client(), server=fd.yogi(lr)), (0.003, 0.01)),
}
SPLITS = {
    "iid": fd.data.iid(CLIENTS),
    "dirichlet": fd.data.dirichlet(CLIENTS, alpha=0.1),
    "shards": fd.data.shards(CLIENTS, shards_per_node=2),
    "quantity": fd.data.quantity_skew(CLIENTS, alpha=0.5),
}
DATA = {"mnist": fd.data.mnist, "fashion": fd.data.fashion_mnist}


def two_nn() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


TASK = fd.Task(two_nn, nn.functional.cross_entropy, metrics=[fd.accuracy])


def simulate(cell: tuple[str, str, str], value: float, *, rounds: int, seed: int, data: Any) -> fd.Run:
    """One run of (data, split, algorithm); an unfinished one goes on."""
    name, split, algorithm = cell
    return fd.simulate(
        TASK, CANDIDATES[algorithm].make(value), data.partition(SPLITS[split], seed=seed), cohort=COHORT,
        rounds=rounds, seed=seed, evaluation=fd.Evaluation(every=EVERY),
        settings=fd.Settings(
            executor=fd.executors.compiled(), progress=False,
            folder=run_folder("noniid", f"{name} {split} {algorithm} {value:g} {seed} {rounds}"),
        ),
    )  # fmt: skip


def accuracies(run: fd.Run) -> list[float]:
    return [m["central"]["accuracy"] for m in run.metrics if "central" in m]


def tuned(name: str, algorithm: str, data: Any) -> tuple[float, dict[str, float]]:
    """The best value of an algorithm's own, and the accuracy of each that was tried."""
    values = CANDIDATES[algorithm].values
    if len(values) == 1:
        return values[0], {}
    cell = (name, "dirichlet", algorithm)
    found = {
        v: float(np.mean(accuracies(simulate(cell, v, rounds=TUNE, seed=TUNING_SEED, data=data))[-4:])) for v in values
    }
    return max(found, key=lambda v: found[v]), {f"{v:g}": round(a, 4) for v, a in found.items()}


def measure(
    cell: tuple[str, str, str], value: float, before: dict[str, Any], *, seeds: int, rounds: int, data: Any
) -> dict[str, Any]:
    """A cell with results of so many seeds: those that are stored, and runs of the others."""
    if (before.get("value"), before.get("rounds")) != (value, rounds):
        before = {"accuracy": [], "rounds_to_target": [], "curve": []}
    known = len(before["accuracy"])
    runs = [simulate(cell, value, rounds=rounds, seed=s, data=data) for s in SEEDS[known:seeds]]
    target = TARGETS[cell[0]][cell[1]]
    ends = [*before["accuracy"], *(round(float(np.mean(accuracies(r)[-LAST // EVERY :])), 4) for r in runs)]
    print(" ".join(cell), f"{np.mean(ends):.4f}", flush=True)
    reached = [r.rounds_to("accuracy", target) for r in runs]
    curves = [*[before["curve"]] * known, *(accuracies(r) for r in runs)]
    return {
        "value": value,
        "accuracy": ends,
        "rounds_to_target": [*before["rounds_to_target"], *(r and round(r, 1) for r in reached)],
        "rounds": rounds,
        "curve": np.round(np.mean(curves, axis=0), 4).tolist(),
    }


def lines(cells: dict[str, Any], name: str) -> list[list[Any]]:
    """A row per algorithm: for each split, rounds to the target and the accuracy at the end."""
    rows = []
    for algorithm in CANDIDATES:
        row: list[Any] = [algorithm]
        for split in SPLITS:
            cell = cells.get(f"{name} {split} {algorithm}")
            row += [None, None] if cell is None else [rounds_told(cell), accuracy_told(cell)]
        if any(found is not None for found in row[1:]):
            rows.append(row)
    return rows


def rounds_told(cell: dict[str, Any]) -> str:
    reached = [r for r in cell["rounds_to_target"] if r]
    if not reached:
        return f"> {cell['rounds']}"
    seeds = len(cell["rounds_to_target"])
    note = "" if len(reached) == seeds else f" ({len(reached)} of {seeds})"
    return f"{np.mean(reached):.0f}{spread(reached, 0) if seeds > 1 else ''}{note}"


def accuracy_told(cell: dict[str, Any]) -> str:
    found = [100 * a for a in cell["accuracy"]]
    return f"{np.mean(found):.2f}{spread(found, 2) if len(found) > 1 else ''}"


def spread(values: list[float], digits: int) -> str:
    """Nothing is said of the spread of one seed."""
    return f" ± {np.std(values):.{digits}f}"


def report(cells: dict[str, Any], tuning: dict[str, Any]) -> None:
    store("noniid", {"clients": CLIENTS, "cohort": COHORT, "tuning": tuning, "targets": TARGETS, "cells": cells})
    parts = []
    for name in DATA:
        if not any(cell.startswith(name) for cell in cells):
            continue  # nothing computed yet
        targets = TARGETS[name]
        header = [
            "algorithm",
            *(h for s in SPLITS for h in (f"{s}: rounds to {targets[s]:.0%}", f"{s}: at the end, %")),
        ]
        parts.append(f"**{name}**\n\n{table(header, lines(cells, name))}")
    document("noniid", "\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='cells whose name holds this, e.g. "mnist iid"')
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0 reports what there is")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    options = parser.parse_args()
    known = stored("noniid")
    cells, tuning = known.get("cells", {}), known.get("tuning", {})
    for name, load in DATA.items() if options.rounds else ():
        data = load()
        for split in SPLITS:
            for algorithm in CANDIDATES:
                if wanted(f"{name} {split} {algorithm}", options.only):
                    if f"{name} {algorithm}" not in tuning:
                        value, tried = tuned(name, algorithm, data)
                        tuning[f"{name} {algorithm}"] = {"value": value, "accuracy": tried}
                    value, cell = tuning[f"{name} {algorithm}"]["value"], (name, split, algorithm)
                    before = cells.get(" ".join(cell), {})
                    cells[" ".join(cell)] = measure(
                        cell, value, before, seeds=options.seeds, rounds=options.rounds, data=data
                    )
                    store("noniid", {"cells": cells, "tuning": tuning})
    report(cells, tuning)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
