"""Attacks on federated averaging against defences: cohorts of 20 clients of whom exactly 4 attack.

A network of 199,210 parameters learns Fashion-MNIST. The 4 attackers are in every cohort and the other 16 drawn from 96
honest clients, with data dealt evenly at random (IID) or by a Dirichlet draw (alpha 0.5). Rows are attacks,
from none to attackers that know the rule and every honest update; columns are defences. Each cell is the accuracy on
the test set over the last evaluations; where a backdoor is planted, its success as well: the share of marked test
pictures of other classes that the model takes for the attackers' class.

The rate of local training is the same everywhere. Defences that need to know the number of attackers are told it (4);
radii are twice the median norm of the honest updates of the first round, measured once per partition.
FLTrust's server has a client of its own with 100 training pictures that nobody else has, as a 21st in each cohort.

    OPENBLAS_NUM_THREADS=1 python experiments/attack_matrix.py   # hours on two cores; goes on where it was stopped
    python experiments/attack_matrix.py --only "iid sign flip" --rounds 20
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
from foedus.errors import NothingToAggregate

HONEST, ATTACKERS, COHORT = 96, 4, 20
ROUNDS, EVERY, LAST = 40, 5, 3  # rounds; evaluated after each so many; evaluations averaged at the end
RATE, BATCH, EPOCHS = 0.1, 32, 1
ROOT, TARGET, CLASSES = 100, 7, 10  # pictures of FLTrust's client; the backdoor's class; classes
BAD = range(ATTACKERS)  # positions: attackers first, then the honest ones, then FLTrust's client
TRUSTED = ATTACKERS + HONEST
TRIGGER = fd.poison.patch(1.0, size=4)

PARTITIONS: dict[str, Callable[[int], Any]] = {
    "IID": lambda clients: fd.data.iid(clients),
    "Dirichlet 0.5": lambda clients: fd.data.dirichlet(clients, alpha=0.5),
}

GUESSING = 0.1  # accuracy


def net() -> nn.Module:
    """784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


TASK = fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


class Case(NamedTuple):
    """An attack: on updates (made from the defence, which adaptive attackers know), on data, or on both."""

    attack: Callable[[Any], Any] | None = None
    poison: Any = None


ATTACKS = {
    "nobody": Case(),
    "NaN": Case(lambda rule: fd.attacks.not_finite()),
    "garbage": Case(lambda rule: fd.attacks.garbage(1.0)),
    "sign flip ×4": Case(lambda rule: fd.attacks.sign_flip(4.0)),
    "noise ×4": Case(lambda rule: fd.attacks.scaled_noise(4.0)),
    "labels flipped": Case(poison=fd.poison.flip_labels(CLASSES)),
    "ALIE": Case(lambda rule: fd.attacks.alie()),
    "inner product": Case(lambda rule: fd.attacks.inner_product(1.5)),
    "min-max": Case(lambda rule: fd.attacks.min_max()),
    "min-sum": Case(lambda rule: fd.attacks.min_sum()),
    "adaptive": Case(lambda rule: fd.attacks.adaptive(rule, fd.attacks.against_mean, steps=16)),
    "backdoor": Case(poison=fd.poison.backdoor(TRIGGER, TARGET, share=0.5)),
    "backdoor ×5": Case(
        lambda rule: fd.attacks.model_replacement(COHORT / ATTACKERS),
        fd.poison.backdoor(TRIGGER, TARGET, share=0.5),
    ),
}

DEFENCES: dict[str, Callable[[float], Any]] = {  # from the radius
    "mean": lambda radius: fd.mean(weighted=False),
    "clipped mean": lambda radius: fd.chain(fd.clip(radius), fd.mean(weighted=False)),
    "median": lambda radius: fd.median(),
    "trimmed mean": lambda radius: fd.trimmed_mean(ATTACKERS / COHORT),
    "RFA": lambda radius: fd.geometric_median(),
    "Krum": lambda radius: fd.krum(ATTACKERS),
    "Multi-Krum": lambda radius: fd.multi_krum(ATTACKERS),
    "Bulyan": lambda radius: fd.bulyan(ATTACKERS),
    "centred clipping": lambda radius: fd.centred_clipping(radius),
    "FLTrust": lambda radius: fd.fltrust(trusted=TRUSTED),
    "DnC": lambda radius: fd.dnc(ATTACKERS),
}


def population(kind: str, seed: int) -> Any:
    """Attackers at positions 0 to 3, then the honest ones, and FLTrust's client at the end."""
    data = fd.data.fashion_mnist()
    pictures, labels = data.train.inputs[0], data.train.targets
    dealt = fd.data.from_arrays(pictures[ROOT:], labels[ROOT:], test=data.test, name="rest")
    clients = dealt.partition(PARTITIONS[kind](HONEST + ATTACKERS), seed=seed)
    parts = {f"attacker {i}": clients.train(i) for i in BAD}
    parts |= {f"client {i}": clients.train(i) for i in range(ATTACKERS, TRUSTED)}
    parts |= {"root": data.train.take(slice(0, ROOT))}
    return fd.Clients.of(parts, central_test=data.test)


def simulate(names: tuple[str, str, str], clients: Any, rule: Any, options: Any) -> fd.Run:
    kind, attack, defence = names
    case, always = ATTACKS[attack], [*BAD]
    if "fltrust" in rule.label:
        always += [TRUSTED]
    else:
        clients = clients.subset(range(TRUSTED))
    adversary = None if case.attack is None else fd.Adversary(clients=BAD, attack=case.attack(rule))
    bad = clients if case.poison is None else clients.poisoned(BAD, case.poison)
    return fd.simulate(
        TASK, fd.fedavg(fd.local_sgd(lr=RATE, epochs=EPOCHS, batch_size=BATCH), aggregator=rule), bad,
        cohort=fd.always(always, fd.uniform(COHORT - ATTACKERS)), rounds=options.rounds, seed=options.seed,
        evaluation=fd.Evaluation(every=EVERY),
        settings=fd.Settings(
            executor=fd.executors.by_name(options.executor), progress=False, adversary=adversary,
            folder=run_folder("attack_matrix", f"{kind} {attack} {defence} {options.rounds} {options.seed}"),
        ),
    )  # fmt: skip


def radius_of(kind: str, clients: Any, options: Any) -> float:
    """Twice the median norm of the updates that the clients of one round make from the first weights."""
    norms: list[float] = []
    spy = fd.collect(lambda c: (norms.extend(float(np.linalg.norm(r)) for r in c.rows), c.rows[0])[1], "norms()")
    honest = clients.subset(range(ATTACKERS, TRUSTED))
    fd.simulate(
        TASK, fd.fedavg(fd.local_sgd(lr=RATE, epochs=EPOCHS, batch_size=BATCH), aggregator=spy), honest, cohort=COHORT,
        rounds=1, seed=options.seed, evaluation=fd.Evaluation(every=0),
        settings=fd.Settings(
            executor=fd.executors.debug(), progress=False, resume=False,
            folder=fresh(run_folder("attack_matrix", f"{kind} radius {options.seed}")),
        ),
    )  # fmt: skip
    return round(2 * float(np.median(norms)), 3)


def fresh(folder: Any) -> Any:
    """A folder that is not there yet: the radius is measured again where it was not stored."""
    number = 0
    while (found := folder.with_name(f"{folder.name} {number}")).exists():
        number += 1
    return found


def success(run: fd.Run) -> float:
    """The share of marked test pictures of other classes that the model takes for the backdoor's."""
    marked = fd.poison.triggered(fd.data.fashion_mnist().test, TRIGGER, TARGET)
    model = run.model.eval()
    with torch.no_grad():
        return float((model(torch.from_numpy(marked.inputs[0])).argmax(1) == TARGET).double().mean())


def cell(names: tuple[str, str, str], clients: Any, rule: Any, options: Any) -> dict[str, Any]:
    try:
        run = simulate(names, clients, rule, options)
    except NothingToAggregate:  # nothing finite is left: as good as guessing
        print(*names, "diverged", flush=True)
        return {"accuracy": GUESSING, "rule": rule.label, "diverged": True}
    seen = [m["central"]["accuracy"] for m in run.metrics if "central" in m][-LAST:]
    found = {"accuracy": round(float(np.mean(seen)), 4), "rule": rule.label, "rounds": len(run.metrics)}
    if ATTACKS[names[1]].poison is not None or names[1] == "nobody":
        found["success"] = round(success(run), 4)
    print(*names, found["accuracy"], found.get("success", ""), flush=True)
    return found


def rows_of(kind: str, found: dict[str, Any], figure: str) -> list[list[Any]]:
    rows = []
    for attack in ATTACKS:
        cells = [found.get(f"{kind} / {attack} / {defence}", {}).get(figure) for defence in DEFENCES]
        if any(c is not None for c in cells):
            rows.append([attack, *(None if c is None else f"{100 * c:.1f}" for c in cells)])
    return rows


def text_of(found: dict[str, Any]) -> str:
    header = ("attack", *DEFENCES)
    parts = []
    for kind in PARTITIONS:
        parts += [f"**{kind}**, accuracy in %:", table(header, rows_of(kind, found, "accuracy"))]
        parts += [
            f"**{kind}**, success of the backdoor in %:",
            table(header, rows_of(kind, found, "success")),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='parts of "partition attack defence"')
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0: no training, the page from what is stored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", default="compiled", help="auto, debug, processes, ...")
    options = parser.parse_args()
    if not options.rounds:
        document("attack_matrix", text_of(stored("attack_matrix")["found"]))
        return
    whole = options.rounds == ROUNDS and options.seed == 0
    kept = stored("attack_matrix") if whole else {}
    found, radii = kept.get("found", {}), kept.get("radii", {})
    for kind in PARTITIONS:
        clients = population(kind, options.seed)
        for attack in ATTACKS:
            for defence, make in DEFENCES.items():
                name = f"{kind} / {attack} / {defence}"
                if name in found or not wanted(f"{kind} {attack} {defence}", options.only):
                    continue
                if kind not in radii:
                    radii[kind] = radius_of(kind, clients, options)
                found[name] = cell((kind, attack, defence), clients, make(radii[kind]), options)
                if whole:
                    about = {
                        "clients": HONEST + ATTACKERS,
                        "cohort": COHORT,
                        "attackers": ATTACKERS,
                        "rounds": ROUNDS,
                    }
                    store("attack_matrix", about | {"rate": RATE, "radii": radii, "found": found})
    if whole and not options.only:
        document("attack_matrix", text_of(found))
    else:
        print(text_of(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
