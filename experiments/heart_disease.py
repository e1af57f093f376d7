"""Heart disease in four hospitals: does federation help, and whom?

920 patients of Cleveland, Budapest (hungarian), Zurich and Basel (switzerland) and Long Beach (va), 13 columns, a
diagnosis. Each hospital keeps 30 % of its patients for testing. Four ways to a model for each hospital:

* *local*: trained on its own patients only, filled in and scaled by its own means;
* *federated*: one model for all by federated averaging; means and deviations are federated too (sums only);
* *federated, own scaling*: the same, but each hospital fills in and scales by its own statistics;
* *pooled*: all patients in one place, which hospitals cannot do; the yardstick.

The measure is the area under the ROC curve on each hospital's own test patients (the chance that a sick one
scores above a healthy one), over repeated splits. Intervals are corrected for the overlap of the splits (Nadeau
and Bengio, "Inference for the generalization error", 2003): a plain interval over splits would be too narrow.

    python experiments/heart_disease.py                        # about five minutes
    python experiments/heart_disease.py --only logistic --splits 5

Data: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano, Heart Disease, UCI, 1988.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import document, figure_path, run_folder, store, table, wanted
from torch import nn

import foedus as fd

TEST, SPLITS = 0.3, 20
T_95 = 2.093  # Student's t for 95 % and 19 degrees of freedom
CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "slope": (1, 2, 3), "thal": (3, 6, 7)}
INPUTS = 13 - len(CATEGORIES) + sum(len(values) for values in CATEGORIES.values())
ROUNDS, BATCH = 60, 16
TITLES = {"logistic": "Logistic regression", "mlp": "Network of 16 hidden units"}


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    lr: float
    weight_decay: float


MODELS = {
    "logistic": Model(lambda: nn.Linear(INPUTS, 1), lr=0.05, weight_decay=0.01),
    "mlp": Model(lambda: nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 1)), lr=0.05, weight_decay=0.01),
}


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.reshape(target.shape), target.to(output.dtype))


def spread(data: fd.data.Dataset) -> fd.Clients:
    """One client per hospital; categories to one column each, where a missing one is 0 in all of them."""
    numbers = {data.columns.index(name): values for name, values in CATEGORIES.items()}
    return data.clients().map(fd.data.one_hot(numbers).apply)


def prepared(clients: fd.Clients) -> fd.Clients:
    """Missing values filled in by the mean over all hospitals, then scaled, from sums of statistics only."""
    filled = clients.map(fd.data.federated_mean_filling(clients).apply)
    return filled.map(fd.data.federated_scaling(filled).apply)


def prepared_alone(clients: fd.Clients) -> fd.Clients:
    """The same within each hospital."""
    return clients.map_fitted(fd.data.own_mean_filling()).map_fitted(fd.data.own_scaling())


def pooled(clients: fd.Clients) -> fd.Clients:
    return fd.Clients.of({"everybody": clients.pooled_examples()})


def fit(name: str, clients: fd.Clients, who: str, split: int) -> nn.Module:
    """Train one model; all ways get the same number of passes over the data they have."""
    model = MODELS[name]
    client = fd.local_sgd(lr=model.lr, epochs=1, batch_size=BATCH, weight_decay=model.weight_decay)
    run = fd.simulate(
        fd.Task(model.make, loss, metrics=[fd.auroc]), fd.fedavg(client), clients, rounds=ROUNDS, seed=split,
        evaluation=fd.Evaluation(every=0),
        settings=fd.Settings(
            executor=fd.executors.debug(), folder=run_folder("heart", name, f"{who} {split}"), progress=False
        ),
    )  # fmt: skip
    model: nn.Module = run.model
    return model


def score(model: nn.Module, examples: fd.Examples | None) -> float:
    """AUROC; NaN if only one class is there."""
    assert examples is not None
    with torch.no_grad():
        output = model(torch.from_numpy(examples.inputs[0])).numpy()
    return float(fd.auroc.value(output, examples.targets))


def one_split(name: str, hospitals: fd.Clients, split: int) -> dict[str, list[float]]:
    """AUROC on each hospital's test patients, for each way."""
    clients = hospitals.split(validation=0, test=TEST, seed=split)
    together, alone = prepared(clients), prepared_alone(clients)
    shared = fit(name, together, "federated", split)
    mixed = fit(name, alone, "federated own scaling", split)
    central = fit(name, pooled(together), "pooled", split)
    own = [fit(name, alone.subset([i]), f"local {alone.ids[i]}", split) for i in range(len(alone))]
    places = range(len(clients))
    return {
        "local": [score(own[i], alone.test(i)) for i in places],
        "federated": [score(shared, together.test(i)) for i in places],
        "federated, own scaling": [score(mixed, alone.test(i)) for i in places],
        "pooled": [score(central, together.test(i)) for i in places],
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over splits [split] and the half-width of its corrected 95 % interval."""
    known = values[~np.isnan(values)]
    width = T_95 * np.sqrt((1 / len(known) + TEST / (1 - TEST)) * known.var(ddof=1))
    return {"mean": round(float(known.mean()), 4), "half_width": round(float(width), 4), "splits": len(known)}


def summary(scores: dict[str, np.ndarray], ids: Any) -> dict[str, Any]:
    """Per way and hospital, and the paired gains of federating; ``scores``: [split, hospital] for each way."""
    scores = scores | {
        "federated - local": scores["federated"] - scores["local"],
        "federated, own scaling - local": scores["federated, own scaling"] - scores["local"],
        "federated - pooled": scores["federated"] - scores["pooled"],
    }
    places = [*ids, "mean over hospitals"]
    columns = {way: np.column_stack([s, s.mean(axis=1)]) for way, s in scores.items()}
    return {way: {p: interval(c[:, i]) for i, p in enumerate(places)} for way, c in columns.items()}


def tables(found: dict[str, Any]) -> str:
    """A table per model: ways by hospitals."""
    texts = []
    for name, ways in found.items():
        places = list(next(iter(ways.values())))
        rows = [[way.replace(" - ", " − "), *(cell(way, values[p]) for p in places)] for way, values in ways.items()]
        texts.append(f"{TITLES[name]}:\n\n{table(['', *places], rows)}")
    return "\n\n".join(texts)


def cell(way: str, value: dict[str, float]) -> str:
    sign = "+" if " - " in way else ""
    return f"{value['mean']:{sign}.3f} ± {value['half_width']:.3f}".replace("-", "−")


def draw(found: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(11, 4), sharey=True, squeeze=False)
    for axis, (name, ways) in zip(axes[0], found.items(), strict=True):
        for i, way in enumerate(("local", "federated", "federated, own scaling", "pooled")):
            values = list(ways[way].values())
            at = np.arange(len(values)) + 0.18 * (i - 1.5)
            means, widths = ([v[key] for v in values] for key in ("mean", "half_width"))
            axis.errorbar(at, means, widths, fmt="o", capsize=3, label=way, color=("C1", "C2", "C8", "C0")[i])
        axis.set_xticks(range(len(values)), [p.replace(" over ", "\nover ") for p in ways["local"]])
        axis.set(title=name, ylabel="AUROC on the hospital's test patients", ylim=(None, 1.0))
        axis.axhline(0.5, color="0.7", lw=0.8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(figure_path("heart_disease"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="logistic or mlp")
    parser.add_argument("--splits", type=int, default=SPLITS, help="repetitions with another split and other weights")
    options = parser.parse_args()
    data = fd.data.heart_disease()
    hospitals, found = spread(data), {}
    for name in (n for n in MODELS if wanted(n, options.only)):
        splits = [one_split(name, hospitals, split) for split in range(options.splits)]
        found[name] = summary({way: np.array([s[way] for s in splits]) for way in splits[0]}, hospitals.ids)
    about = {"rounds": ROUNDS, "batch": BATCH, "test": TEST, "splits": options.splits, "measure": "AUROC"}
    about |= {"models": {n: {"lr": m.lr, "weight_decay": m.weight_decay} for n, m in MODELS.items()}}
    if not options.only and options.splits == SPLITS:
        store("heart_disease", about | {"found": found})
        draw(found)
        document("heart", tables(found))
    else:
        print(tables(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
