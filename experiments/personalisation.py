"""Models of each client's own, beside the global one: who gains, who loses?

Three data sets whose clients differ by nature, and are tested on their own examples:

* *heart*: four hospitals, diagnosis, a network of 16 hidden units; accuracy over 5 splits;
* *turbofan*: the four fleets FD001 to FD004, cycles left of an engine, a small convolutional network; RMSE in cycles;
* *shakespeare*: 16 speaking roles, the next character from the last 6, one layer of 64 units; accuracy.

Ways to a model: the global one of federated averaging; *alone* (trained on one's own examples only); fine-tuning, also
at a fifth of the learning rate; FedPer and FedRep (the last layer stays at home); FedBN (normalisation stays at home);
Ditto; pFedMe; IFCA with two clusters. Networks have no normalisation but for FedBN, beside which stands a global model
with batch norms. All clients take part in every round and the learning rate of local training is the same for all ways;
what a way has of its own was set beforehand (``ARMS``) and not tuned.

    python experiments/personalisation.py --only heart        # a minute
    python experiments/personalisation.py                     # about ten minutes of one core
    python experiments/personalisation.py --report            # no training: tables and figure of what there is
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import heart_disease
import numpy as np
import torch
import turbofan
from outcome import document, figure_path, run_folder, store, stored, table, wanted
from torch import nn

import foedus as fd

TEST, STRIDE, ROLES = 0.3, 25, (60, 120, 16)  # a role's windows, at least and at most, and how many roles
SEEN, CENTRE = 6, 20  # characters; cycles between those that means and deviations are taken of


class Problem(NamedTuple):
    """Data, model and training: ``model(norms)``, ``clients(seed)``; figures are multiplied by ``unit`` in tables."""

    model: Callable[[bool], nn.Module]
    loss: Callable[[Any, Any], Any]
    metric: fd.Metric
    clients: Callable[[int], fd.Clients]
    lr: float
    batch: int
    rounds: int
    seeds: int
    steps: int  # of each of pFedMe's four local rounds
    unit: float = 1.0


def two_parts(body: nn.Module, head: nn.Module) -> nn.Module:
    """A model whose last layer has a name."""
    return nn.Sequential(OrderedDict(body=body, head=head))


def norm(width: int, norms: bool) -> nn.Module:
    return nn.BatchNorm1d(width) if norms else nn.Identity()


def diagnosis(norms: bool) -> nn.Module:
    return two_parts(nn.Sequential(nn.Linear(heart_disease.INPUTS, 16), norm(16, norms), nn.ReLU()), nn.Linear(16, 1))


class Prognosis(nn.Module):
    """Windows of sensors [B, cycle, column] -> cycles left [B]."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(24, 32, 5, padding=2), norm(32, norms), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(32, 32, 5, padding=2), norm(32, norms), nn.ReLU(), nn.MaxPool1d(2),
            nn.Flatten(), nn.Linear(32 * (turbofan.WINDOW // 4), 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left: torch.Tensor = turbofan.CAP * self.head(self.body(x.transpose(1, 2))).squeeze(1)
        return left


class Characters(nn.Module):
    """Characters [B, T] -> scores of the ones that follow [B, class, T], from the last ``SEEN``; there are no norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.body = nn.Conv1d(16, 64, SEEN)
        self.head = nn.Conv1d(64, 97, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = nn.functional.pad(self.embed(x).transpose(1, 2), (SEEN - 1, 0))
        scores: torch.Tensor = self.head(torch.relu(self.body(before)))
        return scores


@cache
def hospitals(seed: int) -> fd.Clients:
    """Four hospitals with 30 % of their patients for testing, filled in and scaled by common means."""
    spread = heart_disease.spread(fd.data.heart_disease())
    return heart_disease.prepared(spread.split(validation=0, test=TEST, seed=seed))


@cache
def fleets(seed: int) -> fd.Clients:
    """A client for each sub-set: windows of its training engines; tested on the last windows of its test engines."""
    cycles = {k: fd.data.turbofan(k, window=1, stride=CENTRE).train for k in (1, 2, 3, 4)}
    scale = fd.data.federated_scaling(fd.Clients.of(cycles), regime=fd.data.turbofan_condition, regimes=6)
    data = {
        k: fd.data.turbofan(k, window=turbofan.WINDOW, cap=turbofan.CAP, stride=STRIDE, cap_test=True) for k in cycles
    }
    train = {f"FD00{k}": scale.apply(d.train) for k, d in data.items()}
    return fd.Clients.of(train, test={f"FD00{k}": scale.apply(d.test) for k, d in data.items() if d.test})


@cache
def roles(seed: int) -> fd.Clients:
    """Some roles of middling length."""
    least, most, number = ROLES
    everybody = fd.data.shakespeare().clients()
    sizes = np.asarray(everybody.sizes)
    fitting = np.flatnonzero((sizes >= least) & (sizes <= most))
    picked = np.random.default_rng(seed).choice(fitting, number, replace=False)
    return everybody.with_test(None).subset(np.sort(picked))


PROBLEMS = {
    "heart": Problem(
        diagnosis, heart_disease.loss, fd.accuracy, hospitals, 0.05, 16, rounds=40, seeds=5, steps=3, unit=100
    ),
    "turbofan": Problem(Prognosis, turbofan.loss, fd.rmse, fleets, 0.05, 32, rounds=30, seeds=1, steps=12),
    "shakespeare": Problem(
        lambda norms: Characters(),
        nn.functional.cross_entropy,
        fd.accuracy,
        roles,
        0.5,
        10,
        rounds=30,
        seeds=1,
        steps=3,
        unit=100,
    ),
}


class Arm(NamedTuple):
    """A way to models of one's own, and whether the network normalises its layers."""

    personal: Callable[[Problem], Any]
    norms: bool = False


# What differs by problem is the strength of the pull, which goes with the learning rate.
ARMS = {
    "global": Arm(lambda p: None),
    "alone": Arm(lambda p: fd.ditto(0.0)),
    "fine-tuned": Arm(lambda p: fd.fine_tune(epochs=1)),
    "fine-tuned gently": Arm(lambda p: fd.fine_tune(fd.local_sgd(p.lr / 5, epochs=1, batch_size=p.batch))),
    "FedPer": Arm(lambda p: fd.local_parts("head")),
    "FedRep": Arm(lambda p: fd.fedrep("head", epochs=1)),
    "Ditto": Arm(lambda p: fd.ditto(0.05 / p.lr)),
    "pFedMe": Arm(lambda p: fd.pfedme(0.1 / p.lr, rounds=4, steps=p.steps, lr=5 * p.lr)),
    "IFCA": Arm(lambda p: fd.ifca(2)),
    "global, batch norms": Arm(lambda p: None, norms=True),
    "FedBN": Arm(lambda p: fd.fedbn(), norms=True),
}


def measure(name: str, arm: str, seed: int) -> dict[str, list[float]]:
    """Each client's figure with the model of its own, and with the run's global one: [client]."""
    problem, (personal, norms) = PROBLEMS[name], ARMS[arm]
    task = fd.Task(lambda: problem.model(norms), problem.loss, metrics=[problem.metric])
    client = fd.local_sgd(lr=problem.lr, epochs=1, batch_size=problem.batch)
    run = fd.simulate(
        task, fd.fedavg(client, personal=personal(problem)), problem.clients(seed), rounds=problem.rounds,
        seed=seed, evaluation=fd.Evaluation(every=problem.rounds, clients=True),
        settings=fd.Settings(
            executor=fd.executors.debug(), folder=run_folder("personalisation", name, f"{arm} {seed}"), progress=False
        ),
    )  # fmt: skip
    found = run.final_clients.values()
    shared = [each[problem.metric.name] for each in found]
    own = [each.get("personal", each)[problem.metric.name] for each in found]
    print(f"{name} {arm} {seed}: {np.mean(own):.4f}, global {np.mean(shared):.4f}", flush=True)
    return {"own": np.round(own, 5).tolist(), "shared": np.round(shared, 5).tolist()}


def fits(name: str, arm: str) -> bool:
    return name != "shakespeare" or not ARMS[arm].norms  # that network has none


def train(name: str) -> dict[str, Any]:
    """Every way on every split."""
    seeds = range(PROBLEMS[name].seeds)
    arms = {arm: [measure(name, arm, seed) for seed in seeds] for arm in ARMS if fits(name, arm)}
    ids = [str(i) for i in PROBLEMS[name].clients(0).ids]
    return {"clients": ids, "own": {arm: [m["own"] for m in found] for arm, found in arms.items()}}  # [seed][client]


def lines(name: str, found: dict[str, Any]) -> list[list[Any]]:
    """For each way: mean and worst decile over clients, and how many are better off than with the global model."""
    problem = PROBLEMS[name]
    best = problem.metric.better
    rows = []
    for arm, own in found["own"].items():
        values, base = problem.unit * np.array(own), problem.unit * np.array(found["own"]["global"])  # [seed, client]
        gain = (values - base).mean(axis=0) * (1 if best is max else -1)
        text = [told(values.mean(axis=1)), told(worst(values, best))]
        better = None if arm == "global" else f"{int((gain > 0).sum())} of {len(gain)}"
        rows.append([arm, *text, better, *(f"{v:.1f}" for v in values.mean(axis=0)[:4] if name != "shakespeare")])
    return rows


def worst(values: np.ndarray, best: Any) -> np.ndarray:
    """The mean of the worst tenth of the clients, at least one: [seed, client] -> [seed]."""
    ranked = np.sort(values, axis=1) if best is max else -np.sort(-values, axis=1)
    number = max(1, int(np.ceil(0.1 * values.shape[1])))
    return np.asarray(ranked[:, :number].mean(axis=1))


def told(values: np.ndarray) -> str:
    """Mean and spread over splits [split]."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def draw(found: dict[str, Any]) -> None:
    """Each client's figure under each way: dots; their mean: a bar."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    titles = {"heart": "Heart disease, accuracy, %", "turbofan": "Turbofan, RMSE, cycles",
              "shakespeare": "Shakespeare, accuracy, %"}  # fmt: skip
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        arms = found.get(name, {}).get("own", {})
        for at, own in enumerate(arms.values()):
            values = PROBLEMS[name].unit * np.mean(own, axis=0)
            axis.plot(values, np.full(len(values), at), "o", ms=4, alpha=0.6, color="C0")
            axis.plot([values.mean()] * 2, [at - 0.3, at + 0.3], "k", lw=1.6)
        if "global" in arms:
            axis.axvline(PROBLEMS[name].unit * np.mean(arms["global"]), color="0.7", lw=0.8)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set(title=title)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(figure_path("personalisation"), dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help=f"some of {', '.join(PROBLEMS)}")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    found: dict[str, Any] = stored("personalisation").get("found", {})
    for name in (n for n in PROBLEMS if wanted(n, options.only) and not options.report):
        found[name] = train(name)
        store("personalisation", {"found": found})
    about = {n: {"lr": p.lr, "batch": p.batch, "rounds": p.rounds, "seeds": p.seeds} for n, p in PROBLEMS.items()}
    store("personalisation", {"problems": about, "found": found})
    for name, each in found.items():
        places = each["clients"] if name != "shakespeare" else []
        header = ("model", "mean over clients", "worst decile", "better off than with global", *places)
        document("personalisation", table(header, lines(name, each)), mark=name)
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
