"""The compiled executor is the debug executor, only faster: same updates to rounding, same rules for odd clients."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import foedus as fd
import foedus.core.batches
from foedus.backends import open_trainer
from foedus.core.client import LocalSGD
from foedus.core.method import Contribution, Local, Method, Train, Visit
from foedus.core.select import Population
from foedus.core.values import SERVER, Context
from foedus.errors import ConfigurationError, TrainingError
from foedus.rounds.debug import Debug
from foedus.rounds.work import BUFFERS, Executor, Job, Orders, Outcome
from foedus.sim.compiled import Compiled
from foedus.sim.vectorised import Vectorised

pytestmark = pytest.mark.slow
F = torch.nn.functional


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))


def population(sizes: list[int], *, seed: int = 0) -> fd.Clients:
    draw = np.random.default_rng(seed)
    data = {f"c{i}": (draw.normal(size=(n, 5)).astype("f4"), draw.integers(0, 3, n)) for i, n in enumerate(sizes)}
    return fd.Clients.of(data)


def outcome(executor: Executor, job: Job) -> Outcome:
    start = open_trainer(job.task, seed=job.seed).initial()
    with executor.open(job) as session:
        return session.run(Orders(1, start, np.arange(len(job.clients))))


def decoded(job: Job, out: Outcome) -> np.ndarray:
    assert out.message is not None
    return job.algorithm.aggregator.decode({}, out.message, Context(0, 1, SERVER))[0]


def close(job: Job, tolerance: float) -> None:
    plain, fast = outcome(Debug(), job), outcome(Compiled(), job)
    assert (plain.clients, plain.examples, plain.steps) == (fast.clients, fast.examples, fast.steps)
    np.testing.assert_allclose(fast.losses, plain.losses, rtol=1e-4)
    a, b = decoded(job, plain), decoded(job, fast)
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


@pytest.mark.parametrize(
    "local",
    [
        fd.local_sgd(lr=0.1, steps=1, batch_size=4),
        fd.local_sgd(lr=0.1, epochs=2, batch_size=4, momentum=0.9, weight_decay=0.01),
        fd.local_sgd(lr=0.1, steps=3, batch_size=4, clip_norm=0.1, penalty=fd.proximal(0.1)),
    ],
    ids=lambda spec: spec.label,
)
def test_ragged_empty_and_single_example_clients(local: LocalSGD) -> None:
    task = fd.Task(net, F.cross_entropy)
    close(Job(task, fd.fedavg(local), population([13, 0, 1, 4, 30]), seed=3), 1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_clients_that_differ_a_lot_are_planned_apart(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foedus.core.batches, "ROOM", 1)
    clients = population([1, 300, 2, 0, 17, 40, 1])
    clients = clients if known else fd.Clients.generated(partial(_of, clients), 7)
    close(Job(fd.Task(net, F.cross_entropy), fd.fedavg(fd.local_sgd(0.1, batch_size=None)), clients, seed=3), 1e-5)


def test_a_generated_population() -> None:
    whole = population([9, 2, 5])
    clients = fd.Clients.generated(partial(_of, whole), range(3))
    task = fd.Task(net, F.cross_entropy)
    algorithm = fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4))
    kept, made = (outcome(Compiled(), Job(task, algorithm, c, seed=0)) for c in (whole, clients))
    assert kept.message is not None
    assert made.message is not None
    assert all((kept.message[k] == made.message[k]).all() for k in kept.message)


def test_rounds_of_a_generated_population_are_read_once_and_ahead(tmp_path: Path) -> None:
    whole, asked = population([9, 2, 5, 0, 7, 3]), Counter[int]()

    def counting(client: int) -> fd.Examples:
        asked[client] += 1
        return whole.train(client)

    made = fd.Clients.generated(counting, range(6))
    task, algorithm = fd.Task(net, F.cross_entropy), fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4))
    for name, clients in (("whole", whole), ("made", made)):
        asked.clear()
        settings = fd.Settings(executor=Compiled(), folder=tmp_path / name, progress=False)
        evaluation = fd.Evaluation(every=0)
        fd.simulate(task, algorithm, clients, cohort=3, rounds=6, evaluation=evaluation, settings=settings)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "made")]
    assert lines[0] == lines[1]
    drawn = Counter(c for number in range(1, 7) for c in fd.uniform(3).sample(Population(6, None), 0, number).tolist())
    assert asked == drawn + Counter([0, 3, 5])  # the fingerprint reads three clients, too


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cohort", [[], [1], [3, 1]])
def test_nobody_who_has_data_brings_nothing(known: bool, cohort: list[int]) -> None:
    clients = population([2, 0, 1, 0])
    clients = clients if known else fd.Clients.generated(partial(_of, clients), 4)
    job = Job(fd.Task(net, F.cross_entropy), fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4)), clients, seed=0)
    with Compiled().open(job) as session:
        found = session.run(Orders(1, open_trainer(job.task, seed=0).initial(), np.array(cohort, np.int64)))
    assert (found.message, found.clients) == (None, [])


def _of(whole: fd.Clients, client: int) -> fd.Examples:
    return whole.train(client)


def test_clients_keep_their_own_buffers() -> None:
    normed = lambda: torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))  # noqa: E731
    task = fd.Task(normed, F.cross_entropy, average_buffers=False)
    job = Job(task, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4)), population([8, 12]), seed=0)
    plain, fast = outcome(Debug(), job), outcome(Compiled(), job)
    assert plain.kept.keys() == fast.kept.keys() == {0, 1}
    for client in (0, 1):
        np.testing.assert_allclose(fast.kept[client][BUFFERS], plain.kept[client][BUFFERS], rtol=1e-4, atol=1e-6)


def test_batch_statistics_forbid_padding() -> None:
    normed = lambda: torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))  # noqa: E731
    task = fd.Task(normed, F.cross_entropy)
    with pytest.raises(ConfigurationError, match="BatchNorm"):
        outcome(Compiled(), Job(task, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4)), population([8, 11]), seed=0))


def normed() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))


def test_batches_of_few_widths_are_not_padded() -> None:
    task = fd.Task(normed, F.cross_entropy)
    close(Job(task, fd.fedavg(fd.local_sgd(lr=0.1, batch_size=9)), population([9, 5, 18, 0, 5]), seed=0), 1e-5)


@pytest.mark.parametrize(
    ("sizes", "known", "told"),
    [
        ([8, 11], True, r"last batch of client 'c1' is smaller than its others .11 examples in batches of 4"),
        ([8, 12], False, r"is not known beforehand. Give Clients.generated\(..., sizes="),
    ],
)
def test_a_spec_of_a_method_is_refused_at_its_first_use(sizes: list[int], known: bool, told: str) -> None:
    whole = population(sizes)
    clients = whole if known else fd.Clients.generated(partial(_of, whole), len(sizes))
    steps = fd.local_sgd(lr=0.1, batch_size=None, steps=1)

    def local(visit: Visit) -> Local:
        return Contribution.of((yield Train(spec=fd.local_sgd(lr=0.1, batch_size=4))), visit)

    algorithm = fd.Algorithm(client=steps, method=Method(local, "fours()"))
    with pytest.raises(ConfigurationError, match=told):
        outcome(Compiled(), Job(fd.Task(normed, F.cross_entropy), algorithm, clients, seed=0))


def test_too_many_widths_are_refused() -> None:
    job = Job(fd.Task(normed, F.cross_entropy), fd.fedsgd(lr=0.1), population(list(range(2, 40))), seed=0)
    with pytest.raises(ConfigurationError, match="38 different widths"):
        outcome(Compiled(), job)


def test_specs_made_anew_in_every_visit_need_no_new_programs() -> None:
    def local(visit: Visit) -> Local:
        spec = fd.local_sgd(lr=lambda r: 0.1, batch_size=4, penalty=fd.proximal(0.1))
        return Contribution.of((yield Train(spec=spec)), visit)

    algorithm = fd.Algorithm(client=fd.local_sgd(lr=0.1, batch_size=4), method=Method(local, "anew()"))
    job = Job(fd.Task(net, F.cross_entropy), algorithm, population([8, 4, 5]), seed=0)
    start = open_trainer(job.task, seed=0).initial()
    with Compiled().open(job) as fast, Vectorised(threads=1).open(job) as batched:
        for number in range(1, 4):
            for session in (fast, batched):
                session.run(Orders(number, start, np.arange(3)))
        assert (len(fast._programs), len(batched._others)) == (1, 1)


def test_averaged_whole_numbers_among_buffers_agree(tmp_path: Path) -> None:
    task, clients = fd.Task(normed, F.cross_entropy), population([8, 12, 4])
    runs = []
    for executor in (Debug(), Vectorised(threads=1), Compiled()):
        settings = fd.Settings(executor=executor, folder=tmp_path / executor.name, progress=False)
        algorithm = fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4))
        runs.append(fd.simulate(task, algorithm, clients, rounds=3, settings=settings).weights.buffers)
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4)
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-4)


def test_a_label_out_of_range_is_an_error_that_names_the_client() -> None:
    x = np.ones((4, 5), np.float32)
    clients = fd.Clients.of({"good": (x, [0, 1, 2, 0]), "bad": (x, [0, 1, 7, 0])})
    job = Job(fd.Task(net, F.cross_entropy), fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4)), clients, seed=0)
    with pytest.raises(TrainingError, match=r"'bad' in round 1.*out of bounds.*to 7"):
        outcome(Compiled(), job)


def test_own_optimisers_are_refused() -> None:
    own = fd.local_training(optimiser=lambda p: torch.optim.AdamW(p))
    job = Job(fd.Task(net, F.cross_entropy), fd.fedavg(own), population([4]), seed=0)
    with pytest.raises(ConfigurationError, match="local_sgd"):
        Compiled().open(job)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_client_that_diverges_is_refused_by_name_and_nobody_else(bad: int) -> None:
    draw = np.random.default_rng(0)
    data = {f"c{i}": (draw.normal(size=(6, 5)).astype("f4"), draw.integers(0, 3, 6)) for i in range(4)}
    data[f"c{bad}"][0][2, 1] = np.nan
    job = Job(fd.Task(net, F.cross_entropy), fd.fedavg(fd.local_sgd(lr=0.1, batch_size=3)), fd.Clients.of(data), seed=0)
    plain, fast = outcome(Debug(), job), outcome(Compiled(), job)
    assert [r.client for r in fast.refused] == [r.client for r in plain.refused] == [bad]
    np.testing.assert_allclose(decoded(job, fast), decoded(job, plain), rtol=1e-3, atol=1e-6)
