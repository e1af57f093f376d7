"""Remaining useful life of NASA's turbofan engines, each engine a client: RMSE and NASA's score.

Training engines run to failure; test engines stop earlier, and the model sees their last 30 cycles. Remaining
life is capped at 125 cycles in training (Heimes 2008); errors on the test engines are given with NASA's figures
capped at 125 as well (as the published ones mostly are), and uncapped. NASA's score adds up ``exp(d/10) - 1`` for
a prediction ``d`` cycles too late and ``exp(-d/13) - 1`` for one too early (Saxena et al. 2008); lower is better.

Per sub-set FD001 to FD004:

* *federated*: federated averaging over the engines with momentum on the server; sensors are scaled by federated
  means and deviations, for each of the six operating conditions by itself (FD001 and FD003 have only one);
* *federated, one scale*: FD002 and FD004 scaled without regard to the condition, to show what that costs;
* *federated, 300 rounds*: FD002 and FD004 have more than twice as many engines, of which a round sees 20;
* *pooled*: the same network on all windows in one place, stopped after the passes that suit it;
* *one engine*: trained on a single engine; ten of them, the mean of their errors.

Fleets, in pairs: one federation over both, tested on each by itself. FD001 and FD002 fail in one way (compressor),
FD003 and FD004 in two (compressor, fan); so in the pairs 1+2 and 3+4 the faults are alike and the conditions differ,
in 1+3 and 2+4 the conditions are alike and the faults differ.

Settings were chosen on FD001 with 20 training engines held out, never on the test engines.

    python experiments/turbofan.py --only FD001        # a few minutes
    python experiments/turbofan.py                     # about an hour
    python experiments/turbofan.py --report            # no training: table and figure of what there is

Data: A. Saxena, K. Goebel, D. Simon, N. Eklund, C-MAPSS, PHM 2008.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, table, wanted
from torch import nn

import foedus as fd

WINDOW, CAP = 30, 125
ROUNDS, COHORT, BATCH, LR, SERVER = 120, 20, 32, 0.05, fd.momentum(1.0, beta=0.9)
POOLED = {"rounds": 5, "batch": 128}
ALONE = {"rounds": 20, "engines": 10}
LENGTHS = {"pooled": POOLED["rounds"], "one engine": ALONE["rounds"], "federated, 300 rounds": 300}
SUBSETS = ("FD001", "FD002", "FD003", "FD004")
PUBLISHED = {  # centralised: RMSE, and NASA's score where it is told; Zheng's and Babu's as later papers quote them
    "CNN, Babu et al. 2016": {
        "FD001": (18.45, 1290), "FD002": (30.29, 13600), "FD003": (19.82, 1600), "FD004": (29.16, 7890),
    },
    "LSTM, Zheng et al. 2017": {
        "FD001": (16.14, 338), "FD002": (24.49, 4450), "FD003": (16.18, 852), "FD004": (28.17, 5550),
    },
    "LSTM of one layer, arXiv 2604.27234": {"FD001": (14.93, None), "FD003": (14.20, None)},
    "CNN, arXiv 2604.27234": {"FD001": (16.97, None), "FD003": (15.68, None)},
    "XGBoost on engineered features, arXiv 2604.27234": {"FD003": (13.36, None)},
}  # fmt: skip


class Job(NamedTuple):
    """One way to train, for the sub-sets ``train``; tested on each of them."""

    way: str
    train: tuple[int, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{'+'.join(f'FD00{k}' for k in self.train)} {self.way}"


JOBS = (
    *(Job("federated", (k,), seed) for seed in (0, 1, 2) for k in (1, 3)),
    *(Job("pooled", (k,), seed) for seed in (0, 1, 2) for k in (1, 3)),
    *(Job("one engine", (k,), seed) for k in (1, 3) for seed in range(ALONE["engines"])),
    *(Job(way, (k,)) for k in (2, 4) for way in ("federated", "pooled", "federated, one scale")),
    *(Job(way, pair) for pair in ((1, 3), (1, 2), (2, 4), (3, 4)) for way in ("federated", "pooled")),
    *(Job("one engine", (k,), seed) for k in (2, 4) for seed in range(ALONE["engines"])),
    *(Job("federated, 300 rounds", (k,)) for k in (2, 4)),
    *(Job(way, (k,), seed) for seed in (1, 2) for k in (2, 4) for way in ("federated", "pooled")),
)


class Prognosis(nn.Module):
    """Two convolutions over time, each followed by pooling, then two layers; the output is in cycles, [B]."""

    def __init__(self, columns: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(columns, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(32, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
            nn.Flatten(), nn.Linear(32 * (WINDOW // 4), 64), nn.ReLU(), nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = CAP * self.layers(x.transpose(1, 2)).squeeze(1)
        return output


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in units of the cap, so that one learning rate suits."""
    return nn.functional.mse_loss(output / CAP, target / CAP)


TASK = fd.Task(Prognosis, loss, metrics=[fd.rmse])


def falling(rounds: int) -> Any:
    """The learning rate of a round: constant for the first half, then down to a tenth in a straight line."""

    def rate(round: int) -> float:
        return LR * min(1.0, 1.0 - 1.8 * (round / rounds - 0.5))

    return rate


@cache
def engines(subset: int, window: int = WINDOW) -> fd.Clients:
    """One client per engine, as measured; the central test holds the last window of each test engine."""
    return fd.data.turbofan(subset, window=window, cap=CAP).clients()


def together(parts: list[fd.Clients]) -> fd.Clients:
    """The clients of several sub-sets in one population."""
    if len(parts) == 1:
        return parts[0]
    named: dict[int | str, Any] = {f"{i}/{c.ids[k]}": c.train(k) for i, c in enumerate(parts) for k in range(len(c))}
    return fd.Clients.of(named)


def scaling(job: Job) -> fd.data.Scaling:
    """Federated means and deviations, every cycle of every engine counted once."""
    cycles = together([engines(k, 1) for k in job.train])
    if job.way == "federated, one scale":
        return fd.data.federated_scaling(cycles)
    return fd.data.federated_scaling(cycles, regime=fd.data.turbofan_condition, regimes=6)


def population(job: Job, scale: fd.data.Scaling) -> fd.Clients:
    clients = together([engines(k) for k in job.train]).with_test(None).map(scale.apply)
    if job.way == "pooled":
        return fd.Clients.of({"everybody": clients.pooled_examples()})
    if job.way == "one engine":  # ten of them, evenly spread over the fleet
        return clients.subset([job.seed * len(clients) // ALONE["engines"]])
    return clients


def train(job: Job, scale: fd.data.Scaling, executor: str) -> nn.Module:
    """Train, or read what was trained before."""
    rounds = LENGTHS.get(job.way, ROUNDS)
    clients, shared = population(job, scale), job.way.startswith("federated")
    client = fd.local_sgd(
        lr=falling(rounds), epochs=1, batch_size=POOLED["batch"] if job.way == "pooled" else BATCH,
        momentum=0.0 if shared else 0.9,
    )  # fmt: skip
    run = fd.simulate(
        TASK, fd.fedavg(client, server=SERVER if shared else None), clients, rounds=rounds, seed=job.seed,
        cohort=COHORT * len(job.train) if shared else None, evaluation=fd.Evaluation(every=0),
        settings=fd.Settings(executor=fd.executors.by_name(executor), folder=folder(job), progress=False),
    )  # fmt: skip
    model: nn.Module = run.model
    return model


def folder(job: Job) -> Any:
    return run_folder("turbofan", f"{job.name} {job.seed}")


def errors(model: nn.Module, subset: int, scale: fd.data.Scaling) -> dict[str, float]:
    """RMSE and NASA's score on the test engines, with NASA's figures capped and as they are."""
    test = engines(subset).central_test
    assert test is not None
    with torch.no_grad():
        predicted = model(torch.from_numpy(scale.apply(test).inputs[0])).numpy().astype(np.float64)
    found = {}
    for name, left in (("capped", np.minimum(test.targets, CAP)), ("uncapped", test.targets)):
        late = predicted - left
        found[f"rmse {name}"] = round(float(np.sqrt(np.mean(late**2))), 3)
        penalty = np.where(late < 0, np.exp(-late / 13), np.exp(late / 10)) - 1
        found[f"score {name}"] = round(float(penalty.sum()), 1)
    return found


def measure(job: Job, executor: str) -> dict[str, dict[str, float]]:
    """The errors of a job on each of its sub-sets; kept beside the run."""
    kept = folder(job) / "errors.json"
    if not kept.exists():
        scale = scaling(job)
        model = train(job, scale, executor)
        kept.write_text(json.dumps({f"FD00{k}": errors(model, k, scale) for k in job.train}))
        print(f"{job.name} {job.seed}: {kept.read_text()}", flush=True)
    found: dict[str, dict[str, float]] = json.loads(kept.read_text())
    return found


def summary(jobs: list[Job]) -> dict[str, Any]:
    """way and tested sub-set -> each error's mean and spread over seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for job in jobs:
        if (folder(job) / "errors.json").exists():
            for subset, values in measure(job, "").items():
                found.setdefault(f"{job.name} | {subset}", []).append(values)
    return {name: {"runs": len(v)} | {k: spread([e[k] for e in v]) for k in v[0]} for name, v in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    figures = {"mean": np.mean(values), "std": np.std(values), "median": np.median(values)}
    return {name: round(float(value), 3) for name, value in figures.items()}


def lines(found: dict[str, Any]) -> list[list[Any]]:
    """The table's rows; scores are medians, since a single bad run can make a mean of them say nothing."""
    rows = []
    for name, values in sorted(found.items(), key=lambda item: item[0].split(" | ")[::-1]):
        trained, tested = name.split(" | ")
        figures = []
        for cap in ("capped", "uncapped"):
            error, score = values[f"rmse {cap}"], values[f"score {cap}"]
            width = f" ± {error['std']:.1f}" if values["runs"] > 1 else ""
            figures += [f"{error['mean']:.1f}{width}", f"{score['median']:,.0f}"]
        rows.append([tested, trained, values["runs"], *figures])
    return rows


def beside(found: dict[str, Any]) -> list[list[Any]]:
    """Published figures and ours, a row per source: RMSE and score for each sub-set."""
    rows = [[f"here, {way}, {cap}", *(ours(found, subset, way, cap) for subset in SUBSETS)]
            for way in ("pooled", "federated") for cap in ("capped", "uncapped")]  # fmt: skip
    theirs = [[source, *(told(figures.get(subset)) for subset in SUBSETS)] for source, figures in PUBLISHED.items()]
    return theirs + rows


def ours(found: dict[str, Any], subset: str, way: str, cap: str) -> str | None:
    values = found.get(f"{subset} {way} | {subset}")
    return None if values is None else told((round(values[f"rmse {cap}"]["mean"], 1), values[f"score {cap}"]["median"]))


def told(figure: tuple[float, float | None] | None) -> str | None:
    """RMSE, and the score where there is one."""
    if figure is None:
        return None
    rmse, score = figure
    return f"{rmse:g}" if score is None else f"{rmse:g} / {score:,.0f}"


def short(name: str, subset: str) -> str:
    """``FD001+FD003 pooled`` tested on FD003 -> ``pooled, with FD001``."""
    trained, way = name.split(" | ")[0].split(" ", 1)
    others = [k for k in trained.split("+") if k != subset]
    return f"{way}, with {others[0]}" if others else way


def draw(found: dict[str, Any]) -> None:
    """RMSE (capped) per sub-set: one bar per way to train; lines mark published centralised figures."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8))
    for axis, subset in zip(axes, SUBSETS, strict=True):
        here = {short(n, subset): v["rmse capped"] for n, v in found.items() if n.endswith(subset)}
        names = sorted(here, key=lambda n: ("with" in n, len(n)), reverse=True)
        means, spreads = [here[n]["mean"] for n in names], [here[n]["std"] for n in names]
        colours = ["C1" if "engine" in n else "C0" if "pooled" in n else "C2" for n in names]
        axis.barh(range(len(names)), means, xerr=spreads, color=colours)
        for figures in PUBLISHED.values():
            if subset in figures:
                axis.axvline(figures[subset][0], color="k", ls=":", lw=0.9)
        axis.set(title=subset, xlabel="RMSE, cycles")
        axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.tight_layout()
    figure.savefig(figure_path("turbofan"), dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='jobs whose name holds this, e.g. "FD001 pooled"')
    parser.add_argument("--seeds", type=int, default=3, help="at most so many seeds (engines, of those alone: ten)")
    parser.add_argument("--executor", default="auto", help="auto, debug, processes, ...")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    for job in (j for j in JOBS if wanted(j.name, options.only) and not options.report):
        if job.way == "one engine" or job.seed < options.seeds:
            measure(job, options.executor)
    found = summary(list(JOBS))
    header = (
        "tested on",
        "trained on",
        "runs",
        "RMSE capped",
        "score capped",
        "RMSE uncapped",
        "score uncapped",
    )
    document("turbofan", table(header, lines(found)))
    document("turbofan", table(("RMSE / NASA's score", *SUBSETS), beside(found)), mark="published")
    about = {"window": WINDOW, "cap": CAP, "rounds": ROUNDS, "cohort": COHORT, "batch": BATCH, "lr": LR}
    store("turbofan", about | {"pooled": POOLED, "alone": ALONE, "published": PUBLISHED, "found": found})
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
