"""Bad input: each kind is a clear error, or follows a stated rule."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.core.linear import linear, logistic
from foedus.core.select import Sampler
from foedus.errors import (
    ConfigurationError,
    DataError,
    FoedusError,
    MissingExtra,
    NothingToAggregate,
    TrainingError,
)
from foedus.sim.world import phone

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
Y = (X.sum(1) > 0).astype(int)
TASK = fd.Task(logistic(4, 2), metrics=[fd.accuracy])
LOCAL = fd.local_sgd(lr=0.1, batch_size=4)
CROWDED = fd.Settings(world=fd.World(device=phone, minimum=3))


def simulate(folder: Path, clients: fd.Clients, task: fd.Task = TASK, *, local: Any = LOCAL, **more: Any) -> fd.Run:
    aggregator = more.pop("aggregator", None)
    settings = fd.Settings(
        folder=folder / "run",
        progress=False,
        executor=more.pop("executor", fd.executors.debug()),
        **more.pop("how", {}),
    )
    algorithm = fd.fedavg(local, aggregator=aggregator)
    return fd.simulate(task, algorithm, clients, rounds=more.pop("rounds", 3), settings=settings, **more)


def three(**changes: Any) -> fd.Clients:
    """Three clients of 20 examples; ``changes`` replace or add some."""
    data = {name: (X[i::3], Y[i::3]) for i, name in enumerate("abc")}
    return fd.Clients.of(data | changes, central_test=(X, Y))


# --- populations --------------------------------------------------------------------------------------------


def test_rule_an_empty_client_takes_no_step_and_carries_no_weight(tmp_path: Path) -> None:
    empty = (np.empty((0, 4)), np.empty(0, int))
    with_empty = simulate(tmp_path / "with", three(nobody=empty))
    without = simulate(tmp_path / "without", three())
    assert with_empty.weights.vector.tobytes() == without.weights.vector.tobytes()
    assert [(m["cohort"], m["trained"]) for m in with_empty.metrics] == [(4, 3)] * 3


def test_rule_a_cohort_of_empty_clients_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    clients = three(nobody=(np.empty((0, 4)), np.empty(0, int)))
    only = fd.available(lambda round: np.array([3]), fd.everybody())
    done = simulate(tmp_path, clients, cohort=only)
    assert not done.weights.vector.any()
    assert [(m["trained"], m["train_loss"]) for m in done.metrics] == [(0, None)] * 3


def test_a_population_without_any_example_is_refused(tmp_path: Path) -> None:
    clients = fd.Clients.pooled(fd.Examples.of(X, Y), [[], []])
    with pytest.raises(DataError, match="none of the 2 clients has a single training example"):
        simulate(tmp_path, clients)


def test_rule_a_client_of_one_example_trains_on_it(tmp_path: Path) -> None:
    done = simulate(tmp_path, fd.Clients.of({"one": (X[:1], Y[:1])}), rounds=1, local=fd.local_sgd(lr=1.0))
    softmax = np.array([0.5, 0.5]) - np.eye(2)[Y[0]]
    expected = -np.outer(X[0].astype(np.float32), softmax)
    np.testing.assert_allclose(done.parameters["weight"], expected, rtol=1e-6)


def test_duplicate_ids_are_refused() -> None:
    with pytest.raises(DataError, match="must differ"):
        fd.Clients.pooled(fd.Examples.of(X, Y), [[0], [1], [2]], ids=["a", "b", "a"])
    with pytest.raises(DataError, match="must differ"):
        fd.Clients.generated(lambda i: (X, Y), ids=[1, 2, 1])


@pytest.mark.parametrize("cohort", [4, 1000])
def test_a_cohort_larger_than_the_population_is_refused(tmp_path: Path, cohort: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"cohort of {cohort} clients does not fit .* of 3; write cohort=3"):
        simulate(tmp_path, three(), cohort=cohort)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize("cohort", [0, -1, 2.5, "all", True])
def test_a_cohort_that_is_no_number_of_clients_is_refused(tmp_path: Path, cohort: Any) -> None:
    with pytest.raises(ConfigurationError, match="cohort"):
        simulate(tmp_path, three(), cohort=cohort)


@pytest.mark.parametrize("drawn", [[0, 0, 1], [0, 3], [-1, 1], [0.5], [True, False, True], [[0], [1]]])
def test_a_sampler_that_gives_no_different_positions_is_refused(tmp_path: Path, drawn: Any) -> None:
    sampler = Sampler(lambda population, seed, round: np.array(drawn), lambda population: 2.0, "mine()")
    with pytest.raises(ConfigurationError, match=r"sampler mine\(\) must give different positions from 0 to 2"):
        simulate(tmp_path, three(), cohort=sampler)


def test_rule_numbers_of_numpy_are_like_pythons_own(tmp_path: Path) -> None:
    numbers = (np.float64(0.1), np.int64(2), np.int64(4), np.int64(3), np.int64(5))
    found = []
    for lr, epochs, batch, rounds, seed in (numbers, [n.item() for n in numbers]):
        local = fd.local_sgd(lr=lr, epochs=epochs, batch_size=batch)
        found.append(simulate(tmp_path, three(), local=local, rounds=rounds, seed=seed))  # the second: loaded
    assert found[0].metrics == found[1].metrics
    assert len(found[0].metrics) == 3


def test_another_rule_for_buffers_is_another_run() -> None:
    for buffers in (fd.mean(), fd.mean(weighted=False)):
        algorithm = fd.Algorithm(client=LOCAL, buffers=buffers)
        assert ("buffers" in algorithm.label) == ("weighted" in buffers.label)


def test_predictions_that_are_no_numbers_are_never_right() -> None:
    wrong = np.full((4, 2), np.nan)
    assert not fd.accuracy.value(wrong, np.array([0, 0, 1, 0])).any()
    assert np.isnan(fd.auroc.value(np.array([np.nan, 1.0, 0.0]), np.array([1, 1, 0])))


def test_numbers_beyond_float32_are_refused() -> None:
    with pytest.raises(DataError, match=r"numbers in the input beyond 3\.4e38"):
        fd.Examples.of([[1e300]], [0])
    assert fd.Examples.of([[1e300]], [0], keep_dtype=True).inputs[0].item() == 1e300


@pytest.mark.parametrize("rate", [None, "fast", float("nan"), -0.1])
def test_a_schedule_that_gives_no_rate_says_in_which_round(tmp_path: Path, rate: Any) -> None:
    local = fd.local_sgd(lr=lambda round: 0.1 if round == 1 else rate)
    with pytest.raises(ConfigurationError, match=rf"schedule gives {rate!r} in round 2; it must be a number"):
        simulate(tmp_path, three(), local=local)


def test_sizes_that_cannot_be_or_are_not_true_are_refused(tmp_path: Path) -> None:
    for sizes in ([-1, 60, 60], [0.5, 60, 60]):
        with pytest.raises(DataError, match="whole numbers of at least 0"):
            fd.Clients.generated(lambda i: (X, Y), 3, sizes=sizes)
    wrong = fd.Clients.generated(lambda i: (X, Y), 3, sizes=[60, 0, 60])
    with pytest.raises(DataError, match="client 1 gave 60 examples, and sizes says 0"):
        simulate(tmp_path, wrong)


def test_clients_of_different_shapes_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"client 'odd' has .*\[3\].* where client 'a' has .*\[4\]"):
        three(odd=(X[:, :3], Y))


def test_more_inputs_than_targets_are_refused_by_client() -> None:
    with pytest.raises(DataError, match=r"In the data of client 'odd'.*60.*59"):
        three(odd=(X, Y[1:]))


def test_generated_clients_of_another_shape_are_named_when_they_train(tmp_path: Path) -> None:
    clients = fd.Clients.generated(lambda i: (X[:, : 4 - (i == 2)], Y), 3)
    with pytest.raises(TrainingError, match=r"client 2 in round 1, step 0: .*made for 4 features.*\(3,\)") as caught:
        simulate(tmp_path, clients)
    assert (caught.value.client, caught.value.round, caught.value.step) == (2, 1, 0)
    inputs, targets = caught.value.batch
    assert inputs[0].shape == (4, 3)
    assert targets.shape == (4,)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda i: 1 / 0, "The data of client 0 could not be read: ZeroDivisionError"),
        (lambda i: X, "client 0 must be Examples or a pair"),
        (lambda i: (["a"] * 3, [0, 1, 0]), "must hold numbers"),
        (lambda i: ([[1.0], [2.0, 3.0]], [0, 1]), "cannot be read as one array"),
    ],
)
def test_a_function_that_makes_no_data_is_named(tmp_path: Path, function: Any, told: str) -> None:
    with pytest.raises(FoedusError, match=told):
        simulate(tmp_path, fd.Clients.generated(function, 3))


# --- labels and values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [2, -1, 7])
def test_labels_out_of_range_name_the_client(tmp_path: Path, label: int) -> None:
    wrong = Y[:20].copy()
    wrong[3] = label
    with pytest.raises(TrainingError, match=rf"client 'bad' in round 1.*from 0 to 1.*{label}"):
        simulate(tmp_path, three(bad=(X[:20], wrong)))


def test_labels_out_of_range_in_the_test_set(tmp_path: Path) -> None:
    with pytest.raises(FoedusError, match="0 to 1"):
        simulate(tmp_path, three().with_test((X, Y + 1)))


def test_rule_one_client_whose_numbers_are_not_finite_is_refused_counted_and_named(tmp_path: Path) -> None:
    poisoned = X[:20].copy()
    poisoned[7] = np.nan
    with_bad = simulate(tmp_path / "with", three(bad=(poisoned, Y[:20])))
    without = simulate(tmp_path / "without", three())
    assert with_bad.weights.vector.tobytes() == without.weights.vector.tobytes(), "it never enters the sum"
    for line, plain in zip(with_bad.metrics, without.metrics, strict=True):
        (refusal,) = line["refused"]
        assert refusal["client"] == "bad"
        assert "has nan in parameter 'weight'" in refusal["reason"]
        assert line["train_loss"] == plain["train_loss"]
        assert line["central"] == plain["central"]
    assert "refused" not in without.metrics[0]


def test_an_update_that_has_run_away_is_refused_too(tmp_path: Path) -> None:
    """Finite, but beyond what exact sums hold: 10²⁰ times as large as the others."""
    task = fd.Task(linear(4), metrics=[fd.rmse])
    y = X.sum(1)
    data = {"a": (X, y), "b": (X * 0.5, y), "wild": (X * 1e4, y)}
    done = simulate(tmp_path, fd.Clients.of(data, central_test=(X, y)), task, local=fd.local_sgd(lr=0.1, steps=3))
    assert [r["client"] for m in done.metrics for r in m["refused"]] == ["wild"] * 3
    assert "has diverged" in done.metrics[0]["refused"][0]["reason"]
    assert done.final["rmse"] < 2.5


def test_a_round_in_which_everybody_is_refused_is_an_error(tmp_path: Path) -> None:
    data = {name: (np.full((4, 4), np.nan), np.zeros(4, int)) for name in "ab"}
    with pytest.raises(
        NothingToAggregate, match=r"round 1: every one of the 2 updates.*client 'a': .*smaller learning"
    ) as e:
        simulate(tmp_path, fd.Clients.of(data))
    assert e.value.round == 1


def test_clipping_does_not_hide_what_is_not_finite(tmp_path: Path) -> None:
    poisoned = X[:20].copy()
    poisoned[0, 0] = np.inf
    rule = fd.chain(fd.clip(1.0), fd.mean())
    done = simulate(tmp_path, three(bad=(poisoned, Y[:20])), aggregator=rule)
    assert [r["client"] for m in done.metrics for r in m["refused"]] == ["bad"] * 3
    assert np.isfinite(done.weights.vector).all()


def test_a_learning_rate_that_makes_everything_diverge_says_what_to_try(tmp_path: Path) -> None:
    task, y = fd.Task(linear(4)), X.sum(1)
    clients = fd.Clients.of({"a": (X, y), "b": (X, y)})
    with pytest.raises(NothingToAggregate, match="smaller learning rate"):
        simulate(tmp_path, clients, task, local=fd.local_sgd(lr=100.0, steps=80), rounds=50)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_first_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    start = {"weight": np.zeros((4, 2)), "bias": np.array([0.0, value])}
    with pytest.raises(ConfigurationError, match="weights to start from are not finite: 'bias'"):
        simulate(tmp_path, three(), how={"start": start})


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ({"weight": np.zeros((4, 2))}, "lack bias; they have: weight"),
        (
            {"weight": np.zeros((2, 4)), "bias": np.zeros(2)},
            r"'weight' has shape \(2, 4\), the layout says \(4, 2\)",
        ),
        ("nowhere.safetensors", "no weights could be read from nowhere.safetensors"),
        (7, "takes a torch module, a mapping of names to arrays or a path; not int"),
    ],
)
def test_first_weights_that_do_not_fit_are_refused(tmp_path: Path, start: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        simulate(tmp_path, three(), how={"start": start})


def test_first_weights_in_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ConfigurationError, match="no weights could be read"):
        simulate(tmp_path, three(), how={"start": tmp_path / "model.safetensors"})


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: fd.simulate(LOCAL, fd.fedavg(LOCAL), three(), rounds=1), "the first must be a foedus.Task"),  # type: ignore[arg-type]
        (
            lambda: fd.simulate(TASK, LOCAL, three(), rounds=1),
            r"second .*Algorithm.* write foedus.fedavg\(local_sgd",
        ),  # type: ignore[arg-type]
        (
            lambda: fd.simulate(TASK, fd.fedavg(LOCAL), {"a": (X, Y)}, rounds=1),
            r"third .* write foedus.Clients.of",
        ),  # type: ignore[arg-type]
        (lambda: fd.simulate(TASK, fd.fedavg(LOCAL), three(), rounds=-1), "rounds must be"),
        (lambda: fd.simulate(TASK, fd.fedavg(LOCAL), three(), rounds=1.5), "rounds must be"),  # type: ignore[arg-type]
        (lambda: fd.simulate(TASK, fd.fedavg(LOCAL), three(), rounds=1, seed="one"), "seed must be"),  # type: ignore[arg-type]
        (lambda: fd.Evaluation(every=-1), "every"),
        (lambda: fd.Evaluation(every=0, stop_at={"loss": 1}), "stop_at needs evaluation"),
        (lambda: fd.Evaluation(stop_at={"loss": "1"}), r"stop_at\['loss'\] must be a number"),  # type: ignore[dict-item]
        (lambda: fd.local_training(loop=print, lr="0.1"), "lr must be a number"),  # type: ignore[arg-type]
        (lambda: fd.local_sgd(lr=0.1, epochs=True), "epochs must be a whole number"),
        (
            lambda: fd.simulate(TASK, fd.fedavg(LOCAL), three(), rounds=1, settings=fd.Settings(device="cuda")),
            "computed on the CPU; there is no device 'cuda'",
        ),
        (
            lambda: fd.simulate(TASK, fd.fedavg(LOCAL), three(), rounds=1, cohort=2, settings=CROWDED),
            r"World\(minimum=3\): no round can have so many answers, since at most 2",
        ),
        (lambda: fd.executors.by_name("warp"), "no executor is named 'warp'; there are: auto"),
        (lambda: fd.executors.processes(workers=0), "workers"),
        (lambda: fd.Task(logistic(2, 2), metrics=[fd.accuracy, fd.accuracy]), "differ from each other"),
        (lambda: fd.Task(logistic(2, 2), metrics=[fd.Metric("client", abs)]), "from loss, round, client, .*'client'"),
        (lambda: fd.Task(lambda: None), "a loss is needed"),
        (lambda: fd.Task(7, print), "model must be a function"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: Any, act: Any, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=told):
        act()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_stopping_at_a_figure_that_will_never_be_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="stop_at names 'f1'; central evaluation gives loss, accuracy"):
        simulate(tmp_path, three(), evaluation=fd.Evaluation(stop_at={"f1": 0.5}))
    with pytest.raises(ConfigurationError, match="there is no test set"):
        simulate(tmp_path, three().with_test(None), evaluation=fd.Evaluation(stop_at={"accuracy": 0.5}))


def test_a_metric_that_fails_says_on_whose_data(tmp_path: Path) -> None:
    def broken(output: Any, target: Any) -> Any:
        raise KeyError("missing")

    task = fd.Task(logistic(4, 2), metrics=[fd.Metric("broken", broken)])
    with pytest.raises(TrainingError, match=r"evaluation on the central test set failed: KeyError"):
        simulate(tmp_path, three(), task)
    with pytest.raises(TrainingError, match=r"evaluation on the data of client 'a' failed: KeyError"):
        simulate(tmp_path / "b", three().with_test(None), task, evaluation=fd.Evaluation(clients=True))


# --- torch models -------------------------------------------------------------------------------------------

FAST = ["vectorised", "compiled"]


def torch_task(make: Any, loss: Any = None) -> fd.Task:
    import torch

    return fd.Task(make, loss or torch.nn.functional.cross_entropy, metrics=[fd.accuracy])


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", *FAST])
def test_a_model_without_parameters_is_refused(tmp_path: Path, executor: str) -> None:
    import torch

    def frozen() -> Any:
        return torch.nn.Linear(4, 2).requires_grad_(False)

    for make in (torch.nn.Flatten, frozen):
        with pytest.raises(ConfigurationError, match=r"no trainable parameters.*requires_grad"):
            simulate(tmp_path, three(), torch_task(make), executor=fd.executors.by_name(executor))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", *FAST])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda t: t.nn.Linear(5, 2), r"client 'a'.*(shapes cannot be multiplied|4)"),
        (lambda t: t.nn.Sequential(t.nn.Linear(4, 2), t.nn.Conv2d(1, 1, 3)), "client 'a'"),
        (lambda t: t.nn.LSTM(4, 2), "client 'a'"),
    ],
    ids=["width", "dimensions", "a tuple for an output"],
)
def test_a_model_that_does_not_fit_the_data_names_client_and_shapes(
    tmp_path: Path, executor: str, make: Any, told: str
) -> None:
    import torch

    with pytest.raises(FoedusError, match=told):
        simulate(tmp_path, three(), torch_task(partial(make, torch)), executor=fd.executors.by_name(executor))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", *FAST])
def test_batch_norm_cannot_train_on_one_example_and_says_for_whom(tmp_path: Path, executor: str) -> None:
    import torch

    make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))  # noqa: E731
    clients = three(lonely=(X[:1], Y[:1]))
    with pytest.raises(FoedusError, match=r"lonely|last batches are smaller"):
        simulate(tmp_path, clients, torch_task(make), executor=fd.executors.by_name(executor))


@pytest.mark.slow
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "kept"])
@pytest.mark.parametrize("executor", ["debug", *FAST])
def test_rule_infinities_in_a_buffer_that_stays_as_it_is_are_no_fault(
    tmp_path: Path, executor: str, average: bool
) -> None:
    import torch

    class Masked(torch.nn.Module):
        def __init__(self, buffer: bool = True) -> None:
            super().__init__()
            self.scores = torch.nn.Linear(4, 2)
            mask = torch.full((4, 4), float("-inf")).triu(1)
            if buffer:
                self.register_buffer("mask", mask)
            else:
                self.mask = mask

        def forward(self, x: Any) -> Any:
            return self.scores(torch.softmax(x[:, None, :] + self.mask, -1).sum(1))

    found = []
    for name, make in (("buffer", Masked), ("plain", partial(Masked, buffer=False))):
        task = fd.Task(make, torch.nn.functional.cross_entropy, average_buffers=average)
        found.append(simulate(tmp_path / name, three(), task, executor=fd.executors.by_name(executor)))
    assert not any("refused" in m for m in found[0].metrics)
    np.testing.assert_allclose(found[0].weights.vector, found[1].weights.vector, rtol=1e-5)
    assert torch.equal(found[0].model.mask, Masked().mask)


@pytest.mark.slow
def test_a_module_without_shapes_says_how_to_give_it_some(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ConfigurationError, match=r"does not know the shape of 'weight'.*call it once"):
        simulate(tmp_path, three(), torch_task(lambda: torch.nn.LazyLinear(2)))

    def called() -> Any:
        net = torch.nn.LazyLinear(2)
        net(torch.zeros(1, 4))
        return net

    assert len(simulate(tmp_path, three(), torch_task(called)).metrics) == 3


@pytest.mark.slow
def test_whole_numbers_that_would_be_rounded_on_their_way_are_refused(tmp_path: Path) -> None:
    import torch

    class Numbered(torch.nn.Linear):
        def __init__(self, number: int) -> None:
            super().__init__(4, 2)
            self.register_buffer("numbers", torch.tensor([0, number]))

    for number in (2**24, -(2**24)):
        kept = simulate(tmp_path / str(number), three(), torch_task(partial(Numbered, number)))
        assert kept.model.numbers.tolist() == [0, number]
        wrong = torch_task(partial(Numbered, number + (1 if number > 0 else -1)))
        with pytest.raises(ConfigurationError, match=r"buffer 'numbers' holds whole numbers beyond 2\*\*24"):
            simulate(tmp_path / "wrong", three(), wrong)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", "auto", *FAST])
def test_one_client_of_nan_in_torch(tmp_path: Path, executor: str) -> None:
    import torch

    clients = three(a=(np.full((20, 4), np.nan), Y[:20]))  # the first, on which models are tried out
    done = simulate(
        tmp_path, clients, torch_task(lambda: torch.nn.Linear(4, 2)), executor=fd.executors.by_name(executor)
    )
    assert [r["client"] for m in done.metrics for r in m["refused"]] == ["a"] * 3
    assert np.isfinite(done.weights.vector).all()
    assert done.metrics[-1]["train_loss"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["debug", "auto", *FAST])
def test_all_clients_of_nan_in_torch(tmp_path: Path, executor: str) -> None:
    import torch

    clients = fd.Clients.of({name: (np.full((20, 4), np.nan), Y[:20]) for name in "abc"})
    with pytest.raises(NothingToAggregate, match="every one of the 3 updates"):
        simulate(
            tmp_path,
            clients,
            torch_task(lambda: torch.nn.Linear(4, 2)),
            executor=fd.executors.by_name(executor),
        )


@pytest.mark.slow
def test_a_loss_that_is_nan_is_refused_like_nan_weights(tmp_path: Path) -> None:
    import torch

    def loss(output: Any, target: Any) -> Any:
        return torch.nn.functional.cross_entropy(output, target) / (0.0 if len(target) == 3 else 1.0)

    clients = three(odd=(X[:3], Y[:3]))
    done = simulate(tmp_path, clients, torch_task(lambda: torch.nn.Linear(4, 2), loss))
    assert {r["client"] for m in done.metrics for r in m["refused"]} == {"odd"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda output, target: 3.0, "float"),
        (lambda output, target: output.detach().sum(), "grad"),
        (lambda output, target: undefined(output), "undefined"),  # type: ignore[name-defined]  # noqa: F821
    ],
    ids=["a number", "no gradient", "an error"],
)
def test_a_loss_that_is_none_names_client_and_step(tmp_path: Path, loss: Any, told: str) -> None:
    import torch

    with pytest.raises(TrainingError, match=rf"client 'a' in round 1, step 0: .*{told}"):
        simulate(tmp_path, three(), torch_task(lambda: torch.nn.Linear(4, 2), loss))


@pytest.mark.slow
def test_a_module_instead_of_its_maker_is_refused_with_the_reason() -> None:
    import torch

    with pytest.raises(ConfigurationError, match=r"give the function that makes it.*Settings\(start=module\)"):
        torch_task(torch.nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"made int, where a torch\.nn\.Module is needed"):
        simulate(Path(), three(), torch_task(lambda: 7))


# --- extras -------------------------------------------------------------------------------------------------

WITHOUT = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {missing!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

    sys.meta_path.insert(0, Missing())
    import numpy as np
    import foedus as fd
    from foedus.errors import MissingExtra

    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    clients = fd.Clients.of({{"a": (x, y), "b": (x, y)}}, central_test=(x, y))
    settings = fd.Settings(folder={folder!r}, progress=False)
    run = lambda task: fd.simulate(task, fd.fedavg(fd.local_sgd(lr=0.1)), clients, rounds=2, settings=settings)
    try:
        {act}
    except MissingExtra as error:
        print(error)
"""


def without(missing: tuple[str, ...], act: str, folder: Path) -> str:
    script = textwrap.dedent(WITHOUT).format(missing=missing, act=act, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "act", "told"),
    [
        (("torch",), "run(fd.Task(lambda: 7, print))", "torch"),
        (("jax", "jaxlib"), "run(fd.Task(fd.JaxModel(None, None), print))", "jax"),
        (("sklearn",), "fd.data.digits()", "data"),
        (("matplotlib",), "run(fd.Task(fd.logistic(3, 2))).plot()", "report"),
        (("pandas", "narwhals", "polars"), "fd.data.from_frame({'a': [1]}, client='a', target='a')", "data"),
    ],
    ids=["torch", "jax", "sklearn", "matplotlib", "frames"],
)
def test_a_missing_extra_says_what_to_install(tmp_path: Path, missing: Any, act: str, told: str) -> None:
    assert f"pip install 'foedus[{told}]'" in without(missing, act, tmp_path / "run")


@pytest.mark.slow
def test_without_any_framework_linear_models_run(tmp_path: Path) -> None:
    act = "print(run(fd.Task(fd.logistic(3, 2), metrics=[fd.accuracy])))"
    everything = ("torch", "jax", "jaxlib", "ray", "sklearn", "pandas", "polars", "matplotlib", "scipy")
    assert without(everything, act, tmp_path / "run").startswith("Run(2 rounds")


def test_the_error_of_a_missing_extra_survives_a_journey() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(MissingExtra("torch", "torch", "A torch model")))
    assert isinstance(error, ImportError)
    assert (error.package, error.extra) == ("torch", "torch")
