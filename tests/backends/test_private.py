"""DP-SGD on the client: gradients one by one, clipped and noised, batches by chance, and what it costs each client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foedus as fd
from foedus.backends.private import each
from foedus.core.client import LocalTraining, LoopContext
from foedus.core.compose import composed
from foedus.core.examples import Examples
from foedus.core.method import Consult, Contribution, Local, Measure, Method, Train, Visit, averaging
from foedus.core.values import Context
from foedus.errors import FoedusError, NoGuarantee
from foedus.privacy import example_epsilon, known_to_all_who_know_the_seed, pld, rdp
from foedus.privacy.events import Gaussian, Sampled


class Net(nn.Module):
    """A convolution, a norm within each example, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.relu(self.norm(self.first(x))).flatten(1))


def data(count: int = 12) -> Examples:
    rng = np.random.default_rng(0)
    return Examples((rng.normal(size=(count, 1, 4, 4)).astype("f4"),), rng.integers(0, 3, count))


def context(steps: int = 1, lr: float = 1.0, **changes: Any) -> LoopContext:
    counted = Context(5, 1, 0, secret=known_to_all_who_know_the_seed)
    told = {"loss": nn.functional.cross_entropy, "key": 7, "context": counted} | changes
    return LoopContext(round=1, client="a", batches=[None] * steps, lr=lr, **told)


def loop(**changes: Any) -> Any:
    spec = fd.dp_sgd(0.1, **({"clip": 0.5, "noise_multiplier": 1.0, "batch_size": 6} | changes))
    assert isinstance(spec, LocalTraining)
    return spec.loop


def moved(module: nn.Module, examples: Examples, told: LoopContext, **changes: Any) -> np.ndarray[Any, Any]:
    before = torch.cat([p.detach().clone().flatten() for p in module.parameters()])
    loop(**changes)(module, examples, told)
    return (torch.cat([p.detach().flatten() for p in module.parameters()]) - before).numpy()


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 0.2])])
def test_gradients_are_those_of_each_example_alone(weight: Any) -> None:
    """Also for a loss whose mean over a batch weighs examples by each other."""
    torch.manual_seed(0)
    module, examples, loss = Net(), data(), nn.CrossEntropyLoss(weight=weight)
    batch = [torch.from_numpy(a) for a in (*examples.inputs, examples.targets)]
    found = each(module, dict(module.named_parameters()), batch, context(loss=loss))
    for i in range(12):
        module.zero_grad()
        value = loss(module(batch[0][i : i + 1]), batch[1][i : i + 1])
        value.backward()
        alone = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        np.testing.assert_allclose(found[i], alone.numpy(), atol=1e-5)


class Choosy(nn.Module):
    """Its way depends on the numbers, which vmap does not take; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.spare = nn.Linear(16, 3), nn.Linear(16, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Any) -> Any:
        return self.one(x.flatten(1)) if float(x.sum()) > 0 else self.other(x.flatten(1))


def test_where_vmap_refuses_a_model_examples_go_one_after_another() -> None:
    torch.manual_seed(0)
    module, examples = Choosy(), data()
    batch = [torch.from_numpy(a) for a in (*examples.inputs, examples.targets)]
    found = each(module, dict(module.named_parameters()), batch, context())
    assert found.shape == (12, 2 * 51 + 2)
    for i in range(12):
        module.zero_grad()
        nn.functional.cross_entropy(module(batch[0][i : i + 1]), batch[1][i : i + 1]).backward()
        alone = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        np.testing.assert_allclose(found[i], torch.cat([g.flatten() for g in alone]).numpy(), atol=1e-6)
    np.testing.assert_array_equal(each(module, dict(module.named_parameters()), batch, context()), found)


def test_one_example_moves_a_step_by_at_most_the_bound_over_the_batch() -> None:
    """The same words give the same batch and noise: without noise's share, what is left is the example's."""
    base, step = data(), context()
    wild = Examples((base.inputs[0].copy(),), base.targets)
    wild.inputs[0][:] = base.inputs[0]
    changes = []
    for i in range(12):
        other = Examples((base.inputs[0].copy(),), base.targets)
        other.inputs[0][i] *= 1e3
        torch.manual_seed(0)
        a = Net()
        torch.manual_seed(0)
        b = Net()
        changes.append(np.linalg.norm(moved(a, base, step) - moved(b, other, step)))
    assert max(changes) <= 2 * 0.5 / 6 * (1 + 1e-4), "one replaced by another"
    assert sum(c == 0 for c in changes) >= 2, "and those that are not in the batch change nothing"


def test_the_noise_is_of_the_promised_size_even_if_nobody_is_drawn() -> None:
    torch.manual_seed(0)
    wide = nn.Linear(4000, 3)
    examples = Examples((np.zeros((1, 4000), "f4"),), np.zeros(1, np.int64))
    found = moved(wide, examples, context(), batch_size=1, noise_multiplier=2.0, clip=0.5)[:12_000]
    assert np.std(found) == pytest.approx(1.0, rel=0.03)
    many = Examples((np.zeros((10_000, 1), "f4"),), np.zeros(10_000, np.int64))
    rows = loop(batch_size=100)._drawn(10_000, 0.01, 3, context())
    assert 60 < len(rows) < 140
    assert len(many) == 10_000


def test_layers_that_mix_examples_are_refused() -> None:
    for module in (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)),):
        with pytest.raises(FoedusError, match="GroupNorm"):
            loop()(module, data(), context())


def test_what_it_costs_an_example_is_that_of_its_clients_steps() -> None:
    found = example_epsilon(1.1, batch_size=20, examples=600, steps=300, delta=1e-5)
    assert found == pld([(Sampled(20 / 600, Gaussian(1.1)), 300)], 1e-5)
    assert example_epsilon(1.1, batch_size=20, examples=10, steps=3, delta=1e-5) == pld([(Gaussian(1.1), 3)], 1e-5)
    assert example_epsilon(1.1, batch_size=20, examples=600, steps=0, delta=1e-5) == 0


@pytest.mark.slow
def test_a_run_tells_what_it_cost_each_client_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 4)).astype("f4")
    y = (x[:, 0] > 0).astype(int)
    clients = fd.Clients.of(
        {"a": (x[:20], y[:20]), "b": (x[20:50], y[20:50]), "c": (x[50:], y[50:])}, central_test=(x, y)
    )
    algorithm = fd.fedavg(fd.dp_sgd(0.5, clip=1.0, noise_multiplier=1.0, batch_size=10, steps=3, delta=1e-3))
    task = fd.Task(lambda: nn.Linear(4, 2), nn.functional.cross_entropy, metrics=[fd.accuracy])

    def run(folder: str, rounds: int) -> fd.Run:
        settings = fd.Settings(
            folder=tmp_path / folder, progress=False, checkpoint_seconds=0.0, executor=fd.executors.debug()
        )  # fmt: skip
        return fd.simulate(task, algorithm, clients, rounds=rounds, cohort=2, settings=settings)

    whole = run("whole", 4)
    for rounds in (2, 4):
        again = run("killed", rounds)
    assert again.metrics == whole.metrics
    assert whole.metrics[-1]["central"]["accuracy"] > 0.6
    for line in map(json.loads, (tmp_path / "whole" / "costs.jsonl").read_text().splitlines()):
        size = {"a": 20, "b": 30, "c": 40}[line["client"]]
        steps = 3 * int(line["rounds"])
        told = example_epsilon(1.0, batch_size=10, examples=size, steps=steps, delta=1e-3)
        assert (line["example_epsilon"], line["example_delta"]) == (told, 1e-3)


@pytest.mark.parametrize(
    "made",
    [
        fd.qfedavg,
        lambda client: fd.afl(client, domains=[0, 1]),
        lambda client: fd.fedavg(client, personal=fd.ifca(2)),
        lambda client: composed(client, fd.self_checked(within={"loss": (0.0, 1.5)})),
    ],
)
def test_methods_that_look_at_the_data_otherwise_are_refused(made: Any) -> None:
    with pytest.raises(NoGuarantee, match="the noise in their training does not cover that"):
        made(fd.dp_sgd(0.1, clip=1.0, noise_multiplier=1.0, batch_size=4, steps=2))


def small(method: Method) -> tuple[fd.Task, fd.Algorithm, fd.Clients]:
    task = fd.Task(lambda: nn.Linear(4, 2), nn.functional.cross_entropy)
    local = fd.dp_sgd(0.1, clip=1.0, noise_multiplier=1.0, batch_size=4, steps=2)
    clients = fd.Clients.of({i: (np.ones((6, 4), "f4"), np.zeros(6, int)) for i in range(2)})
    return task, composed(local, method), clients


@pytest.mark.parametrize("request_", [Measure(np.zeros(10, "f4")), Consult(lambda examples: examples.targets)])
def test_a_method_that_does_not_say_so_gets_no_answer(request_: Any) -> None:
    def local(visit: Visit) -> Local:
        yield request_
        return Contribution.of((yield Train()), visit)

    how = fd.Settings(progress=False, executor=fd.executors.debug())
    with pytest.raises(NoGuarantee, match=f"asks for a {type(request_).__name__} of their data, which has no noise"):
        fd.simulate(*small(Method(local, "asks()")), rounds=1, settings=how)


def test_what_is_not_known_of_an_example_is_not_left_out(tmp_path: Path) -> None:
    how = fd.Settings(folder=tmp_path / "run", progress=False, executor=fd.executors.debug())
    fd.simulate(*small(averaging()), rounds=1, settings=how)
    (line, _) = map(json.loads, (tmp_path / "run" / "costs.jsonl").read_text().splitlines())
    assert line["example_epsilon"] is None


# --- a budget of every client's own ---------------------------------------------------------------------------


def spending_run(folder: Path, rounds: int, **changes: Any) -> fd.Run:
    """Three clients of 20, 30 and 40 examples, all of them asked in every round."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 4)).astype("f4")
    y = (x[:, 0] > 0).astype(int)
    parts = {"a": (x[:20], y[:20]), "b": (x[20:50], y[20:50]), "c": (x[50:], y[50:])}
    local = fd.dp_sgd(0.5, clip=1.0, noise_multiplier=1.0, batch_size=10, steps=3, delta=1e-3, budget=7.0)
    told = {"progress": False, "checkpoint_seconds": 0.0, "executor": fd.executors.debug()} | changes
    return fd.simulate(
        fd.Task(lambda: nn.Linear(4, 2), nn.functional.cross_entropy, metrics=[fd.accuracy]),
        fd.fedavg(local), fd.Clients.of(parts, central_test=(x, y)), rounds=rounds, cohort=3,
        settings=fd.Settings(folder=folder, **told),
    )  # fmt: skip


def visits_within(examples: int) -> int:
    """How many visits of three steps a budget of 7 allows, by brute force."""
    event = Sampled(10 / examples, Gaussian(1.0))
    return next(n for n in range(1000) if rdp([(event, 3 * (n + 1))], 1e-3) > 7.0)


@pytest.mark.slow
def test_a_client_ends_its_part_before_its_budget_would_be_exceeded_and_the_run_when_all_have(tmp_path: Path) -> None:
    whole = spending_run(tmp_path / "whole", 100)
    visits = {name: visits_within(n) for name, n in (("a", 20), ("b", 30), ("c", 40))}
    assert 0 < visits["a"] < visits["b"] < visits["c"] < 99, "the fewer examples, the sooner"
    for name, most in visits.items():
        rounds = [m["round"] for m in whole.metrics if name in {row["client"] for row in m.get("spent", [])}]
        assert rounds == list(range(most + 1, visits["c"] + 2)), "asked for the last time that it may, and never again"
    assert [m["trained"] for m in whole.metrics] == [
        sum(n < visit for visit in visits.values()) for n in range(visits["c"] + 1)
    ]
    for line in map(json.loads, (tmp_path / "whole" / "costs.jsonl").read_text().splitlines()):
        size = {"a": 20, "b": 30, "c": 40}[line["client"]]
        spent = rdp([(Sampled(10 / size, Gaussian(1.0)), 3 * visits[line["client"]])], 1e-3)
        assert line["example_epsilon"] == pytest.approx(spent)
        assert spent <= 7.0


@pytest.mark.slow
def test_spending_survives_restarts_refusals_and_other_executors(tmp_path: Path) -> None:
    whole = spending_run(tmp_path / "whole", 100)
    for rounds in (1, 5, 6, 100, 100):  # the last call finds nothing left to do
        again = spending_run(tmp_path / "again", rounds)
    assert again.metrics == whole.metrics
    shared = spending_run(tmp_path / "shared", 100, executor=fd.executors.processes(2))
    assert shared.metrics == whole.metrics
