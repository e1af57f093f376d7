"""Stages that see layers: projections and factors against plain linear algebra, and who is left alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.core.aggregate import fold, mean, message_bytes
from foedus.core.entropy import entropy
from foedus.core.layers import low_rank, matrices, on_layers, power_sgd
from foedus.core.quantise import eden, quantise
from foedus.core.rotation import rotate
from foedus.core.sparse import random_mask, top_k
from foedus.core.stage import Stage, chain
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError, IncompatibleStages, UpdateRefused
from foedus.tree import Layout

SHAPES = {"conv": (8, 3, 2, 2), "bias": (8,), "dense": (20, 16), "scale": (), "small": (2, 3)}
LAYOUT = Layout(tuple(SHAPES), tuple(SHAPES.values()), ("float32",) * len(SHAPES))
MATRICES = ("conv", "dense", "small")


def context(**changes: int) -> Context:
    return Context(3, 1, 0, LAYOUT, size=LAYOUT.size)._replace(**changes)


def update(seed: int = 0) -> Update:
    return Update(np.random.default_rng(seed).standard_normal(LAYOUT.size).astype("f4"), 1.0)


def gone_through(stage: Stage, vector: np.ndarray, **changes: int) -> dict[str, np.ndarray]:
    found = stage.decode(stage.encode(Update(vector, 1.0), context(**changes)), context(**changes))
    return LAYOUT.unflatten(found.vector)


STAGES = [
    low_rank(4),
    low_rank(4, unbiased=False),
    power_sgd(2),
    matrices(quantise(3)),
    matrices(rotate()),
    matrices(top_k(0.3)),
    matrices(random_mask(0.5), eden(2), entropy()),
    on_layers(lambda name, shape: name == "dense", eden(2)),
    on_layers(lambda name, shape: False, eden(2)),
    on_layers(lambda name, shape: True, random_mask(0.5)),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.label)
def test_whatever_is_no_matrix_comes_through_untouched(stage: Stage) -> None:
    sent = update()
    found, wanted = gone_through(stage, sent.vector), LAYOUT.unflatten(sent.vector)
    untouched = ("bias", "scale") if "<lambda>" not in stage.label else ("conv",) if "eden" in stage.label else ()
    for name in untouched:
        assert found[name].tobytes() == wanted[name].tobytes()


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.label)
def test_the_length_is_the_one_that_was_told(stage: Stage) -> None:
    assert len(stage.encode(update(), context()).vector) == stage.size(LAYOUT.size, LAYOUT)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.label)
def test_what_is_no_such_message_is_refused(stage: Stage) -> None:
    sent, there = stage.encode(update(), context()), context(client=5)
    for vector in [
        sent.vector[:-1],
        sent.vector[None],
        np.full(len(sent.vector), np.nan),
        np.zeros(len(sent.vector), "i4"),
    ]:
        with pytest.raises(UpdateRefused, match="client 5 sent"):
            stage.decode(sent._replace(vector=vector), there)
    for name, array in sent.beside.items():
        for hostile in (
            array.astype("i8"),
            array[None],
            *((array[:-1], np.append(array, array)) if array.size else ()),
        ):
            with pytest.raises(UpdateRefused, match="client 5 sent"):
                stage.decode(sent._replace(beside={**sent.beside, name: hostile}), there)
        with pytest.raises(UpdateRefused, match="client 5 sent"):
            stage.decode(sent._replace(beside={n: a for n, a in sent.beside.items() if n != name}), there)


# --- low rank -----------------------------------------------------------------------------------------------


def test_a_projection_is_onto_a_subspace_of_that_rank() -> None:
    sent = update()
    found, wanted = gone_through(low_rank(4, unbiased=False), sent.vector), LAYOUT.unflatten(sent.vector)
    for name, rank in [("conv", 4), ("dense", 4), ("small", 2)]:
        got, given_ = found[name].reshape(SHAPES[name][0], -1), wanted[name].reshape(SHAPES[name][0], -1)
        assert np.linalg.matrix_rank(got, tol=1e-4) == rank
        np.testing.assert_allclose((got * (given_ - got)).sum(), 0, atol=1e-4)  # what is left out is at a right angle


@pytest.mark.slow
def test_over_rounds_the_mean_of_low_ranks_is_the_update() -> None:
    vector, rounds = update().vector, 2_000
    found = np.array(
        [low_rank(4).decode(low_rank(4).encode(Update(vector, 1), c), c).vector for c in map(at_round, range(rounds))],
        "f8",
    )
    spread = found.std(0) / np.sqrt(rounds)
    assert (np.abs(found.mean(0) - vector) < 5 * spread + 1e-5).all()
    dense = LAYOUT.slice("dense")
    error = np.square(found[:, dense] - vector[dense]).sum(1).mean() / np.square(vector[dense]).sum()
    assert error == pytest.approx(20 / 4 - 1, rel=0.05)  # rows / rank − 1


def at_round(round: int) -> Context:
    return context(round=round)


@pytest.mark.parametrize("stage", [s for s in STAGES if s.linear], ids=lambda s: s.label)
def test_linear_stages_decode_means_of_messages(stage: Stage) -> None:
    updates = [update(i)._replace(weight=float(i + 1)) for i in range(4)]
    contexts = [context(client=i) for i in range(4)]
    rule = chain(stage, mean())
    total = fold(rule, [rule.admit(rule.encode(u, c), c) for u, c in zip(updates, contexts, strict=True)])
    assert total is not None
    alone = [stage.decode(stage.encode(u, c), c).vector for u, c in zip(updates, contexts, strict=True)]
    wanted = np.average(alone, axis=0, weights=[1, 2, 3, 4])
    np.testing.assert_allclose(rule.decode({}, total, context(client=-1))[0], wanted, atol=2e-5)


# --- PowerSGD -----------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(0, 2**32))
def test_matrices_of_that_rank_come_back_whole(rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in SHAPES.items():
        rows, columns = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else (int(np.prod(shape)), 1)
        arrays[name] = (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))).reshape(shape)
    vector = np.concatenate([a.reshape(-1) for a in arrays.values()])  # float64: a chance start may be ill-conditioned
    found = power_sgd(rank).decode(power_sgd(rank).encode(Update(vector, 1.0), context()), context()).vector
    np.testing.assert_allclose(found, vector, atol=1e-7 * np.abs(vector).max())


def test_more_steps_come_closer_to_the_best_matrix_of_that_rank() -> None:
    vector = update().vector
    dense = LAYOUT.unflatten(vector)["dense"]
    best = np.sqrt(np.square(np.linalg.svd(dense, compute_uv=False)[2:]).sum())  # Eckart & Young 1936
    errors = [np.linalg.norm(gone_through(power_sgd(2, steps=s), vector)["dense"] - dense) for s in (1, 2, 40)]
    assert errors[0] > errors[1] > errors[2] > best * 0.9999
    assert errors[2] == pytest.approx(best, rel=1e-2)


def test_factors_of_an_enormous_product_are_refused() -> None:
    hostile = np.full(power_sgd(2).size(LAYOUT.size, LAYOUT), 3e38, "f4")
    with pytest.raises(UpdateRefused, match="not finite"):
        power_sgd(2).decode(Update(hostile, 1.0), context())


def test_factors_are_smaller_than_the_matrices() -> None:
    layout = Layout(("w", "b"), ((512, 1024), (512,)), ("float32",) * 2)
    there = Context(0, 1, 0, layout, size=layout.size)
    message = chain(power_sgd(4), mean()).encode(Update(np.ones(layout.size, "f4"), 1.0), there)
    assert message_bytes(message) == 4 * (4 * (512 + 1024) + 512) + 8


# --- choosing -----------------------------------------------------------------------------------------------


def test_the_chosen_layers_are_one_vector_for_the_stages() -> None:
    vector = update().vector
    chosen = np.concatenate([vector[LAYOUT.slice(n)] for n in MATRICES])
    inside = Context(3, 1, 0, size=len(chosen))
    wanted = eden(3).decode(eden(3).encode(Update(chosen, 1.0), inside), inside).vector
    found = gone_through(matrices(eden(3)), vector)
    assert np.concatenate([found[n].reshape(-1) for n in MATRICES]).tobytes() == wanted.tobytes()


def test_layers_inside_layers() -> None:
    """low_rank for one matrix only: it sees a layout that holds nothing else."""
    stage = on_layers(lambda name, shape: name == "dense", low_rank(20))
    assert np.array_equal(stage.decode(stage.encode(update(), context()), context()).vector, update().vector)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (
            lambda: chain(rotate(), low_rank(2), mean()),
            r"low_rank\(2\) looks at the model's layers, and rotate\(\) before it",
        ),
        (lambda: chain(matrices(rotate()), power_sgd(2), mean()), "before it moves entries"),
        (
            lambda: matrices(quantise(2), rotate()),
            r"rotate\(\) takes reals, and quantise\(2\) before it gives codes",
        ),
        (lambda: matrices(entropy()), "takes codes"),
        (lambda: matrices(), "takes the stages"),
        (lambda: chain(matrices(quantise(2)), entropy(), mean()), "takes codes"),
        (lambda: low_rank(0), "rank must be a whole number of at least 1"),
        (lambda: power_sgd(1, steps=0), "steps must be"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(build: object, told: str) -> None:
    with pytest.raises((IncompatibleStages, ConfigurationError), match=told):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("layout", [None, Layout(("w",), ((2, 2),), ("float32",))])
def test_without_the_layout_there_are_no_layers(layout: Layout | None) -> None:
    for stage in (low_rank(1), power_sgd(1), matrices(quantise(2))):
        with pytest.raises(ConfigurationError, match="needs the layout of the vector of 6 entries"):
            stage.encode(Update(np.ones(6), 1.0), Context(0, 1, 0, layout, size=6))
