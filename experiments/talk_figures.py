"""The two figures of the talk "Federated learning" (Strange Loop 2019), on MNIST.

Figure one, "what happens between two averagings": ten nodes, 90 % of whose examples are of one
digit, and a small network. Test loss after every few local steps of every node's own model (grey, a sawtooth),
of one node that trains as much but never communicates (orange), of the federated model (green).

Figure two, "what skewed data costs": test accuracy per round when everything lies in one place (non-federated), and
on ten nodes whose data is uniform, 90 % of one class on each node, 100 % of one class on each node. The same 54,210
examples in number, and one pass over them a round, in all four.

    python experiments/talk_figures.py                   # about ten minutes on two cores
    python experiments/talk_figures.py --rounds 10 --only two
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from outcome import document, figure_path, run_folder, store, table, wanted
from torch import nn

import foedus as fd
from foedus.report.curves import plot_accuracy_by_partition
from foedus.report.local import plot_local

NODES, SEED = 10, 0
BATCH = 20
ONE: dict[str, Any] = {
    "share": 0.9,
    "lr": 0.05,
    "rounds": 24,
    "steps": 25,
    "every": 5,
    "test": 2000,
}  # figure one
TWO: dict[str, Any] = {"rounds": 30, "lr": 0.05}  # figure two; one epoch a round
PARTITIONS = {
    "uniform": fd.data.by_class(NODES, share=1 / NODES),
    "90 % of one class on each node": fd.data.by_class(NODES, share=0.9),
    "100 % of one class on each node": fd.data.by_class(NODES, share=1.0),
}


def net() -> nn.Module:
    """784-200-200-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


TASK = fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


def simulate(name: str, clients: fd.Clients, client: Any, rounds: int, **settings: Any) -> fd.Run:
    return fd.simulate(
        TASK, fd.fedavg(client), clients, rounds=rounds, seed=SEED,
        settings=fd.Settings(folder=run_folder("talk", name), progress=False, **settings),
    )  # fmt: skip


def figure_one(data: Any, rounds: int) -> dict[str, Any]:
    """The sawtooth; the data is in the runs' ``local.jsonl``."""
    clients = data.partition(fd.data.by_class(NODES, share=ONE["share"]), seed=SEED)
    curves = fd.LocalCurves(every=ONE["every"], examples=data.test.take(slice(0, ONE["test"])))
    client = fd.local_sgd(lr=ONE["lr"], steps=ONE["steps"], batch_size=BATCH)
    together = simulate("one federated", clients, client, rounds, local_curves=curves)
    alone = simulate("one alone", clients.subset([0]), client, rounds, local_curves=curves)
    plot_local(together.record, alone.record).savefig(figure_path("talk_one"), dpi=85)
    return {"settings": ONE, "federated": together.final, "alone": alone.final}


def figure_two(data: Any, rounds: int) -> dict[str, Any]:
    """Accuracy per round by partition."""
    deals = {name: data.partition(rule, seed=SEED) for name, rule in PARTITIONS.items()}
    everything = fd.Clients.of({"everybody": deals["uniform"].pooled_examples()}, central_test=data.test)
    client = fd.local_sgd(lr=TWO["lr"], epochs=1, batch_size=BATCH)
    runs = {n: simulate(f"two {n}", c, client, rounds) for n, c in ({"non-federated": everything} | deals).items()}
    picture = plot_accuracy_by_partition({n: r.record for n, r in runs.items()})
    picture.savefig(figure_path("talk_two"), dpi=85)
    curves = {n: [round(m["central"]["accuracy"], 4) for m in r.metrics] for n, r in runs.items()}
    rows = [[n, *(f"{100 * a:.1f} %" for a in (c[0], c[min(4, len(c) - 1)], c[-1], max(c)))] for n, c in curves.items()]
    text = table(("test accuracy", "round 1", "round 5", f"round {rounds}", "best"), rows)
    document("talk", text) if rounds == TWO["rounds"] else print(text)
    return {"settings": TWO, "accuracy": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="one or two")
    parser.add_argument("--rounds", type=int, help="rounds, instead of those at the top of the script")
    options = parser.parse_args()
    data, found = fd.data.mnist(), {}
    if wanted("one", options.only):
        found["one"] = figure_one(data, options.rounds or ONE["rounds"])
        print(found["one"])
    if wanted("two", options.only):
        found["two"] = figure_two(data, options.rounds or TWO["rounds"])
    if len(found) == 2:
        store("talk_figures", {"nodes": NODES, "seed": SEED, "batch": BATCH} | found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
