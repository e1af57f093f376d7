"""The server's half against strangers: whatever is wrong with a parcel is refused with its reason, and changes nothing.

That honest parcels end with the simulator's bits: tests/conformance/test_parcels.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import foedus as fd
from foedus.backends import Weights
from foedus.core.aggregate import add
from foedus.core.linear import logistic
from foedus.core.method import Contribution, averaging
from foedus.errors import MalformedMessage, ProtocolError, Reason, UpdateRefused
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.protocol import blob
from foedus.protocol.blob import Tensors
from foedus.rounds.evaluate import ClientFigures
from foedus.rounds.freight import figures_blob, figures_of, orders_blob, orders_of, parcel_of, update_blob
from foedus.rounds.lines import round_line
from foedus.rounds.parcel import Carried, Intake, Parcel, Terms, outward, packed
from foedus.rounds.state import COSTS, RunState
from foedus.rounds.untold import stands_for
from foedus.rounds.work import Job, Orders, Outcome, Refusal
from foedus.tree import Layout

SIZE = 7
LAYOUTS = (Layout(("w", "v"), ((5,), (2,)), ("float32",) * 2), Layout(("mean",), ((2,),), ("float32",)))
CLIENTS = fd.Clients.of({i: (np.ones((2, 5), np.float32), [0, 1]) for i in range(12)})
START = Weights(np.zeros(SIZE, np.float32), np.zeros(2, np.float32))


def terms(aggregator: Any = None, **more: Any) -> Terms:
    side = averaging()._replace(sides={"control": fd.mean(weighted=False)})
    algorithm = fd.Algorithm(client=fd.local_sgd(0.1), aggregator=aggregator or fd.mean(), method=side, **more)
    job = Job(fd.Task(logistic(5, 2)), algorithm, CLIENTS, seed=0)
    return Terms.of(job, Orders(1, START, np.arange(12)), LAYOUTS)


def brought(scale: float = 1.0) -> Contribution:
    vector = scale * np.linspace(-1, 1, SIZE, dtype=np.float32)
    return Contribution(vector, sides={"control": np.arange(3, dtype=np.float64)}, buffers=np.ones(2, np.float32))


def honest(these: Terms, client: int = 3, scale: float = 1.0) -> Parcel:
    return packed(these, client, brought(scale), 5)


def with_entry(channel: str, name: str, value: Any) -> Callable[[Parcel], Parcel]:
    def change(parcel: Parcel) -> Parcel:
        messages = {c: dict(m) for c, m in parcel.messages.items()}
        messages[channel][name] = value
        return parcel._replace(messages=messages)

    return change


def carried(channel: str, size: int, dtype: str) -> Callable[[Parcel], Parcel]:
    return lambda parcel: parcel._replace(vectors={**parcel.vectors, channel: Carried(size, dtype)})


UNIT = 2**20
RULES = [fd.mean(), fd.median(), fd.chain(fd.rotate(), fd.quantise(4), fd.mean()), fd.sign_majority()]
ATTACKS: dict[str, tuple[Callable[[Parcel], Parcel], Reason]] = {
    "too short": (with_entry("update", "values", np.zeros(6, np.float32)), Reason.SHAPE),
    "too long": (with_entry("update", "values", np.zeros(8, np.float32)), Reason.SHAPE),
    "a matrix": (with_entry("update", "values", np.zeros((7, 1), np.float32)), Reason.SHAPE),
    "NaN": (with_entry("update", "values", np.full(7, np.nan, np.float32)), Reason.NOT_FINITE),
    "infinite": (with_entry("update", "values", np.full(7, -np.inf, np.float32)), Reason.NOT_FINITE),
    "NaN beside": (with_entry("control", "values", np.full(3, np.nan)), Reason.NOT_FINITE),
    "NaN in buffers": (with_entry("buffers", "values", np.full(2, np.nan, np.float32)), Reason.NOT_FINITE),
    "another dtype": (with_entry("update", "values", np.zeros(7, np.float64)), Reason.DTYPE),
    "whole numbers": (with_entry("update", "values", np.zeros(7, np.int32)), Reason.DTYPE),
    "pretends to be a sum": (with_entry("update", "high", np.full(7, 2**60, np.int64)), Reason.SHAPE),
    "a sum's bound": (with_entry("update", "bound", np.zeros(1)), Reason.SHAPE),
    "a weight of its own": (with_entry("update", "weight", np.array([50 * UNIT])), Reason.WEIGHT),
    "a negative weight": (with_entry("update", "weight", np.array([-5 * UNIT])), Reason.WEIGHT),
    "two weights": (with_entry("update", "weight", np.array([UNIT, UNIT])), Reason.SHAPE),
    "an unweighted mean's weight": (with_entry("control", "weight", np.array([5 * UNIT])), Reason.WEIGHT),
    "claims too much": (lambda p: p._replace(weight=1e6), Reason.WEIGHT),
    "claims nothing": (lambda p: p._replace(weight=0.0), Reason.WEIGHT),
    "claims NaN": (lambda p: p._replace(weight=float("nan")), Reason.WEIGHT),
    "no examples": (lambda p: p._replace(examples=0), Reason.WEIGHT),
    "negative steps": (lambda p: p._replace(steps=-1), Reason.WEIGHT),
    "huge": (with_entry("update", "values", np.full(7, 1e30, np.float32)), Reason.RANGE),
    "more than its share": (with_entry("update", "values", np.full(7, 1e11, np.float32)), Reason.RANGE),
    "another length told": (carried("update", 8, "<f4"), Reason.SHAPE),
    "another dtype told": (carried("update", 7, "<i4"), Reason.DTYPE),
    "an object told": (carried("control", 3, "|O8"), Reason.DTYPE),
    "an array missing": (lambda p: p._replace(messages={**p.messages, "update": {}}), Reason.SHAPE),
    "a channel nobody has": (
        lambda p: p._replace(
            messages={**p.messages, "x": p.messages["control"]}, vectors={**p.vectors, "x": Carried(3, "<f8")}
        ),
        Reason.SHAPE,
    ),
}


@pytest.mark.parametrize(("attack", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_what_is_wrong_is_refused_with_its_reason_and_changes_nothing(attack: Any, reason: Reason) -> None:
    these = terms(gate=fd.Gate(max_weight=100))
    intake = Intake(these, seats=12)
    intake.take(1, honest(these, 1))
    before = copy.deepcopy(intake.outcome)
    with pytest.raises(UpdateRefused) as caught:
        intake.take(3, attack(honest(these)))
    assert (caught.value.reason, caught.value.client) == (reason, 3)
    np.testing.assert_equal(vars(intake.outcome), vars(before))
    intake.take(3, honest(these))  # what was refused is not counted
    assert intake.counted == {1, 3}


def test_a_client_is_counted_once() -> None:
    these = terms()
    intake = Intake(these, seats=12)
    intake.take(3, honest(these))
    with pytest.raises(UpdateRefused, match="is counted already in round 1"):
        intake.take(3, honest(these))
    resumed = Intake(these, seats=12, outcome=intake.outcome, counted=frozenset(intake.counted))
    with pytest.raises(UpdateRefused, match="is counted already"):
        resumed.take(3, honest(these))


def test_later_clients_send_as_many_entries_beside_the_update_as_the_first() -> None:
    these = terms()
    intake = Intake(these, seats=12)
    intake.take(1, honest(these, 1))
    longer = packed(these, 2, brought()._replace(sides={"control": np.zeros(4)}), 5)
    with pytest.raises(UpdateRefused, match="sent 4 entries in 'control', and there are 3"):
        intake.take(2, longer)


@pytest.mark.parametrize("rule", [fd.mean(), fd.median(), fd.krum(1), fd.chain(fd.quantise(8), fd.mean())])
def test_the_norm_is_looked_at_where_the_gate_asks(rule: fd.Aggregator) -> None:
    these = terms(rule, gate=fd.Gate(max_norm=10.0))
    intake = Intake(these, seats=12)
    intake.take(1, honest(these, 1, scale=2.0))
    with pytest.raises(UpdateRefused, match="at most 10 passes") as caught:
        intake.take(2, honest(these, 2, scale=200.0))
    assert caught.value.reason is Reason.NORM


@given(st.integers(1, 2**20), st.floats(1, 2.0**31), st.floats(0, 2.0**41))
def test_as_many_as_there_are_seats_always_add_up(seats: int, weight: float, peak: float) -> None:
    """Nobody can fill the sum up for the others: whoever is let in leaves room for all."""
    these = terms()._replace(orders=Orders(1, START, np.arange(12)))
    one = Contribution(np.full(SIZE, peak, np.float32))
    parcel = packed_or_none(these, one, weight)
    intake = Intake(these, seats=seats)
    if parcel is None or not taken(intake, parcel):
        return
    total = intake.outcome.message
    assert total is not None
    for _ in range(min(20, seats.bit_length() - 1)):  # doubled as long as there are seats for it
        total = add({n: a.copy() for n, a in total.items()} if "high" in total else total, total)


def packed_or_none(these: Terms, one: Contribution, weight: float) -> Parcel | None:
    try:
        return packed(these, 0, one._replace(weight=weight), 1)
    except (fd.errors.SumOverflow, UpdateRefused):
        return None


def taken(intake: Intake, parcel: Parcel) -> bool:
    try:
        intake.take(0, parcel)
    except UpdateRefused:
        return False
    return True


# --- bytes


def test_a_parcel_is_the_same_after_its_journey_and_what_is_kept_stays() -> None:
    these = terms()
    parcel = packed(these, 3, brought()._replace(kept={"c": np.ones(2)}, report={"x": float("inf")}, loss=0.1), 5)
    assert parcel.kept is not None
    again = parcel_of(blob.unpack(update_blob(parcel)))
    assert again.kept is None
    np.testing.assert_equal(again._asdict(), parcel._replace(kept=None)._asdict())
    assert update_blob(again) == update_blob(parcel)


def test_figures_are_the_same_after_their_journey() -> None:
    for found in (
        ClientFigures(7, {"loss": 0.1, "accuracy": float("nan")}),
        ClientFigures(7, {}, {"loss": float("inf")}),
    ):
        np.testing.assert_equal(figures_of(blob.unpack(figures_blob(found))), found)


def told(change: dict[str, str | None]) -> Tensors:
    whole = blob.unpack(update_blob(honest(terms())))
    texts = {n: v for n, v in (whole.told | change).items() if v is not None}
    return whole._replace(told=texts)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "orders"}, {"kind": None}, {"examples": "-1"}, {"examples": "1e3"}, {"examples": "9" * 30},
        {"examples": None}, {"steps": "many"}, {"loss": "x"}, {"weight": None}, {"weight": "1" * 50},
        {"report": "[]"}, {"report": "{"}, {"report": '{"a": 1}'}, {"report": "[" * 10000},
        {"report": json.dumps({str(i): "0" for i in range(100)})}, {"report": '{"\\u001b": "0"}'},
        {"vectors": None}, {"vectors": '{"update": [1]}'}, {"vectors": '{"update": ["7", "<f4"]}'},
        {"vectors": '{"update": [true, "<f4"]}'}, {"vectors": '{"update": [-7, "<f4"]}'}, {"vectors": "{}"},
        {"vectors": '{"update": [7, "<f4, <f4"]}'},
    ],
)  # fmt: skip
def test_texts_that_make_no_sense_are_refused(change: dict[str, str | None]) -> None:
    with pytest.raises(MalformedMessage):
        parcel_of(told(change))


def test_orders_for_another_model_are_refused() -> None:
    these = terms()
    given_ = blob.unpack(orders_blob(these.orders, these.travels, run="study"))
    read = orders_of(given_, START, these.travels)
    np.testing.assert_array_equal(read.start.vector, START.vector)
    with pytest.raises(MalformedMessage, match=r"vector takes float32\[8\], and float32\[7\] came"):
        orders_of(given_, Weights(np.zeros(8, np.float32), START.buffers), these.travels)
    with pytest.raises(MalformedMessage, match="this blob is no orders"):
        orders_of(blob.unpack(update_blob(honest(these))), START, these.travels)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_update_is_taken_or_refused(data: st.DataObject) -> None:
    """Bits flipped anywhere: a typed error, or a parcel that the intake takes or refuses; never anything else."""
    these = terms(data.draw(st.sampled_from(RULES)))
    whole = bytearray(update_blob(honest(these)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        parcel = parcel_of(blob.unpack(bytes(whole)))
    except ProtocolError:
        return
    taken(Intake(these, seats=12), parcel)


# --- what is not told beside an update ------------------------------------------------------------------------

LOCAL = fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=20.0), fd.mean())
SHARES = fd.privacy.trusted_sum(
    fd.privacy.gaussian_shares(clip=1.0, noise_multiplier=1.0, cohort=12, honest=8, bits=24), planned=12
)
TELLING = Contribution(
    np.linspace(-1, 1, SIZE, dtype=np.float32), steps=47, loss=0.123456789, buffers=np.ones(2, np.float32),
    report={"sent": 0.5},
)  # fmt: skip


def plain(aggregator: Any, **more: Any) -> Terms:
    made = {"client": fd.local_sgd(0.1), "aggregator": aggregator} | more
    job = Job(fd.Task(logistic(5, 2)), fd.Algorithm(**made), CLIENTS, seed=0)
    return Terms.of(job, Orders(1, START, np.arange(12)), LAYOUTS)


def sent_of(these: Terms, examples: int = 617) -> Tensors:
    parcel = packed(these, 3, TELLING, examples, secret=known_to_all_who_know_the_seed)
    return blob.unpack(update_blob(outward(these.job.algorithm, parcel)))


@pytest.mark.parametrize("rule", [LOCAL, SHARES])
def test_noise_of_a_clients_own_travels_without_figures_from_the_same_data(rule: Any) -> None:
    told = sent_of(plain(rule))
    figures = {name: told.told[name] for name in ("examples", "weight", "steps", "loss", "report")}
    assert figures == {"examples": "1", "weight": "1.0", "steps": "0", "loss": "nan", "report": "{}"}
    other = sent_of(plain(rule), examples=9)
    assert other.told == told.told
    for name, array in told.arrays.items():  # weights within messages, those of averaged buffers, too
        assert array.tobytes() == other.arrays[name].tobytes()


def test_training_that_hides_examples_tells_no_loss_and_no_report() -> None:
    private = fd.dp_sgd(0.1, clip=1.0, noise_multiplier=1.0, batch_size=4, steps=2)
    told = sent_of(plain(fd.mean(), client=private)).told
    assert (told["examples"], told["steps"], told["loss"], told["report"]) == ("617", "47", "nan", "{}")


@pytest.mark.parametrize("rule", [LOCAL, SHARES])
def test_a_server_writes_nothing_down_that_a_client_tells_all_the_same(rule: Any) -> None:
    these = plain(rule)
    intake = Intake(these, seats=12)
    parcel = packed(these, 3, TELLING, 617, secret=known_to_all_who_know_the_seed)
    intake.take(3, parcel._replace(examples=617, weight=617.0, loss=0.1))
    out = intake.outcome
    assert (out.examples, out.steps, out.reports) == ([0], [0], {})
    assert np.isnan(out.losses).all()
    state = RunState(1, START, {}, {}, {}, np.zeros((12, len(COSTS))))
    line = round_line(these.job, state, out, np.zeros((1, len(COSTS))))
    assert (line["examples"], line["train_loss"], line["trained"]) == (None, None, 1)


def test_where_all_count_the_same_stale_models_pull_by_clients_and_not_by_examples() -> None:
    found = Outcome(clients=[1, 2, 5], examples=[10, 20, 30], refused=[Refusal(2, "too long")])
    assert stands_for(plain(fd.mean()).job.algorithm, found) == 40
    assert stands_for(plain(LOCAL).job.algorithm, found) == 2
