"""What canaries measure, beside what noise promises.

100 clients with 60 digits each learn a network of 25,450 parameters in 15 rounds, all of them in every round; canaries
are 40 more. For each protection: ε as its accountant promises it, and as canaries measure it in the models of all
rounds, in the final model, and in one message to the server (δ = 10⁻⁵). Masks and encryption are the real ones; as one
key is for 64 silos at most, encrypted sums are of 40 clients and 20 canaries, beside which stands clipping among as
many.

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_canaries.py   # three seeds: some 15 minutes on one core
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from typing import Any

import torch
from outcome import store, stored, wanted
from torch import nn

import foedus as fd

NAME = "privacy_canaries"
CLIENTS, EACH, ROUNDS, CANARIES, CLIP, DELTA, SEEDS = 100, 60, 15, 40, 0.5, 1e-5, 3
FEW = (40, 20)  # clients and canaries where one key is for all


def net() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


TASK = fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy])


def central(noise_multiplier: float) -> Any:
    return fd.privacy.central(clip=CLIP, noise_multiplier=noise_multiplier, cohort=CLIENTS)


RULES: dict[str, Any] = {
    "none": fd.mean(weighted=False),
    "clipping": fd.chain(fd.clip(CLIP), fd.mean(weighted=False)),
    "2 bits per entry": fd.chain(fd.rotate(), fd.quantise(bits=2), fd.mean(weighted=False)),
    "secure aggregation": fd.chain(fd.clip(CLIP), fd.masked(fd.Withstand(clients=CLIENTS + CANARIES), bits=20)),
    "central noise, z = 1": central(1.0),
    "central noise, z = 3": central(3.0),
    "central noise, z = 10": central(10.0),
    "central noise, z = 30": central(30.0),
    "local noise, z = 3": fd.chain(fd.privacy.local(clip=CLIP, noise_multiplier=3.0), fd.mean()),
    "local noise, z = 30": fd.chain(fd.privacy.local(clip=CLIP, noise_multiplier=30.0), fd.mean()),
    "clipping, 40 clients": fd.chain(fd.clip(CLIP), fd.mean(weighted=False)),
    "homomorphic sums, 40 clients": fd.chain(fd.clip(CLIP), fd.encrypted(sum(FEW), key=fd.silo_key())),
}
ONCE = ("central noise, z = 1", "central noise, z = 3", "central noise, z = 30", "local noise, z = 3")  # one seed


def measured(name: str, rule: Any, seed: int) -> dict[str, Any]:
    data, (clients, canaries) = fd.data.mnist(), FEW if "40 clients" in name else (CLIENTS, CANARIES)
    taken = slice(CLIENTS * EACH * seed, CLIENTS * EACH * seed + clients * EACH)
    dealt = fd.data.from_arrays(data.train.inputs[0][taken], data.train.targets[taken], test=data.test, name="digits")
    federation = fd.Federation(
        task=TASK, algorithm=fd.fedavg(fd.local_sgd(0.1, batch_size=10), aggregator=rule),
        clients=dealt.partition(fd.data.iid(clients), seed=seed), rounds=ROUNDS, seed=seed,
        evaluation=fd.Evaluation(every=ROUNDS),
        settings=fd.Settings(
            progress=False, executor=fd.executors.vectorised(), cryptography=rule.masking is not None,
        ),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        effort = fd.audit.Effort(canaries=canaries, sizes=(), examples=100, delta=DELTA, folder=folder, progress=False)
        found = fd.audit(federation, effort=effort)
        accuracy = fd.read_run(f"{folder}/run").final["accuracy"]
    seen = found.findings["canaries"]
    told = {"claimed": found.protections.claimed, "accuracy": accuracy}
    for place in ("every model", "final model", "message"):
        told |= {f"{place} {key}": seen.get(place, {}).get(key) for key in ("epsilon", "least")}
        told[f"{place} unbounded"] = place in seen and seen[place]["epsilon"] is None
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="parts of names")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found = stored(NAME).get("found", {})
    about = {"clients": CLIENTS, "rounds": ROUNDS, "canaries": CANARIES, "clip": CLIP, "delta": DELTA}
    for seed, (name, rule) in product(range(options.seeds), RULES.items()):
        if len(found.get(name, [])) != seed or not wanted(name, options.only) or (seed and name in ONCE):
            continue
        found[name] = [*found.get(name, []), measured(name, rule, seed)]
        print(name, seed, found[name][-1], flush=True)
        store(NAME, about | {"found": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
