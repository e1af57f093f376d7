"""The next character of Shakespeare, every speaking role a client: McMahan et al., AISTATS 2017 (arXiv 1602.05629).

Their character LSTM: an embedding of 8, two layers of 256, unrolled over 80 characters; 824,425 parameters with the 97
characters here. FedAvg with one epoch on batches of 10 beside FedSGD; *roles*: each of 1,229 roles is a client, as in
the paper's non-IID column; *IID*: the same windows dealt out evenly. 10 clients a round (Reddi et al. 2021 take as
many; McMahan et al. a tenth of all). Accuracy is measured on the same ``TESTED`` windows of held-out lines.

The learning rate is the better of two after ``TUNE`` rounds of the roles, and the same for IID; the tuning runs are the
beginnings of the full ones. The paper's rows take hundreds to thousands of rounds to 54 %; here they are cut off after
minutes of CPU, and the table says after how many rounds.

    python experiments/shakespeare.py                  # about ten minutes of one core
    python experiments/shakespeare.py --longer 4       # four times as many rounds; goes on from what there is
    python experiments/shakespeare.py --longer 0       # no training: table and figure of what there is
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd

COHORT, SEED, TARGET, TUNE, EVERY, TESTED = 10, 0, 0.54, 8, 4, 320
LEVELS = (0.2, 0.3, 0.4)  # accuracies on the way; 0.16 is that of always saying the blank


class Row(NamedTuple):
    """A cell of the paper's table 2 and how far it is run here; ``batch=None`` is FedSGD."""

    split: str
    batch: int | None
    published: int
    rounds: int
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.split} {'FedSGD' if self.batch is None else f'E=1 B={self.batch}'}"


ROWS = (
    Row("roles", 10, 164, 160, (0.7, 1.4)),
    Row("roles", None, 3906, 48, (1.4, 2.8)),
    Row("IID", 10, 460, 80, (1.4,)),
    Row("IID", None, 2488, 24, (1.4,)),
)


class Characters(nn.Module):
    """Characters [B, T] -> scores of the ones that follow [B, class, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.out = nn.Linear(256, 97)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.out(self.lstm(self.embed(x))[0])
        return scores.transpose(1, 2)


TASK = fd.Task(Characters, nn.functional.cross_entropy, metrics=[fd.accuracy])


def populations() -> dict[str, fd.Clients]:
    """The roles, and the same windows dealt out evenly; both with the same part of the test windows."""
    data = fd.data.shakespeare()
    assert data.test is not None
    rows = np.sort(np.random.default_rng(SEED).choice(len(data.test), TESTED, replace=False))
    roles = data.clients()
    even = data.partition(fd.data.iid(len(roles)), seed=SEED)
    return {name: c.with_test(data.test.take(rows)) for name, c in (("roles", roles), ("IID", even))}


def run(row: Row, clients: fd.Clients, lr: float, rounds: int) -> fd.Run:
    """One run of a row at one learning rate; an unfinished one goes on, and one of more rounds stays as it is."""
    folder = run_folder("shakespeare", f"{row.name} lr={lr:g}")
    there = len(fd.read_run(folder).metrics) if (folder / "run.json").exists() else 0
    algorithm = fd.fedsgd(lr=lr) if row.batch is None else fd.fedavg(fd.local_sgd(lr, epochs=1, batch_size=row.batch))
    return fd.simulate(
        TASK, algorithm, clients, cohort=COHORT, rounds=max(rounds, there), seed=SEED,
        evaluation=fd.Evaluation(every=EVERY),
        settings=fd.Settings(executor=fd.executors.debug(), folder=folder, progress=False),
    )  # fmt: skip


def measure(row: Row, clients: fd.Clients, longer: float) -> dict[str, Any]:
    """Short runs of every learning rate, then the best one to the end."""
    tried = {lr: [m for m in central(run(row, clients, lr, TUNE)) if m["round"] <= TUNE] for lr in row.rates}
    lr = min(tried, key=lambda rate: tried[rate][-1]["loss"])  # accuracy is that of the blank for some rounds
    curve = central(run(row, clients, lr, max(TUNE, round(longer * row.rounds))))
    found = {
        "row": row.name,
        "lr": lr,
        "tuning": {f"{r:g}": round(m[-1]["loss"], 4) for r, m in tried.items()},
        "published": row.published,
        "rounds": curve[-1]["round"],
        "curve": [[m["round"], round(m["accuracy"], 4), round(m["loss"], 4)] for m in curve],
    }
    print(json.dumps(found), flush=True)
    return found


def central(run: fd.Run) -> list[dict[str, float]]:
    return [{"round": m["round"], **m["central"]} for m in run.metrics if "central" in m]


def reached(found: dict[str, Any], target: float) -> float | None:
    """Rounds to a target, of the curve made monotone and interpolated."""
    rounds, accuracy, _ = np.array(found["curve"]).T
    best = np.maximum.accumulate(accuracy)
    if best[-1] < target:
        return None
    at = int(np.argmax(best >= target))
    if at == 0:
        return float(rounds[0])
    return float(np.interp(target, best[at - 1 : at + 1], rounds[at - 1 : at + 1]))


def lines(found: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for f in found:
        there = [reached(f, level) for level in (*LEVELS, TARGET)]
        rows.append([f["row"], f["lr"], f["rounds"], f"{best_of(f):.1%}", *there, f["published"]])
    return rows


def best_of(f: dict[str, Any]) -> float:
    return float(max(a for _, a, _ in f["curve"]))


def draw(found: list[dict[str, Any]]) -> None:
    """Best accuracy so far over rounds; dots mark the published rounds to the target."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for f in found:
        rounds, accuracy, _ = np.array(f["curve"]).T
        (line,) = axis.plot(rounds, np.maximum.accumulate(accuracy), label=f["row"])
        axis.plot(f["published"], TARGET, "o", color=line.get_color(), clip_on=False)
    axis.axhline(TARGET, color="0.6", lw=0.8)
    axis.set(xscale="log", xlabel="communication round", ylabel="test accuracy (best so far)")
    axis.set(title=f"Shakespeare LSTM, cut off; dots: rounds to {TARGET:.0%} of McMahan et al.", ylim=(0.1, 0.58))
    axis.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(figure_path("shakespeare"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='rows whose name holds this, e.g. "roles"')
    parser.add_argument("--longer", type=float, default=1.0, help="so many times the rounds; 0 trains nothing")
    options = parser.parse_args()
    kept = {f["row"]: f for f in stored("shakespeare").get("rows", [])}
    deals = populations() if options.longer else {}
    for row in ROWS if options.longer else ():
        if wanted(row.name, options.only):
            kept[row.name] = measure(row, deals[row.split], options.longer)
    found = [kept[row.name] for row in ROWS if row.name in kept]
    levels = [f"rounds to {level:.0%}" for level in (*LEVELS, TARGET)]
    header = ("row", "learning rate", "rounds run", "best accuracy", *levels, "published")
    document("shakespeare", table(header, lines(found)))
    store("shakespeare", {"cohort": COHORT, "seed": SEED, "target": TARGET, "tune_rounds": TUNE, "rows": found})
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
