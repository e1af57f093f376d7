"""Accuracy against bytes uploaded: the strategies of Konečný et al. 2016 (arXiv 1610.05492) on two small CNNs.

Fashion-MNIST on 200 clients of 300 pictures, and a lossy JPEG copy of CIFAR-10 on 100 clients of 500; 10 clients a
round, one epoch on batches of 10, dealt evenly at random as in the paper. Compressed are the updates of matrices;
biases are sent as they are.

* *structured*: the update is confined to a random mask, or to matrices of low rank, of about equal size: after the
  training, or, *inside*, by training within it;
* *sketched*: a random part of the entries, or fewer bits an entry, with and without a rotation first;
* *the whole chain*: rotation, 6.25 % of the entries, 2 bits each; the same with the codebook of EDEN (Vargaftik et al.
  2022); and with lossless coding behind it;
* FedAvg and FedSGD without compression.

Bytes are those of the messages as they would travel. Learning rates of clients are the same for all arms
(``RATES``: the better of two for FedAvg without compression); the server's is 1.

    OPENBLAS_NUM_THREADS=1 python experiments/konecny.py                 # about ten minutes of one core
    python experiments/konecny.py --only "fashion quantise"
    python experiments/konecny.py --rounds 0                             # no training: tables of what there is

Stop it whenever you like; started again it goes on. An arm with no run folder here keeps its stored result.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd

COHORT, BATCH, SEED, EVERY, LAST = 10, 10, 0, 4, 3  # evaluated every so many rounds; so many averaged at the end
RATES = {"fashion": 0.2, "cifar": 0.1}
CLIENTS = {"fashion": 200, "cifar": 100}
SGD_RATE, SGD_ROUNDS, SGD_EVERY = 0.1, 5, 20  # FedSGD's learning rate; so many times the rounds of the others
BELOW = 0.01  # an arm is held to FedAvg's accuracy less this
FASTER = 2.0  # a confined matrix moves less far along its gradient; twice the rate is as much as the other layers bear


def sent(*stages: fd.Stage) -> fd.Aggregator:
    """Stages for the matrices; biases as they are."""
    return fd.chain(fd.matrices(*stages), fd.mean())


def sent_large(*stages: fd.Stage) -> fd.Aggregator:
    """Stages for the one large matrix, 94 % of Fashion-MNIST's network; the others as they are."""
    return fd.chain(fd.on_layers(large, *stages), fd.mean())


def large(name: str, shape: tuple[int, ...]) -> bool:
    return math.prod(shape) > 50_000


class Arm(NamedTuple):
    """What is done to updates; ``None`` for nothing. ``on``: the data it is run on; ``form``: what clients train
    within; ``faster``: so many times the rate of the others."""

    aggregator: Callable[[], fd.Aggregator] | None
    on: tuple[str, ...] = ("fashion",)
    sgd: bool = False
    form: Callable[[], fd.Stage] | None = None
    faster: float = 1.0


def inside(form: Callable[[], fd.Stage], faster: float = 1.0) -> Arm:
    """The one large matrix trained within a form."""
    return Arm(None, form=lambda: fd.on_layers(large, form()), faster=faster)


BOTH = ("fashion", "cifar")
ARMS = {
    "FedAvg": Arm(None, BOTH),
    "rotate, subsample 6.25 %, quantise 2": Arm(lambda: sent(fd.rotate(), fd.subsample(0.0625), fd.quantise(2)), BOTH),
    "rotate, mask 6.25 %, quantise 2": Arm(lambda: sent(fd.rotate(), fd.random_mask(0.0625), fd.quantise(2))),
    "subsample 6.25 %, EDEN 1": Arm(lambda: sent(fd.subsample(0.0625), fd.eden(1)), BOTH),
    "subsample 6.25 %, EDEN 2": Arm(lambda: sent(fd.subsample(0.0625), fd.eden(2))),
    "DRIVE": Arm(lambda: sent(fd.drive())),
    "rotate, quantise 1": Arm(lambda: sent(fd.rotate(), fd.quantise(1)), BOTH),
    "rotate, quantise 2": Arm(lambda: sent(fd.rotate(), fd.quantise(2))),
    "rotate, quantise 4": Arm(lambda: sent(fd.rotate(), fd.quantise(4))),
    "quantise 1": Arm(lambda: sent(fd.quantise(1)), BOTH),
    "quantise 2": Arm(lambda: sent(fd.quantise(2))),
    "quantise 4": Arm(lambda: sent(fd.quantise(4))),
    "quantise 2, entropy": Arm(lambda: sent(fd.quantise(2), fd.entropy())),
    "rotate, subsample 6.25 %, quantise 2, entropy": Arm(
        lambda: sent(fd.rotate(), fd.subsample(0.0625), fd.quantise(2), fd.entropy())
    ),
    "subsample 6.25 %": Arm(lambda: sent(fd.subsample(0.0625))),
    "mask 25 %": Arm(lambda: sent(fd.random_mask(0.25, unbiased=False))),
    "low rank 16": Arm(lambda: fd.chain(fd.low_rank(16, unbiased=False), fd.mean())),
    "mask 6.25 %": Arm(lambda: sent(fd.random_mask(0.0625, unbiased=False)), BOTH),
    "low rank 4": Arm(lambda: fd.chain(fd.low_rank(4, unbiased=False), fd.mean()), BOTH),
    "large matrix: mask 6.25 %": Arm(lambda: sent_large(fd.random_mask(0.0625, unbiased=False))),
    "large matrix: low rank 4": Arm(lambda: sent_large(fd.low_rank(4, unbiased=False))),
    "large matrix: mask 6.25 %, scaled up": Arm(lambda: sent_large(fd.random_mask(0.0625))),
    "large matrix: low rank 4, scaled up": Arm(lambda: sent_large(fd.low_rank(4))),
    "large matrix: mask 6.25 %, inside": inside(lambda: fd.random_mask(0.0625, unbiased=False)),
    "large matrix: low rank 4, inside": inside(lambda: fd.low_rank(4, unbiased=False)),
    "large matrix: own masks 6.25 %, inside": inside(lambda: fd.rand_k(0.0625)),
    "large matrix: mask 6.25 %, inside, faster": inside(lambda: fd.random_mask(0.0625, unbiased=False), FASTER),
    "large matrix: low rank 4, inside, faster": inside(lambda: fd.low_rank(4, unbiased=False), FASTER),
    "FedSGD": Arm(None, ("fashion",), sgd=True),
}
ROUNDS = {"fashion": 60, "cifar": 32}
LONGER = {("cifar", "rotate, subsample 6.25 %, quantise 2"): 48}  # rounds of an arm that needs more


def fashion_net() -> nn.Module:
    """Two convolutions that halve the picture, and two layers: 106,122 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(7 * 7 * 32, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def cifar_net() -> nn.Module:
    """Three convolutions that halve the picture, and one layer: 69,178 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(48, 96, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 96, 10),
    )  # fmt: skip


NETS = {"fashion": fashion_net, "cifar": cifar_net}
DATA = {"fashion": fd.data.fashion_mnist, "cifar": fd.data.cifar10_jpeg}


def algorithm(name: str, arm: Arm) -> fd.Algorithm:
    if arm.sgd:
        return fd.fedsgd(lr=SGD_RATE)
    local = fd.local_sgd(lr=RATES[name] * arm.faster, epochs=1, batch_size=BATCH)
    if arm.form is not None:
        return fd.structured(local, arm.form())
    return fd.fedavg(local, aggregator=arm.aggregator and arm.aggregator())


def simulate(name: str, told: str, clients: fd.Clients) -> fd.Run:
    """One run; an unfinished one goes on, and one that diverges ends where it did."""
    try:
        return trained(name, told, clients)
    except fd.errors.NothingToAggregate as error:
        print(f"{name} {told} diverged: {error}", flush=True)
        return fd.read_run(run_folder("konecny", f"{name} {told}"))


def trained(name: str, told: str, clients: fd.Clients) -> fd.Run:
    arm = ARMS[told]
    rounds = LONGER.get((name, told), ROUNDS[name] * (SGD_ROUNDS if arm.sgd else 1))
    return fd.simulate(
        fd.Task(NETS[name], nn.functional.cross_entropy, metrics=[fd.accuracy]), algorithm(name, arm), clients,
        cohort=COHORT, rounds=rounds, seed=SEED, evaluation=fd.Evaluation(every=SGD_EVERY if arm.sgd else EVERY),
        settings=fd.Settings(
            executor=fd.executors.debug(), folder=run_folder("konecny", f"{name} {told}"), progress=False
        ),
    )  # fmt: skip


def measure(name: str, told: str, clients: fd.Clients) -> dict[str, Any]:
    run = simulate(name, told, clients)
    curve = [[m["round"], round(m["central"]["accuracy"] or 0.0, 4)] for m in run.metrics if "central" in m]
    bytes_up = float(np.median([m["bytes_up"] for m in run.metrics])) / COHORT
    end = float(np.mean([a for _, a in curve[-LAST:]]))
    print(f"{name} {told}: {end:.4f}, {bytes_up:,.0f} bytes", flush=True)
    return {"bytes": round(bytes_up, 1), "accuracy": round(end, 4), "rounds": len(run.metrics), "curve": curve}


def megabytes(found: dict[str, Any], target: float) -> float | None:
    """Uploaded by all clients until the best accuracy so far reached a target, interpolated; ``None``: never."""
    rounds, accuracy = np.array([[0, 0.0], *found["curve"]]).T
    best = np.maximum.accumulate(accuracy)
    if best[-1] < target:
        return None
    at = int(np.argmax(best >= target))
    part = (target - best[at - 1]) / (best[at] - best[at - 1])
    return float((rounds[at - 1] + part * (rounds[at] - rounds[at - 1])) * COHORT * found["bytes"] / 1e6)


def targets(arms: dict[str, Any]) -> list[float]:
    """FedAvg's accuracy less a point, and what FedSGD reached."""
    reached = [arms["FedAvg"]["accuracy"] - BELOW]
    return reached + ([max(a for _, a in arms["FedSGD"]["curve"])] if "FedSGD" in arms else [])


def lines(arms: dict[str, Any]) -> list[list[Any]]:
    """A row per arm: size of a message, accuracy, and upload to each target, beside that of FedAvg (or FedSGD)."""
    rows = []
    for told, found in arms.items():
        size = arms["FedAvg"]["bytes"] / found["bytes"]
        row: list[Any] = [told, f"{found['bytes']:,.0f}", f"{size:,.0f}×" if size >= 1.5 else "1×"]
        row += [f"{100 * found['accuracy']:.1f}{end_of(told, found, arms)}"]
        for target, base in zip(targets(arms), ("FedAvg", "FedSGD"), strict=False):
            mine, theirs = megabytes(found, target), megabytes(arms[base], target)
            row += [mine, f"{theirs / mine:,.2g}×" if mine and theirs and theirs < 10 * mine else times(theirs, mine)]
        rows.append(row)
    return rows


def end_of(told: str, found: dict[str, Any], arms: dict[str, Any]) -> str:
    """A note where a run had another number of rounds than FedAvg's."""
    if found["rounds"] == arms["FedAvg"]["rounds"]:
        return ""
    diverged = found["rounds"] < arms["FedAvg"]["rounds"]
    return f" (diverged in round {found['rounds'] + 1})" if diverged else f" ({found['rounds']} rounds)"


def times(theirs: float | None, mine: float | None) -> str | None:
    return f"{theirs / mine:,.0f}×" if mine and theirs else None


def header(arms: dict[str, Any]) -> list[str]:
    told = ["arm", "bytes a message", "smaller", "accuracy at the end, %"]
    for target, base in zip(targets(arms), ("FedAvg", "FedSGD"), strict=False):
        told += [f"MB to {target:.1%}", f"less than {base}"]
    return told


SHOWN = {"FedAvg", "FedSGD", "rotate, subsample 6.25 %, quantise 2", "subsample 6.25 %, EDEN 1", "rotate, quantise 1",
         "quantise 1", "mask 6.25 %", "low rank 4"}  # fmt: skip


def draw(found: dict[str, Any]) -> None:
    """Best accuracy so far over megabytes uploaded by all clients."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, (name, title) in zip(axes, {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10 (JPEG)"}.items(), strict=True):
        for told in (t for t in found.get(name, {}) if t in SHOWN):
            arm = found[name][told]
            rounds, accuracy = np.array(arm["curve"]).T
            style = "k" if told == "FedAvg" else "0.6" if told == "FedSGD" else None
            axis.plot(rounds * COHORT * arm["bytes"] / 1e6, np.maximum.accumulate(accuracy), label=told, color=style)
        axis.set(xscale="log", xlabel="MB uploaded by all clients", ylabel="test accuracy (best so far)", title=title)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(figure_path("konecny"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='arms whose name holds this, e.g. "cifar rotate"')
    parser.add_argument("--rounds", type=int, help="0 reports what there is")
    options = parser.parse_args()
    found: dict[str, Any] = stored("konecny").get("found", {})
    for name in DATA if options.rounds != 0 else ():
        asked = [told for told, arm in ARMS.items() if name in arm.on and wanted(f"{name} {told}", options.only)]
        clients = DATA[name]().partition(fd.data.iid(CLIENTS[name]), seed=SEED) if asked else None
        for told in asked:
            found.setdefault(name, {})[told] = measure(name, told, clients)
    found = {n: {told: found[n][told] for told in ARMS if told in found[n]} for n in DATA if n in found}
    about = {"clients": CLIENTS, "cohort": COHORT, "batch": BATCH, "rates": RATES, "fedsgd_rate": SGD_RATE}
    store("konecny", about | {"seed": SEED, "found": found})
    for name, arms in found.items():
        if "FedAvg" in arms:
            document("konecny", table(header(arms), lines(arms)), mark="table" if name == "fashion" else name)
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
