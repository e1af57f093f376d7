"""What canaries measure, beside what noise promises.

100 clients with 60 digits each learn a network of 25,450 parameters in 15 rounds, all of them in every round; canaries
are 40 more. For each protection: ε as its accountant promises it, and as canaries measure it in the models of all
rounds, in the final model, and in one message to the server (δ = 10⁻⁵).

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_canaries.py   # some minutes on one core
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from outcome import store, stored
from torch import nn

import foedus as fd

NAME = "privacy_canaries"
CLIENTS, EACH, ROUNDS, CANARIES, CLIP, DELTA = 100, 60, 15, 40, 0.5, 1e-5


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
}


def measured(rule: Any) -> dict[str, Any]:
    data = fd.data.mnist()
    dealt = fd.data.from_arrays(
        data.train.inputs[0][: CLIENTS * EACH], data.train.targets[: CLIENTS * EACH], test=data.test, name="digits"
    )
    federation = fd.Federation(
        task=TASK, algorithm=fd.fedavg(fd.local_sgd(0.1, batch_size=10), aggregator=rule),
        clients=dealt.partition(fd.data.iid(CLIENTS), seed=0), rounds=ROUNDS,
        evaluation=fd.Evaluation(every=ROUNDS),
        settings=fd.Settings(progress=False, executor=fd.executors.vectorised()),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        effort = fd.audit.Effort(canaries=CANARIES, sizes=(), examples=100, delta=DELTA, folder=folder, progress=False)
        found = fd.audit(federation, effort=effort)
        accuracy = fd.read_run(f"{folder}/run").final["accuracy"]
    seen = found.findings["canaries"]
    told = {"claimed": found.protections.claimed, "accuracy": accuracy}
    for place in ("every model", "final model", "message"):
        told |= {f"{place} {key}": seen.get(place, {}).get(key) for key in ("epsilon", "least")}
        told[f"{place} unbounded"] = place in seen and seen[place]["epsilon"] is None
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()}


def main() -> None:
    found = stored(NAME).get("found", {})
    for name, rule in RULES.items():
        if name not in found:
            found[name] = measured(rule)
            print(name, found[name], flush=True)
            about = {"clients": CLIENTS, "rounds": ROUNDS, "canaries": CANARIES, "clip": CLIP, "delta": DELTA}
            store(NAME, about | {"found": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
