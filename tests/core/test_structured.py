"""Structured updates, beside torch differentiating the structure's own factors (Konečný et al. 2016, section 2)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import foedus as fd
from foedus.core.aggregate import message_bytes
from foedus.core.batches import plan
from foedus.core.structured import structured
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError
from foedus.tree import Layout

SIZES, ROUNDS, SEED = [9, 4, 14], 3, 6
LOCAL = fd.local_sgd(lr=0.2, epochs=2, batch_size=4, momentum=0.5, weight_decay=0.05)


class Net(nn.Module):
    """A convolution and a layer, with biases: 3 · 2 · 2 · 2 + 3 + 12 · 4 + 4 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 3, 2, dtype=torch.float64), nn.Linear(12, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)).flatten(1))


def population() -> fd.Clients:
    rng = np.random.default_rng(2)
    return fd.Clients.of(
        {
            f"c{i}": fd.Examples.of(rng.normal(size=(n, 2, 3, 3)), rng.integers(4, size=n), keep_dtype=True)
            for i, n in enumerate(SIZES)
        }
    )


def ran(algorithm: fd.Algorithm, *, rounds: int = ROUNDS, executor: Any = None) -> fd.Run:
    with tempfile.TemporaryDirectory() as folder:
        settings = fd.Settings(folder=Path(folder) / "run", progress=False, executor=executor or fd.executors.debug())
        task = fd.Task(Net, nn.functional.cross_entropy)
        return fd.simulate(task, algorithm, population(), rounds=rounds, seed=SEED, settings=settings)


Whole = Callable[[dict[str, torch.Tensor], list[torch.Tensor]], dict[str, torch.Tensor]]


def by_hand(form: fd.Stage, factors: Callable[[fd.Stage, Context], tuple[list[torch.Tensor], Whole]]) -> Any:
    """Federated averaging in which the factors are the parameters of torch's own SGD, and start at zero."""
    first = ran(fd.fedavg(LOCAL), rounds=0)
    layout, net, clients = Layout.of(first.parameters), Net(), population()
    vector = first.weights.vector
    for number in range(1, ROUNDS + 1):
        total = np.zeros_like(vector)
        for client, size in enumerate(SIZES):
            received = {n: torch.tensor(a) for n, a in layout.unflatten(vector).items()}
            own, whole = factors(form, Context(SEED, number, client, layout, layout.size))
            optimiser = torch.optim.SGD(own, lr=0.2, momentum=0.5)
            batches = plan(LOCAL, np.array([size]), np.array([client]), seed=SEED, round=number)
            for rows, count in zip(batches.rows, batches.count, strict=True):
                data = clients.train(client).take(rows[:count])
                weights = whole(received, own)
                output = functional_call(net, weights, torch.from_numpy(data.inputs[0]))
                loss = nn.functional.cross_entropy(output, torch.from_numpy(data.targets))
                loss = loss + 0.025 * sum((w**2).sum() for w in weights.values())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            after = {n: w.detach().numpy() for n, w in whole(received, own).items()}
            total += size / sum(SIZES) * (layout.flatten(after) - vector)
        vector = vector + total
    return vector


def low_rank(form: fd.Stage, context: Context) -> tuple[list[torch.Tensor], Whole]:
    """W + A·B, of which B is trained; biases whole."""
    assert form.inside is not None
    assert context.layout is not None
    bases = {n: torch.tensor(a) for n, a in form.inside(context).bases.items()}
    shapes = dict(zip(context.layout.names, context.layout.shapes, strict=True))
    own = []
    for name, shape in shapes.items():
        rows = (bases[name].shape[1], int(np.prod(shape[1:]))) if name in bases else shape
        own.append(torch.zeros(rows, dtype=torch.float64, requires_grad=True))

    def whole(received: dict[str, torch.Tensor], own: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n: w + (bases[n] @ b if n in bases else b).reshape(w.shape)
            for (n, w), b in zip(received.items(), own, strict=True)
        }

    return own, whole


def masked(form: fd.Stage, context: Context) -> tuple[list[torch.Tensor], Whole]:
    """W + H, of which only the chosen entries are there to be trained."""
    assert form.inside is not None
    assert context.layout is not None
    mask = form.inside(context).mask
    assert mask is not None
    at, layout = torch.from_numpy(np.flatnonzero(mask)), context.layout
    values = torch.zeros(len(at), dtype=torch.float64, requires_grad=True)

    def whole(received: dict[str, torch.Tensor], own: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = torch.zeros(layout.size, dtype=torch.float64).index_put((at,), own[0])
        return {n: w + flat[layout.slice(n)].reshape(w.shape) for n, w in received.items()}

    return [values], whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "factors"),
    [
        (fd.low_rank(2, unbiased=False), low_rank),
        (fd.random_mask(0.3, unbiased=False), masked),
        (fd.matrices(fd.random_mask(0.3, unbiased=False)), masked),
        (fd.rand_k(0.3), masked),
        (fd.on_layers(lambda name, shape: name == "head.weight", fd.low_rank(1, unbiased=False)), low_rank),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_training_within_a_form_is_training_its_factors(form: fd.Stage, factors: Any) -> None:
    wanted = by_hand(form, factors)
    for executor in (fd.executors.debug(), fd.executors.vectorised()):
        found = ran(structured(LOCAL, form), executor=executor).weights.vector
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10)
    projected = ran(fd.fedavg(LOCAL, aggregator=fd.chain(form, fd.mean()))).weights.vector
    assert np.abs(projected - wanted).max() > 1e-3, "projecting afterwards is something else"


@pytest.mark.parametrize(
    "form",
    [fd.low_rank(2, unbiased=False), fd.random_mask(0.25, unbiased=False), fd.rand_k(0.25),
     fd.matrices(fd.rand_k(0.25), fd.quantise(8))],
    ids=lambda form: form.label,
)  # fmt: skip
def test_what_lies_within_a_form_comes_back_as_it_was(form: fd.Stage) -> None:
    run = ran(fd.fedavg(LOCAL), rounds=0)
    layout = Layout.of(run.parameters)
    context = Context(SEED, 1, 1, layout, layout.size)
    assert form.inside is not None
    within, rng = form.inside(context), np.random.default_rng(0)
    arrays = layout.unflatten(rng.normal(size=layout.size))
    for name, a in within.bases.items():
        flat = arrays[name].reshape(len(a), -1)
        arrays[name] = (a @ (a.T @ flat)).reshape(arrays[name].shape)
    vector = layout.flatten(arrays) * (1 if within.mask is None else within.mask)
    rule = fd.chain(form, fd.mean())
    message = rule.encode(Update(vector, 3.0), context)
    found, _ = rule.decode(rule.init(layout), rule.admit(message, context), context)
    np.testing.assert_allclose(found, vector, atol=0.05 if "quantise" in form.label else 1e-12)
    assert message_bytes(message) < 0.7 * vector.nbytes


def test_the_message_holds_no_more_than_the_form_has_room_for() -> None:
    """2 of 3 and of 4 rows, and biases: 2 · 8 + 3 + 2 · 12 + 4 numbers of 8 bytes, and the weight."""
    run = ran(structured(LOCAL, fd.low_rank(2, unbiased=False)), rounds=1)
    assert run.metrics[0]["bytes_up"] == len(SIZES) * 8 * (2 * 8 + 3 + 2 * 12 + 4 + 1)


def test_it_composes_with_what_stands_behind() -> None:
    rest = fd.chain(fd.rotate(), fd.quantise(8, scale=2.0), fd.mean())
    algorithm = structured(LOCAL, fd.random_mask(0.5, unbiased=False), aggregator=rest)
    found, exact = ran(algorithm), ran(structured(LOCAL, fd.random_mask(0.5, unbiased=False)))
    moved = exact.weights.vector - ran(fd.fedavg(LOCAL), rounds=0).weights.vector
    assert np.linalg.norm(found.weights.vector - exact.weights.vector) < 0.2 * np.linalg.norm(moved)
    assert found.metrics[0]["bytes_up"] < 0.3 * exact.metrics[0]["bytes_up"]


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (fd.random_mask(0.5), r"random_mask\(share, unbiased=False\).*not random_mask\(0.5\)"),
        (fd.subsample(0.5), "not subsample"),
        (fd.rotate(), "not rotate"),
        (fd.matrices(fd.rotate(), fd.random_mask(0.5, unbiased=False)), "not matrices"),
        (fd.mean(), "not mean"),
    ],
)
def test_what_leaves_nothing_as_it_was_is_no_form(form: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        structured(LOCAL, form)


def test_training_of_the_users_own_cannot_be_confined() -> None:
    with pytest.raises(ConfigurationError, match=r"local_training.*steps of its own"):
        structured(fd.local_training(optimiser=lambda p: p), fd.rand_k(0.5))  # type: ignore[arg-type]
