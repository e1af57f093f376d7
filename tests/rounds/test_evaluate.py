"""Evaluation: figures over clients, and metrics against brute force."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import roc_auc_score

import foedus as fd
from foedus.backends.trainer import Tally
from foedus.errors import ConfigurationError
from foedus.rounds.evaluate import check_targets, held_out, reached, spread

HIGH, LOW = fd.Metric("high", abs), fd.Metric("low", abs, better=min)
numbers = st.floats(-1e6, 1e6) | st.just(math.nan)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 10)), min_size=1, max_size=40))
def test_mean_spread_and_worst_tenth(rows: list[tuple[float, float, float]]) -> None:
    found = spread([{"high": h, "low": low, "loss": loss} for h, low, loss in rows], [HIGH, LOW])
    for i, (name, worst_first) in enumerate((("high", sorted), ("low", lambda v: sorted(v, reverse=True)))):
        known = [row[i] for row in rows if not math.isnan(row[i])]
        if len(known) < len(rows):
            assert found[name]["undefined"] == len(rows) - len(known)
        if not known:
            assert set(found[name]) == {"undefined"}
            continue
        worst = worst_first(known)[: max(1, math.ceil(len(known) / 10))]
        assert found[name]["mean"] == pytest.approx(np.mean(known), rel=1e-9, abs=1e-6)
        assert found[name]["spread"] == pytest.approx(np.std(known), rel=1e-9, abs=1e-6)
        assert found[name]["worst_decile"] == pytest.approx(np.mean(worst), rel=1e-9, abs=1e-6)
    losses = sorted((row[2] for row in rows), reverse=True)
    assert found["loss"]["worst_decile"] >= found["loss"]["mean"] - 1e-9
    assert found["loss"]["worst_decile"] <= losses[0] + 1e-9


def test_nobody_to_evaluate_gives_nothing() -> None:
    assert spread([], [HIGH]) == {}


def test_an_infinite_loss_of_one_client_is_no_warning() -> None:
    found = spread([{"loss": math.inf}, {"loss": 1.0}], [])
    assert found["loss"]["mean"] == found["loss"]["worst_decile"] == math.inf


def test_which_examples_a_client_is_evaluated_on() -> None:
    x = np.arange(20.0)[:, None]
    clients = fd.Clients.of({"a": (x, x[:, 0])})
    assert len(held_out(clients, 0)) == 20
    assert len(held_out(clients.split(validation=0.25, test=0), 0)) == 5
    assert len(held_out(clients.split(validation=0.25, test=0.1), 0)) == 2


@pytest.mark.parametrize("parts", [("test", "validation"), ("test",), ("validation",), ()])
def test_only_the_part_that_is_evaluated_on_is_read(parts: tuple[str, ...]) -> None:
    asked: list[str] = []

    def reading(name: str) -> Any:
        return lambda client: asked.append(name) or (np.zeros((client + 1, 1)), np.zeros(client + 1))

    clients = fd.Clients.generated(reading("training"), 3, **{name: reading(name) for name in parts})
    assert len(held_out(clients, 2)) == 3
    assert asked == [parts[0] if parts else "training"]


def test_a_client_without_test_examples_is_left_out_where_others_have_some() -> None:
    x = np.zeros((4, 1))
    clients = fd.Clients.of({"a": (x, x), "b": (x, x)}, test={"b": (x[:3], x[:3])})
    assert [len(held_out(clients, i)) for i in range(2)] == [0, 3]


@pytest.mark.parametrize(
    ("central", "targets", "why"),
    [
        ({"high": 0.9}, {"high": 0.9}, "high reached 0.9, wanted 0.9"),
        ({"high": 0.8}, {"high": 0.9}, None),
        ({"low": 0.8}, {"low": 0.9}, "low reached 0.8, wanted 0.9"),
        ({"loss": 0.8}, {"loss": 0.9}, "loss reached 0.8, wanted 0.9"),
        ({"loss": math.nan}, {"loss": 0.9}, None),
        ({"high": None}, {"high": 0.9}, None),
        ({"high": 0.8, "low": 0.1}, {"high": 0.9, "low": 0.2}, "low reached 0.1, wanted 0.2"),
        ({}, {"high": 0.9}, None),
        ({"high": 1.0}, None, None),
    ],
)
def test_when_a_run_may_stop(central: Any, targets: Any, why: str | None) -> None:
    assert reached(central, targets, [HIGH, LOW]) == why


def test_targets_that_will_never_be_there() -> None:
    check_targets({"loss": 1, "high": 1}, [HIGH], central=True)
    with pytest.raises(ConfigurationError, match="'low'; central evaluation gives loss, high"):
        check_targets({"low": 1}, [HIGH], central=True)
    with pytest.raises(ConfigurationError, match="no test set"):
        check_targets({"loss": 1}, [HIGH], central=False)


# --- metrics ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 7))
def test_figures_over_batches_are_those_of_the_whole(seed: int, count: int, batch: int) -> None:
    """The law of metrics: whatever the batches, the figure is that of their union."""
    rng = np.random.default_rng(seed)
    output, target = rng.normal(size=(count, 2)).round(1), rng.integers(2, size=count)
    regression, truth = rng.normal(size=(count, 1)), rng.normal(size=count)
    whole, parts = (Tally([fd.accuracy, fd.auroc]) for _ in range(2))
    whole.add(output, target)
    errors, error_parts = (Tally([fd.rmse, fd.mae]) for _ in range(2))
    errors.add(regression, truth)
    for at in range(0, count, batch):
        part = slice(at, at + batch)
        parts.add(output[part], target[part])
        error_parts.add(regression[part], truth[part])
    for one, two in ((whole.result(), parts.result()), (errors.result(), error_parts.result())):
        assert two == pytest.approx(one, rel=1e-12, nan_ok=True)
    assert errors.result()["rmse"] == pytest.approx(np.sqrt(np.mean((regression[:, 0] - truth) ** 2)))
    assert errors.result()["mae"] == pytest.approx(np.mean(np.abs(regression[:, 0] - truth)))
    assert whole.result()["accuracy"] == pytest.approx(np.mean(output.argmax(1) == target))


@given(st.integers(0, 2**32), st.integers(2, 50), st.booleans())
def test_auroc_is_scikit_learns(seed: int, count: int, two: bool) -> None:
    rng = np.random.default_rng(seed)
    target = np.concatenate([[0, 1], rng.integers(2, size=count - 2)])
    output = rng.normal(size=(count, 2) if two else (count,)).round(1)  # with ties
    score = output[:, 1] - output[:, 0] if two else output
    assert fd.auroc.value(output, target) == pytest.approx(roc_auc_score(target, score))


def test_auroc_of_one_class_is_not_defined() -> None:
    assert math.isnan(fd.auroc.value(np.ones(3), np.ones(3)))


@pytest.mark.parametrize(
    ("output", "target", "hits"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], [1, 1], [True, False]),
        ([0.3, -0.3], [1, 1], [True, False]),  # one output: above 0 means class 1
        ([[0.3], [-0.3]], [1, 0], [True, True]),
        (
            [[[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]]],
            [[0, 1]],
            [[True, True]],
        ),  # [B, class, position], as in torch
        ([[[0.9, 0.1, 0.0], [0.2, 0.8, 0.1]]], [[0, 0]], [[True, False]]),  # [B, position, class]
    ],
)
def test_accuracy_finds_the_axis_of_the_classes(output: Any, target: Any, hits: Any) -> None:
    assert fd.accuracy.value(np.array(output), np.array(target)).tolist() == hits


def test_accuracy_does_not_guess() -> None:
    with pytest.raises(ConfigurationError, match="cannot tell which axis"):
        fd.accuracy.value(np.zeros((2, 3, 3)), np.zeros((2, 3)))
    with pytest.raises(ConfigurationError, match="does not fit"):
        fd.accuracy.value(np.zeros((2, 3)), np.zeros((2, 4)))


def test_no_examples_give_no_figures() -> None:
    assert all(math.isnan(v) for v in Tally([fd.accuracy]).result().values())
