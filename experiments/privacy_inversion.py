"""Gradient inversion: pictures from updates, undefended and behind every defence.

A server that is curious inverts one client's update of the first round. Three attacks: DLG (Zhu et al. 2019) and iDLG
(Zhao et al. 2020) on the sigmoid network of that paper, and the angle of gradients with total variation (Geiping et al.
2020) on a convolutional network with ReLUs; batches of 1, 4 and 8, and local training of up to 20 steps. Each figure is
the mean over a few batches of test pictures; the baseline is the mean picture. Then the same behind defences, as seen
by the server and, where the server adds noise, by those who see models only; under masks and encryption, both of which
are carried out: one client's upload as it lies at the server, and the sum that is opened; and with a server that sends
different models to different clients.

    OPENBLAS_NUM_THREADS=1 python experiments/privacy_inversion.py   # some 10 minutes on one core
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from outcome import RESULTS, store, stored, wanted
from torch import nn

import foedus as fd
from foedus import audit
from foedus.backends import open_trainer

NAME = "privacy_inversion"
BATCHES = 3  # of test pictures, for every figure
KNOWN = audit.Knowledge(shape=(1, 28, 28), classes=10)
ONE_STEP = fd.local_sgd(0.1, batch_size=None)
STORED = RESULTS / f"{NAME}.npz"  # originals and reconstructions, uint8 [2, k, 28, 28]


def lenet() -> nn.Module:
    """The network of DLG, for 28 × 28 pictures: three convolutions with sigmoids; weights uniform in ±0.5."""
    net = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(588, 10),
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def relu_net() -> nn.Module:
    """Two convolutions and two dense layers with ReLUs, 114,410 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, padding=2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


DATA: dict[str, Any] = {"MNIST": fd.data.mnist, "Fashion-MNIST": fd.data.fashion_mnist}

# --- undefended: (data, network, batch size, attack)

PLAIN: dict[str, tuple[str, Callable[[], Any], int, Any]] = {
    **{f"DLG, MNIST, {k}": ("MNIST", lenet, k, audit.dlg(steps=60, restarts=1)) for k in (1, 4, 8)},
    **{f"iDLG, MNIST, {k}": ("MNIST", lenet, k, audit.idlg(steps=60, restarts=1)) for k in (1, 4, 8)},
    **{
        f"angle, {data}, {k}": (data, relu_net, k, audit.cosine(steps=300, restarts=1))
        for data in DATA
        for k in (1, 4, 8)
    },
}

# --- local training: (examples, how)

LOCAL = {
    "4 pictures, 2 epochs of 2 (4 steps)": (4, fd.local_sgd(0.05, epochs=2, batch_size=2)),
    "8 pictures, 5 steps on all": (8, fd.local_sgd(0.05, epochs=5, batch_size=None)),
    "8 pictures, 5 epochs of 2 (20 steps)": (8, fd.local_sgd(0.05, epochs=5, batch_size=2)),
    "32 pictures, 2 epochs of 8 (8 steps)": (32, fd.local_sgd(0.05, epochs=2, batch_size=8)),
}

# --- defences: the aggregator, how many clients are in the sum that is seen, and whether it is seen from outside

CLIP = 0.05  # about a third of an update's length: everything is clipped


def mean_of(*stages: Any) -> Any:
    return fd.chain(*stages, fd.mean(weighted=False))


def central(noise_multiplier: float) -> Any:
    return fd.privacy.central(clip=CLIP, noise_multiplier=noise_multiplier, cohort=1)


DEFENCES: dict[str, tuple[Any, int, bool]] = {
    "none": (None, 1, False),
    "clipping": (mean_of(fd.clip(CLIP)), 1, False),
    "top-k, 5 %": (mean_of(fd.top_k(0.05)), 1, False),
    "top-k, 1 %": (mean_of(fd.top_k(0.01)), 1, False),
    "2 bits per entry": (mean_of(fd.rotate(), fd.quantise(bits=2)), 1, False),
    "1 bit per entry": (mean_of(fd.rotate(), fd.quantise(bits=1)), 1, False),
    "central noise, z = 1, seen by the server": (central(1.0), 1, False),
    "central noise, z = 0.01, seen in the model": (central(0.01), 1, True),
    "central noise, z = 0.1, seen in the model": (central(0.1), 1, True),
    "local noise, z = 0.003": (mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=0.003)), 1, False),
    "local noise, z = 0.01": (mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=0.01)), 1, False),
    "local noise, z = 0.1": (mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=0.1)), 1, False),
    "sum of 4 clients": (mean_of(), 4, False),
    "sum of 16 clients": (mean_of(), 16, False),
    "sum of 64 clients": (mean_of(), 64, False),
}  # fmt: skip

SUMMED = 64  # clients under masks, and with one key
MASKED = fd.masked(fd.Withstand(clients=SUMMED, corrupt=0.1), bits=20)
HIDDEN: dict[str, tuple[Callable[[], Any], bool]] = {  # the aggregator, and whether the attacker has the opened sum
    "masked, one client's upload": (lambda: MASKED, False),
    "masked, the opened sum of 64": (lambda: MASKED, True),
    "encrypted, one client's upload": (lambda: fd.encrypted(SUMMED, key=fd.silo_key()), False),
    "encrypted, the opened sum of 64": (lambda: fd.encrypted(SUMMED, key=fd.silo_key()), True),
}

DEFENDED = ("1", "8")  # batch sizes


def batch(data: Any, k: int, number: int) -> Any:
    """Test pictures of classes as they come."""
    return data.test.take(np.arange(number * 100, number * 100 + k))


def victim(network: Callable[[], Any], spec: Any, examples: Any, number: int) -> Any:
    task = fd.Task(network, nn.functional.cross_entropy)
    start = open_trainer(task, seed=number, device="cpu").initial()
    return audit.Victim(task=task, before=start, spec=spec, examples=examples, seed=number)


def attacked(one: Any, seen: Any, by: Any, mean: Any, number: int) -> tuple[dict[str, float], Any]:
    found = audit.invert(one.task, seen, KNOWN, by=by, seed=number)
    judged = audit.judge(found.inputs, one.examples.inputs[0], baseline=mean)  # of a sum, those that come closest
    right = sorted(found.targets.tolist()) == sorted(one.examples.targets.tolist())
    return judged.figures() | {"labels right": float(right)}, found.inputs[list(judged.order)]


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def cases() -> dict[str, Callable[[int, Any], tuple[dict[str, float], Any, Any]]]:
    """Every figure by name: (number of the batch, mean picture by data) -> figures, pictures, originals."""
    found: dict[str, Any] = {}

    def plain(data: str, network: Any, k: int, by: Any) -> Any:
        def run(number: int, means: Any) -> Any:
            one = victim(network, ONE_STEP, batch(loaded(data), k, number), number)
            return *attacked(one, audit.look(one), by, means[data], number), one.examples.inputs[0]

        return run

    def local(k: int, spec: Any) -> Any:
        def run(number: int, means: Any) -> Any:
            one = victim(relu_net, spec, batch(loaded("Fashion-MNIST"), k, number), number)
            by = audit.cosine(steps=300)
            return *attacked(one, audit.look(one), by, means["Fashion-MNIST"], number), one.examples.inputs[0]

        return run

    def defended(rule: Any, clients: int, outside: bool, k: int) -> Any:
        def run(number: int, means: Any) -> Any:
            data = loaded("Fashion-MNIST")
            one = victim(relu_net, ONE_STEP, batch(data, k, number), number)
            others = [data.test.take(np.arange(5000 + i * k, 5000 + (i + 1) * k)) for i in range(clients - 1)]
            seen = audit.look(one, through=rule, others=others, outside=outside)
            by = audit.cosine(steps=300)
            return *attacked(one, seen, by, means["Fashion-MNIST"], number), one.examples.inputs[0]

        return run

    found |= {f"undefended / {name}": plain(*case) for name, case in PLAIN.items()}
    found |= {f"local training / {name}": local(*case) for name, case in LOCAL.items()}

    def hidden(make: Callable[[], Any], opened: bool, k: int) -> Any:
        def run(number: int, means: Any) -> Any:
            data = loaded("Fashion-MNIST")
            one = victim(relu_net, ONE_STEP, batch(data, k, number), number)
            others = [data.test.take(np.arange(5000 + i * k, 5000 + (i + 1) * k)) for i in range(SUMMED - 1)]
            rule = make()
            needed = others if opened or rule.masking is not None else []  # who has no key needs nobody else
            held = audit.intercept(one, needed, through=rule)
            seen = held.total if opened else held.upload
            return *attacked(one, seen, audit.cosine(steps=300), means["Fashion-MNIST"], number), one.examples.inputs[0]

        return run

    for name, case in DEFENCES.items():
        found |= {f"defended / {name} / {k}": defended(*case, int(k)) for k in DEFENDED}
    for name, kept in HIDDEN.items():
        found |= {f"defended / {name} / {k}": hidden(*kept, int(k)) for k in DEFENDED}
    return found | {f"cheating server / {name}": case for name, case in cheating().items()}


def cheating() -> dict[str, Any]:
    """A sum over 20 clients of 4 pictures each, whose server sends the others a model that is switched off."""

    def run(rule: Any) -> Any:
        def one_batch(number: int, means: Any) -> Any:
            data = loaded("Fashion-MNIST")
            one = victim(relu_net, ONE_STEP, batch(data, 4, number), number)
            others = [data.test.take(np.arange(5000 + 4 * i, 5004 + 4 * i)) for i in range(19)]
            found = audit.disaggregate(one, others, through=rule)
            figures, pictures = attacked(
                one, found.seen, audit.cosine(steps=300, restarts=1), means["Fashion-MNIST"], number
            )
            return figures | found.figures(), pictures, one.examples.inputs[0]

        return one_batch

    return {
        "sum of 20": run(mean_of()),
        "sum of 20, clipped": run(mean_of(fd.clip(CLIP))),
        "sum of 20, local noise, z = 0.01": run(mean_of(fd.privacy.local(clip=CLIP, noise_multiplier=0.01))),
    }


LOADED: dict[str, Any] = {}


def loaded(name: str) -> Any:
    if name not in LOADED:
        LOADED[name] = DATA[name]()
    return LOADED[name]


DRAWN = (
    "undefended / DLG, MNIST, 4", "undefended / angle, Fashion-MNIST, 8",
    "local training / 8 pictures, 5 epochs of 2 (20 steps)", "defended / top-k, 5 % / 8",
    "defended / 2 bits per entry / 8", "defended / local noise, z = 0.01 / 8", "defended / sum of 16 clients / 8",
    "cheating server / sum of 20",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="parts of names")
    options = parser.parse_args()
    means = {name: loaded(name).train.inputs[0][:10_000].mean(axis=0) for name in DATA}
    kept = stored(NAME)
    found, pictures = kept.get("found", {}), dict(np.load(STORED)) if STORED.exists() else {}
    for name, case in cases().items():
        if name in found or not wanted(name, options.only):
            continue
        rows = []
        for number in range(BATCHES):
            figures, shown, truth = case(number, means)
            rows.append(figures)
            if name in DRAWN and number == 0:
                pictures[name] = np.stack([a[:8, 0] * 255 for a in (truth, shown)]).round().astype(np.uint8)
        found[name] = averaged(rows)
        print(name, found[name], flush=True)
        store(NAME, {"batches": BATCHES, "clip": CLIP, "found": found})
        np.savez_compressed(STORED, **pictures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
