"""What the finished model, and single updates, say about the data: membership, model inversion, property inference.

**Membership** (Fashion-MNIST, 20 clients with 20 pictures each, a network that learns them by heart): a threshold on
the loss (Yeom et al. 2018) and likelihood ratios with 6 shadow federations (LiRA, Carlini et al. 2022); members are the
400 training pictures, others 400 of the same kind. **Model inversion** (Fredrikson et al. 2015) on MNIST: what each
class looks like, beside the mean of its pictures. **Property inference** (after Melis et al. 2019): from one update,
whether a client's digits are written with a thick pen, which has nothing to do with which digits they are. Masks and
encryption are the real ones: keys, shares, masks and ciphertexts in every round of the run that is attacked (not in the
attacker's own, which need none), and the bytes that lie at the server.

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_members.py   # three seeds: some 40 minutes on one core
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from outcome import RESULTS, store, stored, wanted
from torch import nn

import foedus as fd
from foedus import audit
from foedus.backends import open_trainer

NAME = "privacy_members"
CLIENTS, EACH, ROUNDS, SHADOWS, SEEDS = 20, 20, 20, 6, 3
CLIP, DELTA = 0.5, 1e-5
STORED = RESULTS / f"{NAME}.npz"  # imagined classes, uint8 [10, 28, 28]


def mlp() -> nn.Module:
    """784-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


TASK = fd.Task(mlp, nn.functional.cross_entropy, metrics=[fd.accuracy])
LOCAL = fd.local_sgd(0.1, epochs=3, batch_size=10)
BY_HEART = fd.local_sgd(0.1, epochs=10, batch_size=10, momentum=0.8)


def mean_of(*stages: Any) -> Any:
    return fd.chain(*stages, fd.mean(weighted=False))


def central(noise_multiplier: float, clients: int = CLIENTS, clip: float = CLIP) -> Any:
    return fd.privacy.central(clip=clip, noise_multiplier=noise_multiplier, cohort=clients)


def local(noise_multiplier: float, clip: float = CLIP) -> Any:
    return mean_of(fd.privacy.local(clip=clip, noise_multiplier=noise_multiplier))


MODELS: dict[str, Any] = {
    "none": mean_of(),
    "clipping": mean_of(fd.clip(CLIP)),
    "top-k, 5 %": mean_of(fd.top_k(0.05)),
    "central noise, z = 0.1": central(0.1),
    "central noise, z = 0.5": central(0.5),
    "central noise, z = 2": central(2.0),
    "local noise, z = 0.1": local(0.1),
    "secure aggregation": fd.masked(fd.Withstand(clients=CLIENTS, corrupt=0.1), bits=20, bound=2.0),
    "homomorphic sums": fd.encrypted(CLIENTS, key=fd.silo_key(), bound=2.0),
}

UPDATES: dict[str, tuple[Any, int]] = {  # the aggregator, and how many others are in the sum
    "none": (mean_of(), 0),
    "clipping": (mean_of(fd.clip(0.1)), 0),
    "top-k, 1 %": (mean_of(fd.top_k(0.01)), 0),
    "1 bit per entry": (mean_of(fd.rotate(), fd.quantise(bits=1)), 0),
    "local noise, z = 0.01": (local(0.01), 0),
    "local noise, z = 0.1": (local(0.1), 0),
    "sum of 10 clients": (mean_of(), 9),
}

MASKED = fd.masked(fd.Withstand(clients=10, corrupt=0.1), bits=20)
ENCRYPTED = fd.encrypted(10, key=fd.silo_key())
UPLOADS: dict[str, tuple[Any, int, bool]] = {  # the aggregator, how many others, and whether the sum is looked at
    "masked, one client's upload": (MASKED, 9, False),
    "masked, the opened sum of 10": (MASKED, 9, True),
    "encrypted, one client's upload": (ENCRYPTED, 0, False),
    "encrypted, the opened sum of 10": (ENCRYPTED, 9, True),
}
ONCE = ("central noise, z = 0.1", "central noise, z = 2", "1 bit", "z = 0.01", "encrypted, the opened")  # one seed


def trained(rule: Any, examples: Any, *, seed: int, spec: Any = LOCAL, rounds: int = ROUNDS, test: Any = None) -> Any:
    """A federation on these examples, dealt evenly."""
    data = fd.data.from_arrays(examples.inputs[0], examples.targets, test=test, name="pictures")
    with tempfile.TemporaryDirectory() as folder:
        run = fd.simulate(
            TASK, fd.fedavg(spec, aggregator=rule), data.partition(fd.data.iid(CLIENTS), seed=seed), rounds=rounds,
            seed=seed, evaluation=fd.Evaluation(every=rounds),
            settings=fd.Settings(folder=folder, progress=False, executor=fd.executors.vectorised(), resume=False,
                                 cryptography=rule.masking is not None),
        )  # fmt: skip
        return run.weights, run.final


def epsilon(rule: Any, rounds: int) -> dict[str, float]:
    return {} if rule.event is None else {"epsilon": fd.privacy.rdp([(rule.event, rounds)], DELTA)}


# --- membership ---------------------------------------------------------------------------------------------


def membership(rule: Any, seed: int) -> dict[str, Any]:
    data, count = fd.data.fashion_mnist(), CLIENTS * EACH
    members, others = (data.train.take(slice((2 * seed + i) * count, (2 * seed + i + 1) * count)) for i in (0, 1))
    weights, final = trained(rule, members, seed=seed, spec=BY_HEART, test=data.test)
    # The loss on members tells how much is known by heart.
    simple = audit.by_loss(TASK, weights, members=members, others=others)

    def fit(examples: Any, number: int) -> Any:
        if rule.hidden:
            return shadow(seed, number, examples)
        return trained(rule, examples, seed=100 * (seed + 1) + number, spec=BY_HEART)[0]

    ratio = audit.by_likelihood_ratio(TASK, weights, fit, members=members, others=others, shadows=SHADOWS)
    found = {"accuracy": final["accuracy"]} | epsilon(rule, ROUNDS)
    for name, one in (("loss", simple), ("ratio", ratio)):
        found |= {f"{name} {key}": value for key, value in one.figures().items()}
    return found


PLAYED: dict[tuple[int, int], Any] = {}  # shadow models by seed and number


def shadow(seed: int, number: int, examples: Any) -> Any:
    """A shadow model without masks or encryption, which an attacker who plays all clients does not need; one for all
    that differ in these only."""
    if (seed, number) not in PLAYED:
        PLAYED[seed, number] = trained(mean_of(), examples, seed=100 * (seed + 1) + number, spec=BY_HEART)[0]
    return PLAYED[seed, number]


# --- model inversion ----------------------------------------------------------------------------------------


def imagined(rule: Any, seed: int) -> tuple[dict[str, Any], Any]:
    data = fd.data.mnist()
    train = data.train.take(slice(4000 * seed, 4000 * (seed + 1)))
    means = np.stack([train.inputs[0][train.targets == c].mean(axis=0) for c in range(10)])
    weights, final = trained(rule, train, seed=seed, rounds=20, test=data.test)
    found = audit.imagine(TASK, weights, audit.Knowledge(shape=(1, 28, 28), classes=10))
    figures = found.likeness(means) | found.closeness(means) | {"accuracy": final["accuracy"]} | epsilon(rule, 20)
    return figures, (found.inputs[:, 0] * 255).round().astype(np.uint8)


# --- property inference -------------------------------------------------------------------------------------


def properties(rule: Any, others: int, seed: int, *, sight: Any = None) -> dict[str, Any]:
    data = fd.data.mnist()
    ink = data.train.inputs[0].mean(axis=(1, 2, 3))
    thick, thin = (
        np.flatnonzero(which)[:6000] for which in (ink > np.quantile(ink, 0.85), ink < np.quantile(ink, 0.6))
    )
    start = open_trainer(TASK, seed=seed, device="cpu").initial()
    one = audit.Victim(
        task=TASK,
        before=start,
        spec=fd.local_sgd(0.1, batch_size=8),
        examples=data.test.take(slice(0, 1)),
        seed=seed,
    )
    played = audit.Played(examples=32, share=0.3, shadows=60, tested=60, others=others)
    having, lacking = data.train.take(thick), data.train.take(thin)
    found = audit.infer_property(one, having=having, lacking=lacking, through=rule, played=played, sight=sight)
    return found.figures() | epsilon(rule, 1)


def uploads(rule: Any, others: int, seed: int, *, opened: bool) -> dict[str, Any]:
    def sight(one: Any, beside: Any, trainer: Any) -> Any:
        held = audit.intercept(one, beside, through=rule, trainer=trainer)
        return held.total if opened else held.upload

    return properties(rule, others, seed, sight=sight)


def cases() -> dict[str, Callable[[int], Any]]:
    found: dict[str, Callable[[int], Any]] = {}
    for name, (rule, others) in UPDATES.items():
        found[f"property / {name}"] = lambda seed, rule=rule, others=others: (properties(rule, others, seed), None)
    for name, (rule, others, opened) in UPLOADS.items():
        found[f"property / {name}"] = lambda seed, rule=rule, others=others, opened=opened: (
            uploads(rule, others, seed, opened=opened),
            None,
        )
    for name, rule in MODELS.items():
        found[f"model inversion / {name}"] = lambda seed, rule=rule: imagined(rule, seed)
    for name, rule in MODELS.items():
        found[f"membership / {name}"] = lambda seed, rule=rule: (membership(rule, seed), None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="parts of names")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found, pictures = stored(NAME).get("found", {}), dict(np.load(STORED)) if STORED.exists() else {}
    about = {"clients": CLIENTS, "pictures each": EACH, "rounds": ROUNDS, "shadows": SHADOWS, "delta": DELTA}
    for seed, (name, case) in product(range(options.seeds), cases().items()):
        once = seed > 0 and any(part in name for part in ONCE)
        if len(found.get(name, [])) != seed or not wanted(name, options.only) or once:
            continue
        figures, shown = case(seed)
        found[name] = [*found.get(name, []), {key: round(float(value), 4) for key, value in figures.items()}]
        if shown is not None and not seed:
            pictures[name] = shown
            np.savez_compressed(STORED, **pictures)
        print(name, seed, found[name][-1], flush=True)
        store(NAME, about | {"clip": CLIP, "found": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
