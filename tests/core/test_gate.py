"""The gate: what passes, what does not and why, on the server, on the client, and behind masks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import mean
from foedus.core.client import local_sgd
from foedus.core.gate import Gate, check_maskable, check_own, forms_of, self_checked
from foedus.core.method import Contribution, Local, Measure, Method, Train, Trained, Visit
from foedus.core.robust import krum, median
from foedus.core.stage import chain, clip
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, IncompatibleStages, Reason, UpdateRefused
from foedus.tree import Layout

LAYOUT = Layout(("body", "head"), ((2,), (1,)), ("float32", "float32"))
CONTEXT = Context(seed=0, round=2, client=7, layout=LAYOUT, size=3)
GOOD = Update(np.array([1.0, 2.0, 2.0], "f4"), 5.0)


def vector(*values: float, dtype: str = "f4") -> Update:
    return Update(np.array(values, dtype), 5.0)


def test_what_is_in_order_passes() -> None:
    for gate in (Gate(), Gate(max_norm=3.0, max_weight=5.0)):
        gate.check(GOOD, CONTEXT, counted={6, 8})
        gate.check(Update(GOOD.vector.astype("f8"), 5.0), CONTEXT._replace(size=0))


@pytest.mark.parametrize(
    ("update", "reason", "told"),
    [
        (vector(1, 2), Reason.SHAPE, r"has the shape \(2,\), and the model has 3 parameters"),
        (Update(np.ones((3, 1), "f4"), 1.0), Reason.SHAPE, r"shape \(3, 1\)"),
        (vector(1, 2, 2, dtype="i4"), Reason.DTYPE, "dtype int32"),
        (vector(1, 2, np.nan), Reason.NOT_FINITE, r"nan in parameter 'head' \(1 values not finite\)"),
        (vector(1, -np.inf, np.inf), Reason.NOT_FINITE, r"-inf in parameter 'body' \(2 values"),
        (vector(1e200, 1e200, 0, dtype="f8"), Reason.NOT_FINITE, "too long"),
        (vector(1, 2, 2.1), Reason.NORM, "has the norm 3.067.*at most 3 passes"),
        (vector(3e38, 3e38, 0), Reason.NORM, "has the norm 4.24"),
        (GOOD._replace(weight=5.5), Reason.WEIGHT, "claims the weight 5.5, and at most 5"),
        (GOOD._replace(weight=0.0), Reason.WEIGHT, "above 0"),
        (GOOD._replace(weight=np.nan), Reason.WEIGHT, "claims the weight nan"),
    ],
)
def test_what_is_not_in_order_is_refused_with_its_reason(update: Update, reason: Reason, told: str) -> None:
    with pytest.raises(UpdateRefused, match=f"client 7 .*{told}") as caught:
        Gate(max_norm=3.0, max_weight=5.0).check(update, CONTEXT)
    assert (caught.value.reason, caught.value.client) == (reason, 7)
    assert pickle.loads(pickle.dumps(caught.value)).reason is reason


def test_a_client_that_is_counted_already_is_a_replay() -> None:
    with pytest.raises(UpdateRefused, match="client 7 is counted already in round 2") as caught:
        Gate().check(GOOD, CONTEXT, counted={7})
    assert caught.value.reason is Reason.REPLAY


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), st.floats(1e-3, 1e30))
def test_the_norm_is_the_norm(values: list[float], bound: float) -> None:
    norm = float(np.linalg.norm(np.array(values, "f4").astype("f8")))
    if abs(norm - bound) <= 1e-5 * bound:
        return
    try:
        Gate(max_norm=bound).check(vector(*values), CONTEXT)
    except UpdateRefused:
        assert norm > bound
    else:
        assert norm < bound


# --- messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [mean(), median(), chain(clip(1.0), mean())], ids=lambda r: r.label)
def test_honest_messages_pass_and_others_are_told_what_is_wrong(rule: Any) -> None:
    forms = forms_of(rule, CONTEXT)
    message = rule.encode(GOOD, CONTEXT)
    Gate().check_message(message, forms, CONTEXT)
    wrong: list[tuple[dict[str, Any], Reason, str]] = [
        ({n: a for n, a in message.items() if n != "weight"}, Reason.SHAPE, "consists of"),
        (message | {"extra": np.ones(1)}, Reason.SHAPE, "'extra'"),
        (
            message | {"values": np.ones(4, "f4")},
            Reason.SHAPE,
            r"'values' of shape \(4,\), and should of \(3,\)",
        ),
        (message | {"values": np.ones((3, 1), "f4")}, Reason.SHAPE, "'values' of shape"),
        (message | {"values": np.ones(3, "i8")}, Reason.DTYPE, "'values' of dtype int64"),
        (message | {"values": np.full(3, np.nan, "f4")}, Reason.NOT_FINITE, "not finite"),
    ]
    for bad, reason, told in wrong:
        with pytest.raises(UpdateRefused, match=told) as caught:
            Gate().check_message(bad, forms, CONTEXT)
        assert caught.value.reason is reason
    with pytest.raises(UpdateRefused, match="counted already"):
        Gate().check_message(message, forms, CONTEXT, counted=[7])


def test_lengths_that_vary_may_vary() -> None:
    sparse = median()._replace(encode=lambda u, c: {"values": u.vector[u.vector != 0]})
    forms = forms_of(sparse, CONTEXT)
    Gate().check_message({"values": np.ones(1, "f4")}, forms, CONTEXT)
    with pytest.raises(UpdateRefused, match="shape"):
        Gate().check_message({"values": np.ones((1, 1), "f4")}, forms, CONTEXT)


# --- behind masks -------------------------------------------------------------------------------------------


def test_only_what_needs_no_single_update_goes_behind_masks() -> None:
    check_maskable(mean(), Gate())
    check_maskable(chain(clip(1.0), mean(weighted=False)))
    for rule in (median(), krum(1), chain(clip(1.0), krum(1))):
        with pytest.raises(IncompatibleStages, match=r"compares single updates.*chain\(clip\(radius\), mean"):
            check_maskable(rule)
    for gate in (Gate(max_norm=1.0), Gate(max_weight=1.0)):
        with pytest.raises(IncompatibleStages, match=r"Gate\(max_.*nobody sees these"):
            check_maskable(mean(), gate)


# --- the client's own gate ----------------------------------------------------------------------------------

VISIT = Visit(
    received=np.zeros(3, "f4"), buffers=np.zeros(1, "f4"), down={}, kept={"old": np.ones(1)}, client=0, round=1,
    seed=0, examples=10, spec=local_sgd(lr=0.1), layout=LAYOUT,
)  # fmt: skip


def driven(method: Method, answers: Mapping[float, Any]) -> tuple[Contribution, list[Any]]:
    """Drive a client by hand: training goes to all ones, figures are looked up by the first weight."""
    local, asked = method.local(VISIT), []
    answer: Any = None
    try:
        while True:
            request = local.send(answer)
            asked.append(request)
            if isinstance(request, Train):
                answer = Trained(np.ones(3, "f4"), np.full(1, 2.0, "f4"), 4, 0.5)
            else:
                assert isinstance(request, Measure)
                answer = answers[float(request.vector[0])]
    except StopIteration as end:
        return end.value, asked


def test_a_result_within_its_range_is_sent_as_it_is() -> None:
    method = self_checked(within={"loss": (0.0, 1.5), "accuracy": (0.9, np.inf)})
    sent, asked = driven(method, {0.0: {"loss": 1.0, "accuracy": 0.5}, 1.0: {"loss": 1.4, "accuracy": 0.45}})
    assert [type(r) for r in asked] == [Measure, Train, Measure]
    assert asked[2].buffers.tolist() == [2.0]
    assert sent.update is not None
    assert sent.update.tolist() == [1, 1, 1]
    assert sent.report == {"withheld": 0.0}


@pytest.mark.parametrize(
    "after",
    [{"loss": 1.6, "accuracy": 1.0}, {"loss": 0.1, "accuracy": 0.4}, {"loss": np.nan, "accuracy": 1.0}],
)
def test_a_result_outside_contributes_nothing_and_leaves_no_trace(after: dict[str, float]) -> None:
    def local(visit: Visit) -> Local:
        trained = yield Train()
        brought = Contribution.of(trained, visit)
        return brought._replace(sides={"control": trained.vector}, kept={"new": np.ones(2)}, report={"far": 1.0})

    inner = Method(local, "inner()", sides={"control": mean()})
    method = self_checked(inner, within={"loss": (0.0, 1.5), "accuracy": (0.9, np.inf)})
    sent, _ = driven(method, {0.0: {"loss": 1.0, "accuracy": 0.5}, 1.0: after})
    assert sent.update is None
    assert sent.sides == {}
    assert sent.buffers is None
    assert sent.kept == VISIT.kept
    assert sent.report == {"far": 1.0, "withheld": 1.0}
    assert method.sides == inner.sides


def test_a_method_that_sends_nothing_is_left_alone() -> None:
    def local(visit: Visit) -> Local:
        yield Train()
        return Contribution(None)

    sent, asked = driven(self_checked(Method(local, "silent()"), within={"loss": (0, 2)}), {0.0: {"loss": 1.0}})
    assert sent == Contribution(None) or sent.update is None
    assert len(asked) == 2


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_range_is_relative_to_what_was_received(before: float, after: float) -> None:
    assert check_own(before, after, (0.5, 2.0)) == (before / 2 <= after <= before * 2)
    assert not check_own(before, float("inf"), (0.0, np.inf))


@pytest.mark.parametrize(
    "build",
    [
        lambda: self_checked(within={}),
        lambda: self_checked(within={"loss": (2, 1)}),
        lambda: Gate(max_norm=0.0),
    ],
)
def test_values_that_cannot_be_are_refused_when_written(build: Any) -> None:
    with pytest.raises(ConfigurationError):
        build()
