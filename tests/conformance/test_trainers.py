"""The conformance suite of trainers: one task's model in one process, whose training depends on its arguments only."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import foedus as fd
from foedus.backends import Trained, Trainer, Weights, open_trainer
from foedus.errors import TrainingError
from foedus.tree import leaves

from .models import CLASSES, EVERYTHING, NAMES, PLAIN, STEADY, Member, assignment, examples, params

every = pytest.mark.parametrize("member", params(*NAMES))
steady = pytest.mark.parametrize("member", params(*STEADY))


@functools.cache
def opened(member: Member, dtype: str = "float32", seed: int = 1) -> Trainer:
    """One trainer per model for all tests: what it did before must not matter."""
    return open_trainer(member.task(dtype), seed=seed, device="cpu")


def fresh(member: Member) -> Trainer:
    return open_trainer(member.task("float32"), seed=1, device="cpu")


def bits(found: Trained | Weights) -> tuple[bytes, ...]:
    weights = found.weights if isinstance(found, Trained) else found
    loss = np.float64(found.loss).tobytes() if isinstance(found, Trained) else b""
    return weights.vector.tobytes(), weights.buffers.tobytes(), loss


def named(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a model of any kind, each once, frozen ones included."""
    if isinstance(model, torch.nn.Module):
        both = (*model.named_parameters(), *model.named_buffers())
        return {name: tensor.detach().numpy() for name, tensor in both}
    return {name: np.asarray(array) for name, array in leaves(model)}


def other(weights: Weights) -> Weights:
    """Weights that differ everywhere, buffers (variances) above 0."""
    return Weights(weights.vector * 1.5 + 0.1, weights.buffers + 0.5)


# --- weights ------------------------------------------------------------------------------------------------


@every
def test_first_weights_are_a_function_of_the_seed_and_ones_own(member: Member) -> None:
    own, again = opened(member), fresh(member)
    first = own.initial()
    assert first.vector.shape == (own.layout.size,)
    assert first.buffers.shape == (own.buffer_layout.size,)
    assert (first.vector.dtype, bool(first.buffers.size)) == (np.float32, member.buffers)
    assert bits(first) == bits(again.initial())
    assert (own.layout.digest(), own.buffer_layout.digest()) == (again.layout.digest(), again.buffer_layout.digest())
    first.vector[:] = 7
    first.buffers[:] = 7
    assert bits(own.initial()) == bits(again.initial()), "who changes them changes his copy"


@every
def test_a_model_holds_the_weights_by_name_and_is_ones_own(member: Member) -> None:
    own, weights = opened(member), other(opened(member).initial())
    held = own.layout.unflatten(weights.vector) | own.buffer_layout.unflatten(weights.buffers)
    found = named(own.model(weights))
    assert all(np.array_equal(found[name], array) for name, array in held.items())
    assert bool(set(found) - set(held)) == member.frozen
    data = examples()
    wanted = own.predict(weights, data)
    own.train(own.initial(), assignment(data))
    assert all(np.array_equal(named(own.model(weights))[name], array) for name, array in found.items())
    assert own.predict(weights, data).tobytes() == wanted.tobytes()


# --- training -----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("spec", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_training_depends_on_its_arguments_only(member: Member, spec: Any) -> None:
    """Not on what the trainer did before, nor on which trainer it is."""
    own, data = opened(member), examples()
    start, work = own.initial(), assignment(data, spec)
    first = own.train(start, work)
    own.train(other(start), assignment(examples(7, seed=4), PLAIN, client=9))
    own.evaluate(other(start), data)
    assert bits(own.train(start, work)) == bits(first)
    assert bits(fresh(member).train(start, work)) == bits(first)
    assert bits(own.train(other(start), work)) != bits(first)
    assert bits(own.train(start, assignment(examples(seed=1), spec))) != bits(first)
    assert bits(own.train(start, assignment(data, spec, client=4))) != bits(first), "the batches are another client's"


@every
def test_its_arguments_stay_as_they_are(member: Member) -> None:
    own, data = opened(member), examples()
    start, work = own.initial(), assignment(data)
    held = [start.vector, start.buffers, *data.inputs, data.targets, *work.plan]
    before = [array.tobytes() for array in held]
    trained = own.train(start, work)
    own.evaluate(start, data)
    assert [array.tobytes() for array in held] == before
    assert not np.shares_memory(trained.weights.vector, start.vector)
    assert trained.weights.vector.dtype == start.vector.dtype
    assert trained.weights.vector.shape == start.vector.shape
    assert trained.weights.buffers.shape == start.buffers.shape


@every
def test_every_step_is_observed_and_watching_changes_nothing(member: Member) -> None:
    own, start, data = opened(member), opened(member).initial(), examples(10)
    seen: list[tuple[int, Weights]] = []

    def observe(step: int, weights: Weights) -> None:
        seen.append((step, Weights(weights.vector.copy(), weights.buffers.copy())))

    watched, alone = (own.train(start, assignment(data, observe=o)) for o in (observe, None))
    assert [step for step, _ in seen] == list(range(2 * 3 + 1))  # 2 epochs of batches of 4, 4 and 2
    assert bits(seen[0][1]) == bits(start)
    assert bits(seen[-1][1]) == bits(watched.weights)
    assert len({w.vector.tobytes() for _, w in seen}) == len(seen), "some step did nothing"
    assert bits(watched) == bits(alone)


@steady
def test_the_loss_is_the_mean_over_steps_of_each_batchs_before_its_step(member: Member) -> None:
    own, data, seen = opened(member), examples(10), []
    work = assignment(data, observe=lambda step, weights: seen.append(Weights(weights.vector.copy(), weights.buffers)))
    found = own.train(own.initial(), work)
    batches = [data.take(rows[:count]) for rows, count in zip(work.plan.rows, work.plan.count, strict=True)]
    losses = [own.evaluate(weights, batch)["loss"] for weights, batch in zip(seen, batches, strict=False)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)


@steady
def test_a_step_is_the_descent_of_its_batch(member: Member) -> None:
    """One step of a small rate, beside the slope of the evaluated loss along a direction: brute force, in float64."""
    own, data = opened(member, "float64"), examples(8, dtype="float64")
    start = own.initial()
    work = assignment(data, fd.local_sgd(lr=1.0, steps=1, batch_size=None))
    step = own.train(start, work).weights.vector - start.vector  # minus the gradient
    for direction in np.random.default_rng(0).normal(size=(3, len(step))):
        up, down = (own.evaluate(Weights(start.vector + e * direction, start.buffers), data) for e in (1e-5, -1e-5))
        assert -(step @ direction) == pytest.approx((up["loss"] - down["loss"]) / 2e-5, rel=1e-5, abs=1e-8)


@every
def test_no_step_is_no_change(member: Member) -> None:
    own, data = opened(member), examples()
    work = assignment(data)
    nothing = work._replace(plan=work.plan._replace(**{n: getattr(work.plan, n)[:0] for n in work.plan._fields}))
    found = own.train(own.initial(), nothing)
    assert bits(found.weights) == bits(own.initial())
    assert np.isnan(found.loss)


@every
def test_a_client_of_one_example_trains(member: Member) -> None:
    own, data = opened(member), examples(1)
    if member.mixes:
        with pytest.raises(TrainingError, match="client 3 in round 2"):  # BatchNorm has no variance of one
            own.train(own.initial(), assignment(data))
    else:
        found = own.train(own.initial(), assignment(data))
        assert np.isfinite(found.weights.vector).all()
        assert bits(found) != bits(own.initial())


@every
def test_what_is_no_number_shows_and_leaves_no_trace(member: Member) -> None:
    """The update is not finite, so that it is refused by name; the next client trains as if nothing had been."""
    own, data = opened(member), examples()
    wanted = own.train(own.initial(), assignment(data))
    broken = fd.Examples((np.where(np.arange(12)[:, None] == 5, np.nan, data.inputs[0]).astype("f4"),), data.targets)
    found = own.train(own.initial(), assignment(broken, client=8))
    assert not np.isfinite(found.weights.vector).all()
    assert np.isnan(found.loss)
    assert bits(own.train(own.initial(), assignment(data))) == bits(wanted)


@every
def test_a_label_out_of_range_shows_and_leaves_no_trace(member: Member) -> None:
    own, data = opened(member), examples()
    wanted = own.train(own.initial(), assignment(data))
    wrong = fd.Examples(data.inputs, np.where(np.arange(12) == 5, CLASSES + 4, data.targets))
    found = refused = None
    try:
        found = own.train(own.initial(), assignment(wrong))
    except TrainingError as error:
        refused = error
    if found is not None:
        assert np.isnan(found.weights.vector).all(), "jax clamps indices; the update must not pass for a sound one"
    else:
        assert "client 3 in round 2, step" in str(refused)
        assert CLASSES + 4 in np.asarray(refused.batch[1])
    assert bits(own.train(own.initial(), assignment(data))) == bits(wanted)


@every
def test_momenta_carry_training_on(member: Member) -> None:
    """A training in two parts, the second of which begins with the first one's momenta, is the whole."""
    own, data = opened(member, "float64"), examples(dtype="float64")
    start, work = own.initial(), assignment(data, EVERYTHING)
    parts = [
        work.plan._replace(**{n: getattr(work.plan, n)[part] for n in ("rows", "count", "keys", "client")})
        for part in (slice(0, 2), slice(2, None))
    ]
    whole = own.train(start, work)
    first = own.train(start, work._replace(plan=parts[0], momenta=np.zeros_like(start.vector)))
    assert first.momenta is not None
    assert whole.momenta is None, "nobody asked"
    second = own.train(first.weights, work._replace(plan=parts[1], momenta=first.momenta, anchor=start.vector))
    np.testing.assert_allclose(second.weights.vector, whole.weights.vector, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(second.weights.buffers, whole.weights.buffers, rtol=1e-12, atol=1e-14)
    anew = own.train(first.weights, work._replace(plan=parts[1], anchor=start.vector))
    assert np.abs(anew.weights.vector - whole.weights.vector).max() > 1e-4
    with pytest.raises(fd.errors.ConfigurationError, match=r"momentum=0\.9"):
        own.train(start, assignment(data, momenta=np.zeros_like(start.vector)))


@every
def test_a_basis_confines_its_matrix_and_leaves_the_others(member: Member) -> None:
    own, data = opened(member, "float64"), examples(dtype="float64")
    name, shape = next((n, s) for n, s in zip(own.layout.names, own.layout.shapes, strict=True) if len(s) == 2)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(shape[0], 2)))[0]
    start = own.initial()
    free, found = (own.train(start, assignment(data, EVERYTHING, bases=b)) for b in (None, {name: basis}))
    moved = own.layout.unflatten(found.weights.vector - start.vector)
    np.testing.assert_allclose(basis @ (basis.T @ moved[name]), moved[name], rtol=1e-10, atol=1e-12)
    assert np.linalg.matrix_rank(moved[name], tol=1e-9) == min(2, shape[1])
    other = own.layout.unflatten(free.weights.vector - start.vector)[name]
    assert np.linalg.norm(other - basis @ (basis.T @ other)) > 1e-3
    assert all(np.abs(moved[n]).max() > 0 for n in own.layout.names if n != name)


# --- buffers and frozen parameters --------------------------------------------------------------------------


@every
def test_buffers_begin_where_they_are_told_and_change_in_training_only(member: Member) -> None:
    own, data = opened(member), examples()
    start = own.initial()
    trained = own.train(start, assignment(data))
    assert (trained.weights.buffers.tobytes() != start.buffers.tobytes()) == member.buffers
    if member.buffers:
        moved = Weights(start.vector, other(start).buffers)
        assert own.predict(moved, data).tobytes() != own.predict(start, data).tobytes()
        assert own.train(moved, assignment(data)).weights.buffers.tobytes() != trained.weights.buffers.tobytes()
        own.evaluate(moved, examples(5, seed=9))
        assert own.predict(start, data).tobytes() == own.predict(start, data).tobytes()


@every
def test_frozen_parameters_neither_travel_nor_change(member: Member) -> None:
    own = opened(member)
    held = {*own.layout.names, *own.buffer_layout.names}
    before = {n: a for n, a in named(own.model(own.initial())).items() if n not in held}
    trained = own.train(own.initial(), assignment(examples()))
    after = named(own.model(trained.weights))
    assert bool(before) == member.frozen
    assert all(after[name].tobytes() == array.tobytes() for name, array in before.items())


# --- evaluation ---------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("cuts", [[1000], [300, 1100]], ids=str)
def test_figures_of_parts_make_those_of_the_whole(member: Member, cuts: list[int]) -> None:
    """The law of metrics, over sets larger than a batch of evaluation."""
    own, data = opened(member), examples(1500)
    weights = other(own.initial())
    whole = own.evaluate(weights, data)
    parts = [data.take(rows) for rows in np.split(np.arange(1500), cuts)]
    told = [own.evaluate(weights, part) for part in parts if len(part)]
    sizes = [len(part) for part in parts if len(part)]
    for name in ("loss", "accuracy"):
        assert whole[name] == pytest.approx(np.average([t[name] for t in told], weights=sizes), rel=1e-5)
    assert whole["accuracy"] == np.mean(own.predict(weights, data).argmax(1) == data.targets)


@every
def test_a_prediction_is_that_of_the_example_alone(member: Member) -> None:
    """No dropout, and no statistics of the batch."""
    own, data = opened(member), examples(5)
    weights = other(own.initial())
    together = own.predict(weights, data)
    assert together.shape == (5, CLASSES)
    alone = np.concatenate([own.predict(weights, data.take(slice(i, i + 1))) for i in range(5)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert own.predict(weights, data).tobytes() == together.tobytes()
    assert own.evaluate(weights, data) == own.evaluate(weights, data)


@every
def test_nothing_to_evaluate_has_no_figures(member: Member) -> None:
    own, nothing = opened(member), examples(0)
    assert all(np.isnan(v) for v in own.evaluate(own.initial(), nothing).values())
    assert list(own.evaluate(own.initial(), nothing)) == ["loss", "accuracy"]
    assert len(own.predict(own.initial(), nothing)) == 0
