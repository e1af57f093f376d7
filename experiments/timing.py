"""Waiting for nobody: buffered asynchronous federation against rounds, when some clients are very slow.

MNIST, 2NN, 200 clients with a Dirichlet split (alpha 0.5). A client's speed is drawn from a heavy tail (Pareto: the
slowest of a hundred takes some fifty times as long as the middle one), 4 % of the clients are lost on the way; 20
clients train at a time. Compared by the simulated world's clock: rounds that wait for all, rounds that ask 30 % more
and close at the 20th answer, rounds with a deadline where slow clients do what they can, FedBuff (Nguyen et al. 2022)
with buffers of 5 and 10, FedAsync (Xie et al. 2019), and a step every so many seconds.

    python experiments/timing.py              # about five minutes on two cores
    python experiments/timing.py --rounds 0   # no training: table and figure of what there is
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd
from foedus.sim.world import Device

CLIENTS, AT_ONCE, ALPHA, SEED = 200, 20, 0.5, 0
TARGETS = (0.90, 0.95)


def device(draw: np.random.Generator) -> Device:
    """A phone whose speed has a heavy tail towards slow: examples a second = 200 / Pareto(1.2)."""
    return Device(
        speed=200.0 / (1.0 + float(draw.pareto(1.2))),
        download=2e6,
        upload=5e5,
        watts=3.0,
        joules_per_byte=5e-6,
        dropout=0.04,
    )


class Arm(NamedTuple):
    """A pace, the world's rules that go with it, and how many steps of the server."""

    timing: Any
    rounds: int
    rules: dict[str, Any] = {}  # noqa: RUF012 - never written to


ARMS = {
    "rounds, waiting for all": Arm(None, 60),
    "rounds, 1.3 asked": Arm(None, 150, {"over_selection": 1.3}),
    "rounds, 60 s, partial work": Arm(None, 150, {"deadline": 60.0, "partial_work": True}),
    "FedBuff, 5": Arm(fd.buffered(5), 800),
    "FedBuff, 10": Arm(fd.buffered(10), 400),
    "FedAsync": Arm(fd.asynchronous(0.3), 1500),
    "a step every 30 s": Arm(fd.semi_synchronous(30.0), 300),
}


def two_nn() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def simulate(name: str, arm: Arm, clients: fd.Clients, rounds: int) -> fd.Run:
    """One arm; an unfinished one goes on."""
    client = fd.local_sgd(lr=0.1, epochs=1, batch_size=20)
    every = max(1, arm.rounds // 60)
    return fd.simulate(
        fd.Task(two_nn, nn.functional.cross_entropy, metrics=[fd.accuracy]), fd.fedavg(client, timing=arm.timing),
        clients, cohort=AT_ONCE, rounds=rounds, seed=SEED, evaluation=fd.Evaluation(every=every),
        settings=fd.Settings(
            executor=fd.executors.compiled(), folder=run_folder("timing", name), progress=False,
            world=fd.World(device=device, **arm.rules),
        ),
    )  # fmt: skip


def measure(run: fd.Run) -> dict[str, Any]:
    """Hours against accuracy, hours to the targets, bytes and energy."""
    seen = [m for m in run.metrics if "central" in m]
    hours = [m["simulated"]["elapsed_seconds"] / 3600 for m in seen]
    accuracy = [m["central"]["accuracy"] for m in seen]
    best = np.maximum.accumulate(accuracy)
    reached = {f"{t:g}": next((round(h, 4) for h, a in zip(hours, best, strict=True) if a >= t), None) for t in TARGETS}
    ages = [m["staleness"]["mean"] for m in run.metrics if "staleness" in m]
    return {
        "hours": [round(h, 4) for h in hours],
        "accuracy": [round(a, 4) for a in accuracy],
        "hours_to": reached,
        "steps": len(run.metrics),
        "updates": sum(m["trained"] for m in run.metrics),
        "megabytes_up": round(sum(m["bytes_up"] for m in run.metrics) / 1e6),
        "megajoules": round(sum(m["simulated"]["energy_joules"] for m in run.metrics) / 1e6, 3),
        "staleness": round(float(np.mean(ages)), 2) if ages else None,
    }


def draw(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for name, f in found.items():
        axis.plot(np.array(f["hours"]) * 60, f["accuracy"], label=name, lw=1.2)
    axis.set(xscale="log", ylim=(0.6, 1.0), xlabel="simulated minutes", ylabel="test accuracy")
    axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(figure_path("timing"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="arms whose name holds this")
    parser.add_argument("--rounds", type=int, help="at most so many; 0 reports what there is")
    options = parser.parse_args()
    found = stored("timing").get("arms", {})
    if options.rounds != 0:
        clients = fd.data.mnist().partition(fd.data.dirichlet(CLIENTS, alpha=ALPHA), seed=SEED)
        for name, arm in ARMS.items():
            if wanted(name, options.only):
                rounds = arm.rounds if options.rounds is None else min(arm.rounds, options.rounds)
                found[name] = measure(simulate(name, arm, clients, rounds))
                print(name, found[name]["hours_to"], flush=True)
    found = {name: found[name] for name in ARMS if name in found}
    minutes = [f"simulated minutes to {t:.0%}" for t in TARGETS]
    header = ("pace", *minutes, "steps", "updates", "mean staleness", "MB up", "MJ", "best accuracy")
    rows = [
        [name, *(None if h is None else 60 * h for h in f["hours_to"].values()), f["steps"], f["updates"],
         f["staleness"], f["megabytes_up"], f["megajoules"], f"{max(f['accuracy']):.2%}"]
        for name, f in found.items()
    ]  # fmt: skip
    document("timing", table(header, rows))
    store("timing", {"clients": CLIENTS, "at_once": AT_ONCE, "alpha": ALPHA, "seed": SEED, "arms": found})
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
