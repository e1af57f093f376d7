"""Federated averaging on MNIST: rounds to a target accuracy, beside McMahan et al., AISTATS 2017 (arXiv 1602.05629).

100 clients of 600 examples, 10 of them in each round (C = 0.1). IID: shuffled; non-IID: sorted by digit, cut into
200 shards of 300, two to a client. Reproduced: the C = 0.1 rows of Table 1 for the 2NN (97 %), and of Table 2
for the CNN (99 %): FedSGD, and E epochs on batches of B. Rounds to the target come from the curve made monotone
by its best value so far, interpolated between evaluations, as in the paper.

The learning rate of each row is the best of a few after a few rounds (``rates``, ``tune``); the paper's grids were
finer and were run to the end. The tuning runs are the beginnings of the full runs, so nothing is computed twice.

    python experiments/mcmahan_mnist.py --only 2nn            # about ten minutes on two cores
    python experiments/mcmahan_mnist.py --only "cnn iid"      # about an hour
    python experiments/mcmahan_mnist.py --rounds 0            # no training: table and figure of what there is

Stop it whenever you like; started again it goes on. A row with no run folder here keeps its stored result.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from outcome import document, figure_path, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd

CLIENTS, COHORT, SEED = 100, 10, 0
TARGET = {"2nn": 0.97, "cnn": 0.99}
PUBLISHED_FEDSGD = {"2nn iid": 1474, "2nn non-iid": 1796, "cnn iid": 626, "cnn non-iid": 483}


class Row(NamedTuple):
    """A row of the paper's tables and how it is run here; ``batch=None`` is B = ∞."""

    model: str
    split: str
    epochs: int
    batch: int | None
    published: int
    rounds: int  # give up after
    rates: tuple[float, ...]
    tune: int  # rounds of a tuning run
    every: int  # rounds between evaluations

    @property
    def name(self) -> str:
        how = "FedSGD" if self.batch is None else f"E={self.epochs} B={self.batch}"
        return f"{self.model} {self.split} {how}"


# In the order in which they are run: cheap ones first.
ROWS = (
    Row("2nn", "iid", 1, 10, 87, 300, (0.1, 0.2, 0.3), 20, 1),
    Row("2nn", "non-iid", 1, 10, 664, 1500, (0.1, 0.2, 0.3), 60, 1),
    Row("2nn", "iid", 1, None, 1474, 3000, (0.5, 0.7, 1.0), 100, 5),
    Row("2nn", "non-iid", 1, None, 1796, 3500, (0.2, 0.5, 0.7), 200, 5),
    Row("cnn", "iid", 1, 10, 34, 80, (0.05, 0.1, 0.2), 4, 1),
    Row("cnn", "iid", 5, 10, 20, 40, (0.05, 0.1), 2, 1),
    Row("cnn", "iid", 5, 50, 29, 60, (0.1, 0.2), 3, 1),
    Row("cnn", "iid", 1, None, 626, 1000, (0.1, 0.2, 0.3), 20, 5),
    Row("cnn", "non-iid", 1, 10, 350, 700, (0.03, 0.05, 0.1), 12, 3),
    Row("cnn", "non-iid", 5, 10, 229, 500, (0.02, 0.05), 4, 2),
)


def two_nn() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def cnn() -> nn.Module:
    """Two convolutions of 5×5 with 32 and 64 channels, each pooled by 2; 512; 10: 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(7 * 7 * 64, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


TASKS = {
    name: fd.Task(model, nn.functional.cross_entropy, metrics=[fd.accuracy])
    for name, model in (("2nn", two_nn), ("cnn", cnn))
}
SPLITS = {"iid": fd.data.iid(CLIENTS), "non-iid": fd.data.shards(CLIENTS, shards_per_node=2)}


def folder(row: Row, lr: float) -> Path:
    return run_folder("mcmahan", f"{row.name} lr={lr:g}")


def run(row: Row, clients: fd.Clients, lr: float, rounds: int, options: argparse.Namespace) -> fd.Run:
    """One run of a row at one learning rate; an unfinished one goes on, and one that is longer is read."""
    there = folder(row, lr)
    if (there / "run.json").exists() and len((read := fd.read_run(there)).metrics) >= rounds:
        return read
    client = fd.local_sgd(lr=lr, epochs=row.epochs, batch_size=row.batch)
    algorithm = fd.fedsgd(lr=lr) if row.batch is None else fd.fedavg(client)
    return fd.simulate(
        TASKS[row.model], algorithm, clients, cohort=COHORT, rounds=rounds, seed=SEED,
        evaluation=fd.Evaluation(every=row.every, stop_at={"accuracy": TARGET[row.model]}),
        settings=fd.Settings(executor=fd.executors.by_name(options.executor), folder=there, progress=not options.quiet),
    )  # fmt: skip


def train(row: Row, clients: fd.Clients, options: argparse.Namespace) -> None:
    """Short runs of every learning rate, then the best one to the end."""
    limit = row.rounds if options.rounds is None else options.rounds
    tried = {lr: run(row, clients, lr, min(row.tune, limit), options) for lr in row.rates}
    lr = max(tried, key=lambda rate: best(tried[rate], row.tune))
    print(f"{row.name}: learning rate {lr:g} is best after {min(row.tune, limit)} rounds", flush=True)
    print(f"{row.name}: {run(row, clients, lr, limit, options)}", flush=True)


def report(row: Row, clients: fd.Clients, options: argparse.Namespace) -> dict[str, Any] | None:
    """What the run folders of a row hold; None if there is nothing. Trains nothing."""
    there = [lr for lr in row.rates if (folder(row, lr) / "run.json").exists()]
    runs = {lr: run(row, clients, lr, 0, options) for lr in there}
    short = {lr: best(r, row.tune) for lr, r in runs.items() if r.final}
    if not short:
        return None
    lr = max(short, key=lambda rate: short[rate])
    done = runs[lr]
    curve = [[m["round"], round(m["central"]["accuracy"], 4)] for m in done.metrics if "central" in m]
    return {
        "row": row.name,
        "lr": lr,
        "tuning": {"rounds": row.tune, "best_accuracy": {f"{r:g}": round(a, 4) for r, a in short.items()}},
        "rounds_to_target": done.rounds_to("accuracy", TARGET[row.model]),
        "published": row.published,
        "rounds_run": len(done.metrics),
        "best_accuracy": best(done, len(done.metrics)),
        "curve": thinned(curve),
    }


def best(run: fd.Run, rounds: int) -> float:
    """The best test accuracy within the first rounds."""
    return max((m["central"]["accuracy"] for m in run.metrics[:rounds] if "central" in m), default=0.0)


def thinned(curve: list[list[float]], points: int = 200) -> list[list[float]]:
    """At most about so many points of a curve, the last one kept."""
    step = max(1, len(curve) // points)
    return curve[::-1][::step][::-1]


def lines(found: list[dict[str, Any]]) -> list[list[Any]]:
    """The table's rows, with ratios to FedSGD where that was reached."""
    reached = {f["row"]: f["rounds_to_target"] for f in found}
    rows = []
    for f in found:
        kind = " ".join(f["row"].split()[:2])
        base, mine, theirs = reached.get(f"{kind} FedSGD"), f["rounds_to_target"], PUBLISHED_FEDSGD[kind]
        note = "" if mine else f"partial: {f['best_accuracy']:.2%} after {f['rounds_run']} rounds"
        ratio = f"{base / mine:.1f}×" if base and mine else None
        rows.append([f["row"], f["lr"], mine, f["published"], ratio, f"{theirs / f['published']:.1f}×", note])
    return rows


def unrun(rows: list[Row]) -> list[list[Any]]:
    """Rows of the paper that nothing has been computed of."""
    bases = [PUBLISHED_FEDSGD[f"{row.model} {row.split}"] for row in rows]
    return [
        [row.name, None, None, row.published, None, f"{base / row.published:.1f}×", "not run"]
        for row, base in zip(rows, bases, strict=True)
    ]


def draw(found: list[dict[str, Any]]) -> None:
    """Best accuracy so far over rounds, one panel per model; dots mark the published rounds to the target."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, (model, target) in zip(axes, TARGET.items(), strict=True):
        for f in (f for f in found if f["row"].startswith(model)):
            rounds, accuracy = np.array(f["curve"]).T
            (line,) = axis.plot(rounds, np.maximum.accumulate(accuracy), label=f["row"][len(model) + 1 :])
            axis.plot(f["published"], target, "o", color=line.get_color(), clip_on=False)
        axis.axhline(target, color="0.6", lw=0.8)
        axis.set(xscale="log", ylim=(target - 0.09, min(1.0, target + 0.01)), xlabel="communication round")
        axis.set(
            ylabel="test accuracy (best so far)",
            title=f"{model.upper()} to {target:.0%}; dots: McMahan et al.",
        )
        if axis.lines[:-1]:
            axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(figure_path("mcmahan_mnist"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='rows whose name holds this, e.g. "cnn iid"')
    parser.add_argument("--rounds", type=int, help="at most so many rounds a run; 0 reports what there is")
    parser.add_argument("--executor", default="auto", help="auto, debug, processes, ...")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    data = fd.data.mnist()
    deals = {name: data.partition(rule, seed=SEED) for name, rule in SPLITS.items()}
    for row in ROWS:
        if options.rounds != 0 and wanted(row.name, options.only):
            train(row, deals[row.split], options)
    kept = {f["row"]: f for f in stored("mcmahan_mnist").get("rows", [])}
    found = [f for row in ROWS if (f := report(row, deals[row.split], options) or kept.get(row.name))]
    header = ("row", "learning rate", "rounds here", "published", "× FedSGD here", "× FedSGD published", "")
    missing = [row for row in ROWS if row.name not in {f["row"] for f in found}]
    document("mcmahan", table(header, [*lines(found), *unrun(missing)]))
    store("mcmahan_mnist", {"clients": CLIENTS, "cohort": COHORT, "seed": SEED, "target": TARGET, "rows": found})
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
