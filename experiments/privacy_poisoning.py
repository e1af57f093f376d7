"""Poisoned updates and backdoors behind the protections of privacy: does what hides clients also stop liars?

40 clients with 150 digits each learn a network of 25,450 parameters in 20 rounds, all of them in every round; 4 of them
attack. A backdoor is a patch of pixels that is to be taken for a 7, with an update as it comes out, or ten times as
long, so that averaging leaves it whole. Norm clipping and weak noise are what Sun et al. 2019 ("Can you really backdoor
federated learning?") found to help. Masks and encryption are the real ones: keys, shares, masks and ciphertexts in
every round. Behind them nobody sees whether a client keeps the bound; *no bound kept* are attackers who do not.

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_poisoning.py   # three seeds: about half an hour on one core
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from outcome import store, stored, wanted
from torch import nn

import foedus as fd
from foedus.core.gate import check_maskable
from foedus.errors import IncompatibleStages, NothingToAggregate

NAME = "privacy_poisoning"
CLIENTS, EACH, ATTACKERS, ROUNDS, SEEDS = 40, 150, 4, 20, 3
CLIP, DELTA, TARGET, CLASSES = 0.5, 1e-5, 7, 10
BAD = range(ATTACKERS)
TRIGGER = fd.poison.patch(1.0, size=4)
WITHSTAND = fd.Withstand(clients=CLIENTS, corrupt=0.1)
GUESSING = 0.1
SEEING = "a rule that sees updates: trimmed mean"


def net() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


TASK = fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


class Case(NamedTuple):
    """An attack: on updates, on data, or on both."""

    attack: Any = None
    poison: Any = None


HIDDEN = fd.poison.backdoor(TRIGGER, TARGET, share=0.5)
ATTACKS = {
    "nobody": Case(),
    "labels flipped": Case(poison=fd.poison.flip_labels(CLASSES)),
    "ALIE": Case(fd.attacks.alie()),
    "sign flip ×4": Case(fd.attacks.sign_flip(4.0)),
    "backdoor": Case(poison=HIDDEN),
    "backdoor ×10": Case(fd.attacks.model_replacement(CLIENTS / ATTACKERS), HIDDEN),
}


def mean_of(*stages: Any) -> Any:
    return fd.chain(*stages, fd.mean(weighted=False))


def central(noise_multiplier: float) -> Any:
    return fd.privacy.central(clip=CLIP, noise_multiplier=noise_multiplier, cohort=CLIENTS)


def local(noise_multiplier: float) -> Any:
    return mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=noise_multiplier))


def shares(noise_multiplier: float) -> Any:
    """Noise in shares of those who are honest, under masks."""
    honest = CLIENTS - ATTACKERS
    noise = fd.privacy.gaussian_shares(
        clip=CLIP, noise_multiplier=noise_multiplier, cohort=CLIENTS, honest=honest, bits=20
    )
    return fd.chain(noise, fd.masked(WITHSTAND, planned=CLIENTS))


def masked(*stages: Any) -> Any:
    return fd.chain(*stages, fd.masked(WITHSTAND, bits=20))


def encrypted(*stages: Any) -> Any:
    return fd.chain(*stages, fd.encrypted(CLIENTS, key=fd.silo_key()))


def unbounded(rule: Any, bare: Any) -> Any:
    """A rule whose attackers leave out what comes before the sum: behind masks nobody can tell."""

    def encode(update: Any, context: Any) -> Any:
        return (bare if context.client in BAD else rule).encode(update, context)

    return rule._replace(encode=encode)


DEFENCES: dict[str, Callable[[], Any]] = {
    "none": mean_of,
    "clipping": lambda: mean_of(fd.clip(CLIP)),
    "clipping to 0.2": lambda: mean_of(fd.clip(0.2)),
    "top-k, 5 %": lambda: mean_of(fd.top_k(0.05)),
    "2 bits per entry": lambda: mean_of(fd.rotate(), fd.quantise(bits=2)),
    "central noise, z = 0.3": lambda: central(0.3),
    "central noise, z = 1": lambda: central(1.0),
    "central noise, z = 3": lambda: central(3.0),
    "local noise, z = 0.1": lambda: local(0.1),
    "local noise, z = 1": lambda: local(1.0),
    "secure aggregation": lambda: masked(fd.clip(CLIP)),
    "secure aggregation, no bound kept": lambda: unbounded(masked(fd.clip(CLIP)), masked()),
    "secure aggregation, shares of noise, z = 1": lambda: shares(1.0),
    "homomorphic sums": lambda: encrypted(fd.clip(CLIP)),
    SEEING: lambda: fd.trimmed_mean(0.2),
}


def population(seed: int, attack: str) -> Any:
    """Attackers are at positions 0 to 3."""
    data = fd.data.mnist()
    rows = np.random.default_rng(seed).permutation(len(data.train))[: CLIENTS * EACH]
    dealt = fd.data.from_arrays(data.train.inputs[0][rows], data.train.targets[rows], test=data.test, name="digits")
    clients = dealt.partition(fd.data.iid(CLIENTS), seed=seed)
    poison = ATTACKS[attack].poison
    return clients if poison is None else clients.poisoned(BAD, poison)


def trained(rule: Any, attack: str, seed: int, folder: str) -> fd.Run:
    bad = ATTACKS[attack].attack
    return fd.simulate(
        TASK, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=10), aggregator=rule), population(seed, attack), rounds=ROUNDS,
        seed=seed, evaluation=fd.Evaluation(every=ROUNDS),
        settings=fd.Settings(
            folder=folder, progress=False, executor=fd.executors.vectorised(), resume=False,
            cryptography=rule.masking is not None,
            adversary=None if bad is None else fd.Adversary(clients=BAD, attack=bad),
        ),
    )  # fmt: skip


def success(run: fd.Run) -> float:
    """The share of marked test pictures of other classes that the model takes for the backdoor's."""
    marked = fd.poison.triggered(fd.data.mnist().test, TRIGGER, TARGET)
    with torch.no_grad():
        return float((run.model.eval()(torch.from_numpy(marked.inputs[0])).argmax(1) == TARGET).double().mean())


def cell(rule: Any, attack: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = trained(rule, attack, seed, folder)
        except NothingToAggregate:  # nothing finite is left: as good as guessing
            return {"accuracy": GUESSING, "success": 0.0}
        return {"accuracy": round(float(run.final["accuracy"]), 4), "success": round(success(run), 4)}


def refusal() -> str:
    """What foedus says to a rule that compares updates, under masks."""
    try:
        check_maskable(DEFENCES[SEEING]())
    except IncompatibleStages as error:
        return str(error)
    raise AssertionError("a rule that compares updates was let in under masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help='parts of "attack / defence"')
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found, epsilon = stored(NAME).get("found", {}), stored(NAME).get("epsilon", {})
    about = {"clients": CLIENTS, "attackers": ATTACKERS, "rounds": ROUNDS, "clip": CLIP, "delta": DELTA}
    for seed, defence, attack in product(range(options.seeds), DEFENCES, ATTACKS):
        name = f"{attack} / {defence}"
        if len(found.get(name, [])) != seed or not wanted(name, options.only):
            continue
        rule = DEFENCES[defence]()
        found[name] = [*found.get(name, []), cell(rule, attack, seed)]
        if rule.event is not None:
            epsilon[defence] = round(fd.privacy.rdp([(rule.event, ROUNDS)], DELTA), 4)
        print(name, seed, found[name][-1], flush=True)
        store(NAME, about | {"refused": refusal(), "epsilon": epsilon, "found": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
