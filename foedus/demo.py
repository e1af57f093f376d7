"""Two figures that show what federated learning is: those of a talk (Strange Loop 2019), on real digits.

    first    Ten nodes, each with mostly one digit. Between two averagings every node's own model goes astray, as
             far as everybody's digits are concerned; averaging brings all of them back, below where they were. A
             node that trains as much but never communicates stays astray.
    second   The same model learns from all data in one place, from data spread evenly over ten nodes, and from
             nodes of which 90 % or 100 % is one digit.

It takes about a minute on two cores and needs no internet: the digits come with scikit-learn. Where MNIST lies in
the data folder (FOEDUS_DATA), MNIST is taken. Called again with the same folder, it goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import foedus as fd
from foedus.core.client import LocalSGD
from foedus.data.dataset import Dataset
from foedus.errors import MissingExtra
from foedus.record import Record
from foedus.report.curves import open_canvas, plot_accuracy_by_partition, rounds_to
from foedus.report.local import plot_local
from foedus.report.tables import show, table
from foedus.sim.progress import announce

NODES, HIDDEN, SEED = 10, 64, 0
WATCHED = 1000  # test examples that every local step of the first figure is evaluated on


class Scene(NamedTuple):
    """What differs between the two data sets: how to train, and how long.

    ``target`` is the accuracy whose number of rounds the table tells.
    """

    load: Callable[[], Dataset]
    first: LocalSGD
    second: LocalSGD
    rounds: int
    target: float


SCENES = {
    "digits": Scene(
        lambda: fd.data.digits(),
        first=fd.local_sgd(0.1, steps=25, batch_size=20),
        second=fd.local_sgd(0.2, epochs=1, batch_size=10),
        rounds=40,
        target=0.85,
    ),
    "mnist": Scene(
        lambda: fd.data.mnist(),
        first=fd.local_sgd(0.05, steps=25, batch_size=20),
        second=fd.local_sgd(0.1, epochs=1, batch_size=50),
        rounds=15,
        target=0.75,
    ),
}
FIRST_ROUNDS = 10


def demo(folder: str | Path = "runs/demo", data: str | None = None, *, progress: bool = True) -> dict[str, Path]:
    """Train, draw both figures and print a table.

    Args:
        folder: for the run folders and figures.
        data: ``"digits"`` or ``"mnist"``; by default MNIST if its files are at hand.
        progress: show bars while training.

    Returns:
        The two figures' paths: ``"local"`` and ``"partitions"``.

    Raises:
        MissingExtra: torch, scikit-learn or matplotlib is not installed.
    """
    from rich.console import Console

    console, begin = Console(highlight=False), time.monotonic()
    name = data or ("mnist" if mnist_at_hand() else "digits")
    place, scene = Path(folder) / name, SCENES[name]
    open_canvas()  # what is missing is told before anything else
    loaded = scene.load()
    task = _task(loaded)
    console.print(
        f"Federated learning on {name}: {NODES} nodes learn one model; their data stays where it is.",
        soft_wrap=True,
    )
    pictures = {
        "local": first_figure(task, loaded, scene, place, progress=progress),
        "partitions": place / "partitions.png",
    }
    runs = second_figure(task, loaded, scene, place, progress=progress)
    plot_accuracy_by_partition(runs, pictures["partitions"])
    console.print()
    show(table([_row(label, record, scene) for label, record in runs.items()], title="Test accuracy"))
    console.print(f"\nFigures, after {time.monotonic() - begin:.0f} s:")
    for path, told in zip(pictures.values(), ("within the rounds", "what skewed data costs"), strict=True):
        console.print(f"  {path}  ({told})", soft_wrap=True)
    return pictures


def first_figure(task: fd.Task, data: Dataset, scene: Scene, folder: Path, *, progress: bool) -> Path:
    """The loss of every node's own model, of a node alone, and of the federated model; the figure's path."""
    assert data.test is not None
    clients = data.partition(fd.data.by_class(NODES, share=0.9), seed=SEED).with_test(data.test.take(slice(WATCHED)))
    algorithm = fd.fedavg(scene.first)

    def run(name: str, clients: fd.Clients) -> Record:
        settings = fd.Settings(folder=folder / name, local_curves=fd.LocalCurves(), progress=progress)
        return fd.simulate(task, algorithm, clients, rounds=FIRST_ROUNDS, seed=SEED, settings=settings).record

    announce(progress, "1 of 2: inside the rounds. 90 % of each node's examples are of one class.")
    together = run("together", clients)
    announce(progress, "The same for one node that never communicates.")
    alone = run("alone", clients.subset([0]))
    path = folder / "local.png"
    plot_local(together, alone, path)
    return path


def second_figure(task: fd.Task, data: Dataset, scene: Scene, folder: Path, *, progress: bool) -> dict[str, Record]:
    """The runs of the second figure, by the name of their curve, from the easiest to the hardest."""
    partitions = {
        "non-federated": fd.data.iid(1),
        "uniform": fd.data.iid(NODES),
        "90 % of one class": fd.data.by_class(NODES, share=0.9),
        "100 % of one class": fd.data.by_class(NODES, share=1.0),
    }
    runs = {}
    for number, (name, partition) in enumerate(partitions.items(), 1):
        announce(progress, f"2 of 2: what skewed data costs ({number} of {len(partitions)}: {name})")
        settings = fd.Settings(folder=folder / name.replace(" %", "").replace(" ", "-"), progress=progress)
        clients = data.partition(partition, seed=SEED)
        algorithm = fd.fedavg(scene.second)
        run = fd.simulate(task, algorithm, clients, rounds=scene.rounds, seed=SEED, settings=settings)
        runs[name] = run.record
    return runs


def mnist_at_hand() -> bool:
    """Whether all of MNIST lies in the data folder, so that nothing needs to be downloaded."""
    from foedus.data.sources import SOURCES, data_folder

    files = [source for source in SOURCES if source.path.startswith("mnist/")]
    return all(any((data_folder() / name).is_file() for name, _ in source.forms) for source in files)


def _task(data: Dataset) -> fd.Task:
    """A network with one hidden layer."""
    try:
        from torch import nn
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", "torch", "The demo") from error
    pixels = data.train.inputs[0][0].size

    def network() -> Any:
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))

    return fd.Task(network, nn.functional.cross_entropy, metrics=[fd.accuracy])


def _row(name: str, record: Record, scene: Scene) -> dict[str, Any]:
    central = record.metrics[-1]["central"]
    needed = rounds_to(record.metrics, "accuracy", scene.target)
    return {
        "data": name,
        f"after {scene.rounds} rounds": f"{100 * central['accuracy']:.1f} %",
        f"rounds to {100 * scene.target:.0f} %": "never" if needed is None else f"{needed:.1f}",
        "seconds": round(sum(line["seconds"] for line in record.timings), 1),
    }
