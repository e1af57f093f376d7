"""A participant that rebuilds what others have: Hitaj et al. 2017 on MNIST, behind every defence.

Three clients learn to tell digits apart. Two have all digits; the third, the attacker, has no 3. It trains a generator
against the models that it receives, labels what that makes as an eleventh class, and sends its update like everybody
else. A network of another kind, trained on digits that no client has, judges what the generator makes: the share that
it takes for a 3. Masks and encryption are the real ones: keys, shares, masks and ciphertexts in every round.

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_gan.py   # three seeds: some 30 minutes on one core
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from typing import Any

import numpy as np
import torch
from outcome import RESULTS, store, stored, wanted
from torch import nn

import foedus as fd
from foedus import audit

NAME = "privacy_gan"
TARGET, DECOY = 3, 10
ROUNDS, EACH, SEEDS = 20, 800, 3  # rounds; pictures of each client; other pictures, other weights
CLIP = 0.3  # shorter than nearly every update
STORED = RESULTS / f"{NAME}.npz"  # what the generators make, uint8 [16, 28, 28]


def net() -> nn.Module:
    """What is learnt together: convolutions with leaky ReLUs, 11 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 5, 2, 2), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(1568, 128), nn.LeakyReLU(0.2), nn.Linear(128, 11),
    )  # fmt: skip


def judge(data: Any) -> nn.Module:
    """An independent classifier: other layers, other pictures."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )
    inputs, targets = torch.from_numpy(data.train.inputs[0][20_000:]), torch.from_numpy(data.train.targets[20_000:])
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2500):
        rows = torch.randint(len(inputs), (64,))
        loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def mean_of(*stages: Any) -> Any:
    return fd.chain(*stages, fd.mean(weighted=False))


def central(noise_multiplier: float) -> Any:
    return fd.privacy.central(clip=CLIP, noise_multiplier=noise_multiplier, cohort=3)


DEFENCES: dict[str, Any] = {
    "none": mean_of(),
    "clipping": mean_of(fd.clip(CLIP)),
    "top-k, 5 %": mean_of(fd.top_k(0.05)),
    "central noise, z = 0.003": central(0.003),
    "central noise, z = 0.03": central(0.03),
    "central noise, z = 0.3": central(0.3),
    "local noise, z = 0.1": mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=0.1)),
    "secure aggregation": fd.masked(fd.Withstand(clients=3, corrupt=0.0), bits=20),
    "homomorphic sums": fd.encrypted(3, key=fd.silo_key()),
    "nobody attacks": mean_of(),
}
ONCE = ("central noise, z = 0.003", "central noise, z = 0.03")  # one seed is enough


def population(data: Any, seed: int) -> Any:
    """Two clients with all digits, and the attacker without the target; every seed has pictures of its own."""
    train = data.train.take(slice(4 * EACH * seed, 4 * EACH * (seed + 1)))
    parts = {name: train.take(slice(i * EACH, (i + 1) * EACH)) for i, name in enumerate(("first", "second"))}
    own = 2 * EACH + np.flatnonzero(train.targets[2 * EACH :] != TARGET)[:EACH]
    return fd.Clients.of(parts | {"attacker": train.take(own)}, central_test=data.test.take(slice(0, 2000)))


def cell(name: str, rule: Any, clients: Any, expert: nn.Module, *, seed: int) -> tuple[dict[str, Any], Any]:
    since = 3 if name != "nobody attacks" else ROUNDS + 1
    aim = audit.Aim(attacker="attacker", target=TARGET, decoy=DECOY, shape=(1, 28, 28), since=since, fakes=200)
    impostor = audit.Impostor(aim, seed=seed)
    algorithm = fd.fedavg(impostor.training(lr=0.1, batch_size=32), aggregator=rule)
    with tempfile.TemporaryDirectory() as folder:
        run = fd.simulate(
            fd.Task(net, nn.functional.cross_entropy, metrics=[fd.accuracy]), algorithm, clients, rounds=ROUNDS,
            seed=seed, evaluation=fd.Evaluation(every=ROUNDS),
            settings=fd.Settings(
                folder=folder, progress=False, executor=fd.executors.debug(), resume=False,
                cryptography=rule.masking is not None,
            ),
        )  # fmt: skip
    pictures = impostor.pictures(500)
    with torch.no_grad():
        sure = expert(torch.from_numpy(pictures)).softmax(1)
    found = {
        "taken for a 3": float((sure.argmax(1) == TARGET).double().mean()),
        "how sure": float(sure[:, TARGET].mean()),
        "accuracy": float(run.final["accuracy"]),
    }
    if rule.event is not None:
        found["epsilon"] = fd.privacy.rdp([(rule.event, ROUNDS)], 1e-5)
    return {key: round(value, 4) for key, value in found.items()}, pictures[:16, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="parts of names")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    data = fd.data.mnist()
    expert = judge(data)
    tested = torch.from_numpy(data.test.inputs[0])
    with torch.no_grad():
        right = float((expert(tested).argmax(1).numpy() == data.test.targets).mean())
    found, pictures = stored(NAME).get("found", {}), dict(np.load(STORED)) if STORED.exists() else {}
    for seed, name in product(range(options.seeds), DEFENCES):
        if len(found.get(name, [])) != seed or not wanted(name, options.only) or (seed and name in ONCE):
            continue
        figures, made = cell(name, DEFENCES[name], population(data, seed), expert, seed=seed)
        found[name] = [*found.get(name, []), figures]
        if not seed:
            pictures[name] = (made * 255).round().astype(np.uint8)
        print(name, seed, figures, flush=True)
        store(NAME, {"rounds": ROUNDS, "pictures each": EACH, "clip": CLIP, "judge": round(right, 4), "found": found})
        np.savez_compressed(STORED, **pictures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
