"""HeteroFL: what a fraction of the width holds is a narrower model, and every entry is averaged by its holders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foedus as fd
from foedus.core.widths import prefix
from foedus.errors import ConfigurationError
from foedus.tree import Layout

RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(64, 6)), RNG.integers(0, 3, 64)


def pair(rows: slice) -> fd.Examples:
    return fd.Examples.of(X[rows], Y[rows], keep_dtype=True)


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    ).double()


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5), nn.Linear(5, 2)
    )


def layout_of(module: nn.Module) -> Layout:
    return Layout.of({name: p.detach().numpy() for name, p in module.named_parameters()})


def simulate(folder: Path, task: fd.Task, algorithm: fd.Algorithm, clients: fd.Clients, *, rounds: int = 1) -> fd.Run:
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)
    return fd.simulate(task, algorithm, clients, rounds=rounds, seed=0, settings=settings)


def test_a_fraction_holds_the_first_units_of_hidden_layers() -> None:
    masks = layout_of(cnn()).unflatten(prefix(layout_of(cnn()), 0.5).astype(float))
    assert {name: int(m.sum()) for name, m in masks.items()} == {
        "0.weight": 2 * 9, "0.bias": 2, "1.weight": 2, "1.bias": 2, "4.weight": 3 * 18, "4.bias": 3,
        "5.weight": 2 * 3, "5.bias": 2,
    }  # fmt: skip
    assert (masks["4.weight"][:3, :18] == 1).all()
    assert prefix(layout_of(mlp()), 1.0).all()


def test_a_client_of_half_the_width_trains_what_a_narrower_model_would(tmp_path: Path) -> None:
    """Against the narrower module itself, started from the block of the wide one that the client holds."""
    wide = mlp()
    layout = layout_of(wide)
    mask = prefix(layout, 0.5)
    start = layout.flatten({name: p.detach().numpy() for name, p in wide.named_parameters()})
    parts = layout.unflatten(start)
    held = layout.unflatten(mask.astype(float))
    narrow = mlp(4)
    blocks = {name: parts[name][held[name] > 0].reshape(p.shape) for name, p in narrow.named_parameters()}
    spec = fd.local_sgd(lr=0.3, epochs=3, batch_size=8, momentum=0.5)
    clients = fd.Clients.of({"a": pair(slice(None))})
    settings = fd.Settings(folder=tmp_path / "n", executor=fd.executors.debug(), progress=False, start=blocks)
    alone = fd.simulate(
        fd.Task(lambda: mlp(4), F.cross_entropy), fd.fedavg(spec), clients, rounds=1, seed=0, settings=settings
    )
    settings = fd.Settings(folder=tmp_path / "w", executor=fd.executors.debug(), progress=False, start=wide)
    algorithm = fd.heterofl(spec, lambda client: 0.5, fractions=(1.0, 0.5))
    run = fd.simulate(fd.Task(mlp, F.cross_entropy), algorithm, clients, rounds=1, seed=0, settings=settings)
    np.testing.assert_allclose(run.weights.vector[mask], alone.weights.vector, rtol=1e-10)
    np.testing.assert_array_equal(run.weights.vector[~mask], start[~mask])
    assert run.metrics[0]["bytes_up"] < 0.5 * start.nbytes


def test_every_entry_is_averaged_over_those_that_hold_it(tmp_path: Path) -> None:
    sizes, widths = [20, 10, 34], [1.0, 0.5, 0.25]
    at = np.cumsum([0, *sizes])
    data = {i: pair(slice(at[i], at[i + 1])) for i in range(3)}
    spec, task = fd.local_sgd(lr=0.2, steps=1, batch_size=None), fd.Task(mlp, F.cross_entropy)
    layout, whole = layout_of(mlp()), fd.Clients.of(data)
    start = simulate(tmp_path / "start", task, fd.fedavg(spec), whole, rounds=0).weights.vector
    shares, sums = np.zeros(layout.size), np.zeros(layout.size)
    for i, width in enumerate(widths):
        algorithm = fd.heterofl(spec, lambda client, width=width: width)
        alone = simulate(tmp_path / str(i), task, algorithm, whole.subset([i])).weights.vector
        mask = prefix(layout, width)
        shares += sizes[i] * mask
        sums += sizes[i] * mask * (alone - start)
    wanted = start + np.divide(sums, shares, out=np.zeros_like(sums), where=shares > 0)
    together = simulate(tmp_path / "all", task, fd.heterofl(spec, lambda client: widths[client]), whole)
    np.testing.assert_allclose(together.weights.vector, wanted, rtol=1e-10)


def test_executors_agree_on_clients_of_different_width(tmp_path: Path) -> None:
    at = np.cumsum([0, 20, 10, 34])
    clients = fd.Clients.of({i: pair(slice(at[i], at[i + 1])) for i in range(3)})
    algorithm = fd.heterofl(fd.local_sgd(lr=0.2, batch_size=8), lambda client: [1.0, 0.5, 0.5][client])
    found = []
    for executor in (fd.executors.debug(), fd.executors.vectorised(), fd.executors.compiled()):
        settings = fd.Settings(folder=tmp_path / executor.name, executor=executor, progress=False)
        task = fd.Task(mlp, F.cross_entropy)
        found.append(fd.simulate(task, algorithm, clients, rounds=2, seed=0, settings=settings).weights.vector)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-10)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    spec = fd.local_sgd(lr=0.1)
    with pytest.raises(ConfigurationError, match="different numbers in"):
        fd.heterofl(spec, lambda client: 1.0, fractions=(1.0, 1.0))
    task, clients = fd.Task(mlp, F.cross_entropy), fd.Clients.of({"a": pair(slice(None))})
    with pytest.raises(ConfigurationError, match=r"has the fraction 0\.3, which is none of"):
        simulate(tmp_path / "a", task, fd.heterofl(spec, lambda client: 0.3), clients)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    with pytest.raises(ConfigurationError, match="these layers are no chain"):
        simulate(
            tmp_path / "b",
            fd.Task(lambda: Branches().double(), F.cross_entropy),
            fd.heterofl(spec, lambda c: 0.5),
            clients,
        )
    with pytest.raises(ConfigurationError, match=r"takes a function from a client's position.*not 0\.5"):
        fd.heterofl(spec, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"different numbers in .*not 0\.5"):
        fd.heterofl(spec, lambda client: 1.0, fractions=0.5)  # type: ignore[arg-type]


def test_another_function_of_the_same_name_is_another_algorithm() -> None:
    one, other = (fd.heterofl(fd.local_sgd(lr=0.1), f).label for f in (lambda c: 0.5, lambda c: 1.0))
    assert one != other
