"""What executors bring: refused or merged, in shards or at once, with the same bits."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import foedus as fd
from foedus.backends import Weights
from foedus.core.linear import logistic
from foedus.core.method import Contribution, averaging
from foedus.core.values import SERVER, Context, Update
from foedus.errors import ConfigurationError, DataError, UpdateRefused
from foedus.rounds.collect import Collector, Gained
from foedus.rounds.state import COSTS, RunState
from foedus.rounds.work import BUFFERS, Job, Orders, Outcome, read, shards, union
from foedus.tree import Layout

LAYOUTS = (Layout(("w", "v"), ((3,), (2,)), ("float32",) * 2), Layout((), (), ()))
WITH_BUFFERS = (LAYOUTS[0], Layout(("mean",), ((2,),), ("float32",)))
X = np.ones((4, 5), np.float32)
CLIENTS = fd.Clients.of({i: (X, [0, 1, 0, 1]) for i in range(12)})
NOTHING = np.empty(0, np.float32)


def job(**changes: object) -> Job:
    given = {name: changes.pop(name) for name in ("aggregator", "gate") if name in changes}
    algorithm = fd.fedavg(fd.local_sgd(0.1), **given)  # type: ignore[arg-type]
    return Job(fd.Task(logistic(5, 2), **changes), algorithm, CLIENTS, seed=0)  # type: ignore[arg-type]


def orders(buffers: int = 0) -> Orders:
    start = Weights(np.zeros(5, np.float32), np.zeros(buffers, np.float32))
    return Orders(1, start, np.array([11, 2, 5, 7, 0, 3, 8], np.int64))


def updates(seed: int) -> list[np.ndarray]:
    """One for each of the cohort; some are not finite, some have run away."""
    rng = np.random.default_rng(seed)
    found = [v.astype(np.float32) for v in rng.normal(size=(7, 5)) * 10.0 ** rng.integers(-9, 6, (7, 1))]
    for i in np.flatnonzero(rng.random(7) < 0.2):
        found[i][rng.integers(5)] = rng.choice([np.nan, np.inf, -np.inf, 3e38])
    return found


def collected(this: Job, given: list[np.ndarray], slots: list[int], *, at_once: bool = False) -> Outcome:
    collector = Collector(this, orders(), LAYOUTS)
    if at_once:
        count = len(slots)
        vectors = [given[s] for s in slots]
        collector.add_all(slots, Gained(vectors, [NOTHING] * count, [s + 1 for s in slots], [2] * count, [0.5] * count))
    else:
        for slot in slots:
            collector.contribute(slot, Contribution(given[slot], steps=2, loss=0.5), slot + 1)
    return collector.outcome


def same(a: Outcome, b: Outcome) -> bool:
    told = ("clients", "examples", "steps", "losses", "refused", "sent", "senders")
    if (a.message is None) != (b.message is None) or any(getattr(a, n) != getattr(b, n) for n in told):
        return False
    if a.message is None or b.message is None:
        return True
    one, two = (fd.mean().decode({}, m, Context(0, 1, SERVER))[0] for m in (a.message, b.message))
    return one.tobytes() == two.tobytes()


HALVED = fd.mean()._replace(encode=lambda u, context: fd.mean().encode(u._replace(vector=u.vector / 2), context))


@given(st.integers(0, 2**32))
@pytest.mark.parametrize("rule", [HALVED, fd.chain(HALVED)], ids=["replaced", "replaced, in a chain"])
def test_a_users_own_encode_is_called_for_every_update(rule: fd.Aggregator, seed: int) -> None:
    this, given_ = job(aggregator=rule), updates(seed)
    at_once = collected(this, given_, list(range(7)), at_once=True)
    assert same(at_once, collected(this, given_, list(range(7))))
    plain = collected(job(aggregator=fd.mean()), given_, list(range(7)), at_once=True)
    assert plain.message is None or not same(at_once, plain)


@given(st.integers(0, 2**32))
@pytest.mark.parametrize("gate", [fd.Gate(), fd.Gate(max_norm=10.0), fd.Gate(max_weight=4.0)], ids=lambda g: g.label)
@pytest.mark.parametrize(
    "rule",
    [
        fd.mean(),
        fd.mean(weighted=False),
        fd.chain(fd.clip(1.0), fd.mean()),
        fd.privacy.central(clip=1.0, noise_multiplier=1.0, cohort=7),
        fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=1.0), fd.mean()),
    ],
    ids=lambda r: r.label,
)
def test_how_a_cohort_is_cut_changes_nothing(rule: fd.Aggregator, gate: fd.Gate, seed: int) -> None:
    """Nor does whether a gate looks at updates one by one or at all at once."""
    this, given_ = job(aggregator=rule, gate=gate), updates(seed)
    rng = np.random.default_rng(seed)
    whole = union(this, [collected(this, given_, list(range(7)))])
    cut = np.split(rng.permutation(7), np.sort(rng.integers(0, 8, 3)))
    parts = [collected(this, given_, p.tolist(), at_once=bool(rng.integers(2))) for p in cut]
    assert same(whole, union(this, parts))
    assert whole.clients == sorted(orders().cohort.tolist())


@given(st.integers(0, 2**32))
def test_only_what_is_finite_and_in_range_is_let_in(seed: int) -> None:
    this, given_ = job(aggregator=fd.mean(weighted=False)), updates(seed)
    found = collected(this, given_, list(range(7)))
    good = [i for i, v in enumerate(given_) if np.isfinite(v).all() and np.abs(v).max() < 2.0**42]
    cohort = orders().cohort
    assert sorted(r.client for r in found.refused) == sorted(int(cohort[i]) for i in range(7) if i not in good)
    if good:
        assert found.message is not None
        wanted = np.mean([given_[i].astype(np.float64) for i in good], axis=0)
        mean, _ = fd.mean().decode({}, found.message, Context(0, 1, SERVER))
        np.testing.assert_allclose(mean, wanted, rtol=1e-9, atol=1e-9)
    else:
        assert found.message is None


@pytest.mark.parametrize(
    ("vector", "buffers", "reason"),
    [
        ([0, 0, 0, np.nan, np.nan], [0, 0], r"the update of client 5 has nan in parameter 'v' (2 values not finite)"),
        ([0, -np.inf, 0, 0, 0], [0, 0], r"the update of client 5 has -inf in parameter 'w' (1 values not finite)"),
        ([0] * 5, [0, np.inf], r"buffer 'mean' is inf (1 values not finite)"),
    ],
)
def test_a_refusal_names_the_array(vector: list[float], buffers: list[float], reason: str) -> None:
    collector = Collector(job(), orders(2), WITH_BUFFERS)
    brought = Contribution(np.array(vector, np.float32), buffers=np.array(buffers, np.float32), steps=1, loss=1.0)
    collector.contribute(2, brought, 3)
    assert collector.outcome.refused == [(5, reason)]
    assert collector.outcome.message is None
    assert collector.outcome.kept == {}


@pytest.mark.parametrize(
    ("brought", "reason"),
    [
        (Contribution(np.ones(4, np.float32)), "has the shape (4,), and the model has 5 parameters"),
        (Contribution(np.ones((1, 5), np.float32)), "has the shape (1, 5), and the model has 5 parameters"),
        (Contribution(np.ones(5, np.int64)), "has the dtype int64, and updates are floating-point numbers"),
        (Contribution(np.ones(5, np.float32), weight=float("nan")), "claims the weight nan"),
        (Contribution(np.ones(5, np.float32), weight=0.0), "claims the weight 0.0"),
        (Contribution(np.ones(5, np.float32), weight=-3.0), "claims the weight -3.0"),
        (Contribution(np.ones(5, np.float32), weight=1e-9), "a client's weight must lie in"),
        (Contribution(np.ones(5, np.float32), buffers=np.ones(3, np.float32)), "has buffers of shape (3,)"),
        (Contribution(np.ones(5, np.float32), sides={"more": np.ones((2, 2))}), "has 'more' of shape (2, 2)"),
        (Contribution(np.ones(5, np.float32), sides={"more": np.array(["a"])}), "has 'more' of dtype <U1"),
        (Contribution(None, weight=-1.0, sides={"more": np.ones(2)}), "claims the weight -1.0"),
    ],
)
def test_what_is_malformed_is_refused_and_others_count(brought: Contribution, reason: str) -> None:
    aside = averaging()._replace(sides={"more": fd.mean()})
    this = job()
    collector = Collector(replace(this, algorithm=replace(this.algorithm, method=aside)), orders(2), WITH_BUFFERS)
    collector.contribute(0, Contribution(np.ones(5, np.float32), buffers=np.ones(2, np.float32)), 3)
    collector.contribute(2, brought, 3)
    assert [r.client for r in collector.outcome.refused] == [5]
    assert reason in collector.outcome.refused[0].reason
    assert collector.outcome.message is not None
    assert collector.outcome.senders == 1
    assert collector.outcome.sides == {}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_client_counts_once_in_a_round(single: bool, at_once: bool) -> None:
    twice = replace(orders(), cohort=np.array([3, 8, 3]), single=single)
    vectors = [np.full(5, v, np.float32) for v in (1.0, 2.0, 4.0)]
    collector = Collector(job(), twice, LAYOUTS)
    if at_once:
        collector.add_all(range(3), Gained(vectors, [NOTHING] * 3, [1] * 3, [1] * 3, [0.5] * 3))
    else:
        for slot, vector in enumerate(vectors):
            collector.contribute(slot, Contribution(vector), 1)
    found = collector.outcome
    assert [(r.client, "counted already" in r.reason) for r in found.refused] == [(3, True)]
    if single:
        assert found.given[3].contribution.update is not None
        assert found.given[3].contribution.update[0] == 1.0
    else:
        assert found.message is not None
        mean, _ = fd.mean().decode({}, found.message, Context(0, 1, SERVER))
        np.testing.assert_array_equal(mean, np.full(5, 1.5))


def test_sums_in_which_a_client_is_twice_are_not_merged() -> None:
    parts = [collected(job(), [np.ones(5, np.float32)] * 7, list(range(2))) for _ in range(2)]
    with pytest.raises(UpdateRefused, match=r"client 2 was trained in two parts of one round"):
        union(job(), parts)


@pytest.mark.parametrize(("size", "names"), [(5, ("w", "v")), (3, ("more",))])
def test_stages_of_a_methods_own_channels_know_the_layout(size: int, names: tuple[str, ...]) -> None:
    seen, rule = [], fd.mean()

    def encode(update: Update, context: Context) -> dict[str, np.ndarray]:
        seen.append(context.layout and context.layout.names)
        return rule.encode(update, context)

    aside = averaging()._replace(sides={"more": rule._replace(encode=encode)})
    this = job()
    collector = Collector(replace(this, algorithm=replace(this.algorithm, method=aside)), orders(), LAYOUTS)
    collector.contribute(0, Contribution(None, sides={"more": np.ones(size)}), 3)
    assert seen == [names]


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    collector = Collector(job(aggregator=fd.chain(fd.clip(1.0), fd.mean())), orders(), LAYOUTS)
    collector.contribute(0, Contribution(np.full(5, 3e38, np.float32), steps=1, loss=1.0), 1)
    assert collector.outcome.refused == []
    assert collector.outcome.message is not None
    found, _ = fd.mean().decode({}, collector.outcome.message, Context(0, 1, SERVER))
    np.testing.assert_allclose(found, np.full(5, 5**-0.5), rtol=1e-6)


def test_buffers_are_averaged_or_kept() -> None:
    for average in (True, False):
        collector = Collector(job(average_buffers=average), orders(2), WITH_BUFFERS)
        start = orders(2).start
        for slot, value in ((0, 1.0), (1, 5.0)):
            after = Weights(start.vector + 1, np.full(2, value, np.float32))
            collector.add(slot, after, examples=[30, 10][slot], steps=1, loss=0.0)
        out = collector.outcome
        if average:
            assert out.buffers is not None
            assert fd.mean().decode({}, out.buffers, Context(0, 1, SERVER))[0].tolist() == [2.0, 2.0]
            assert out.kept == {}
        else:
            assert out.buffers is None
            own = {c: {name: b.tolist() for name, b in kept.items()} for c, kept in out.kept.items()}
            assert own == {11: {BUFFERS: [1.0, 1.0]}, 2: {BUFFERS: [5.0, 5.0]}}


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 6))
def test_shards_hold_every_slot_once_and_are_about_equal(sizes: list[int], count: int) -> None:
    parts = shards(np.array(sizes, np.int64), count)
    assert sorted(s for p in parts for s in p.tolist()) == list(range(len(sizes)))
    assert len(parts) <= count
    assert all((np.diff(p) > 0).all() for p in parts)
    if len(parts) > 1:
        loads = [sum(sizes[s] + 1 for s in p) for p in parts]
        assert max(loads) - min(loads) <= max(sizes) + 1


def test_orders_for_some_slots() -> None:
    whole = Orders(3, Weights(np.zeros(1), np.zeros(1)), np.array([4, 9, 2]), {9: {BUFFERS: np.ones(1)}, 2: {}})
    part = whole.only(np.array([2, 0]))
    assert part.cohort.tolist() == [2, 4]
    assert list(part.kept) == [2]
    assert part.round == 3


def test_errors_of_the_data_say_whose_it_is() -> None:
    with pytest.raises(DataError, match="client 1 could not be read: KeyError"):
        read(fd.Clients.generated(lambda i: {0: (X, [0] * 4)}[i], 2), 1)
    broken = CLIENTS.subset([3]).map(lambda examples: examples)
    assert len(read(broken, 0)) == 4
    lazy = fd.Clients.generated(lambda i: (X, [0] * 4), 2).map(lambda examples: examples.nothing)  # type: ignore[attr-defined]
    with pytest.raises((ConfigurationError, DataError), match="client 0 could not be read: AttributeError"):
        read(lazy, 0)


# --- state --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_a_state_comes_back_from_its_checkpoint(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((12, len(COSTS))) * (rng.random((12, 1)) < 0.5)
    state = RunState(
        round=int(rng.integers(1000)),
        weights=Weights(rng.normal(size=5), rng.normal(size=3)),
        server={"m": rng.normal(size=5), "v": rng.normal(size=5)},
        aggregator={"norm": np.asarray(rng.normal())},
        buffers={},
        method={"control": rng.normal(size=5)},
        sides={"control": {"total": rng.normal(size=5)}, "tau": {}},
        costs=costs,
        simulated_seconds=float(rng.random()),
        stopped="accuracy reached" if rng.random() < 0.5 else None,
    )
    saved = state.checkpoint("identity", "debug")
    again = RunState.restored(saved, 12, ("control", "tau"))
    assert (again.round, again.simulated_seconds, again.stopped) == (
        state.round,
        state.simulated_seconds,
        state.stopped,
    )
    np.testing.assert_array_equal(again.costs, costs)
    assert again.sides.keys() == state.sides.keys()
    assert again.sides["control"]["total"].tobytes() == state.sides["control"]["total"].tobytes()
    for name in ("server", "aggregator", "buffers", "method"):
        one, two = getattr(state, name), getattr(again, name)
        assert {k: (a.shape, a.tobytes()) for k, a in one.items()} == {
            k: (a.shape, a.tobytes()) for k, a in two.items()
        }
    assert [a.tobytes() for a in again.weights] == [a.tobytes() for a in state.weights]


def test_buffers_are_averaged_whichever_channel_the_model_travels_in() -> None:
    """IFCA and HeteroFL send parts of the model beside the update; their statistics are averaged like others'."""
    sided = averaging()._replace(sides={"part": fd.mean()}, label="sided()")
    this = replace(job(), algorithm=replace(job().algorithm, method=sided))
    collector = Collector(this, orders(2), WITH_BUFFERS)
    brought = Contribution(None, sides={"part": np.ones(3)}, buffers=np.full(2, 4.0, np.float32), steps=1, loss=0.0)
    collector.contribute(0, brought, 10)
    assert collector.outcome.buffers is not None
    assert fd.mean().decode({}, collector.outcome.buffers, Context(0, 1, SERVER))[0].tolist() == [4.0, 4.0]
    collector.contribute(1, Contribution(None, buffers=np.ones(2, np.float32), steps=1, loss=0.0), 10)  # it is silent
    assert fd.mean().decode({}, collector.outcome.buffers, Context(0, 1, SERVER))[0].tolist() == [4.0, 4.0]
