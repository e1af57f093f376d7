"""The jax trainer: a round equals torch's on the same weights, padding changes nothing, dtypes stay."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from foedus.backends import Assignment, Trained, Weights, open_trainer
from foedus.backends.jax_backend import JaxTrainer, recipe
from foedus.core.batches import plan
from foedus.core.client import LocalSGD, local_sgd, local_training, proximal
from foedus.core.population import Examples
from foedus.core.task import JaxModel, Task, accuracy
from foedus.errors import ConfigurationError, TrainingError

CLASSES = 5
EVERYTHING = local_sgd(
    lr=lambda r: 0.2 / r, epochs=2, batch_size=8, momentum=0.8, weight_decay=0.1, clip_norm=0.5,
    penalty=proximal(0.3),
)  # fmt: skip


def perceptron(dtype: str = "float64", *, dropout: float = 0.0, centred: bool = False) -> JaxModel:
    """64-16-5, nested, with names whose order jax sorts otherwise."""

    def init(key: Any) -> Any:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        first = {"weight": rng.normal(size=(64, 16)).astype(dtype) / 8, "bias": np.zeros(16, dtype)}
        return {"zeroth": first, "last": [rng.normal(size=(16, CLASSES)).astype(dtype) / 4]}

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        x = x.reshape(len(x), -1)
        if centred:
            x = x - x.mean(0)
        hidden = jax.nn.relu(x @ p["zeroth"]["weight"] + p["zeroth"]["bias"])
        if train and dropout:
            hidden = jnp.where(jax.random.bernoulli(key, 1 - dropout, hidden.shape), hidden / (1 - dropout), 0)
        return hidden @ p["last"][0]

    return JaxModel(init, apply)


def cross_entropy(output: Any, target: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1)[:, 0]


def mean_cross_entropy(output: Any, target: Any) -> Any:
    return cross_entropy(output, target).mean()


def examples(count: int = 21, dtype: str = "float64") -> Examples:
    rng = np.random.default_rng(count)
    return Examples.of(rng.normal(size=(count, 8, 8)).astype(dtype), np.arange(count) % CLASSES, keep_dtype=True)


def assignment(spec: LocalSGD, own: Examples, **changes: Any) -> Assignment:
    steps = plan(spec, np.array([len(own)]), np.array([7]), seed=0, round=2)
    return Assignment(spec, own, steps, 2, "anna")._replace(**changes)


def trainer(model: JaxModel, loss: Any = cross_entropy, seed: int = 3) -> JaxTrainer:
    opened = open_trainer(Task(model, loss, metrics=[accuracy]), seed=seed, device="cpu")
    assert isinstance(opened, JaxTrainer)
    return opened


def in_torch(start: Weights, work: Assignment, names: tuple[str, ...]) -> Trained:
    """The same model as a torch module, its parameters declared in the order of the layout."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = {"last.0": (16, CLASSES), "zeroth.bias": (16,), "zeroth.weight": (64, 16)}
            self.own = torch.nn.ParameterList([torch.zeros(shapes[n], dtype=torch.float64) for n in names])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            p = dict(zip(names, self.own, strict=True))
            hidden = torch.relu(x.flatten(1) @ p["zeroth.weight"] + p["zeroth.bias"])
            return hidden @ p["last.0"]

    task = Task(Net, torch.nn.functional.cross_entropy)
    return open_trainer(task, seed=0, device="cpu").train(start, work)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [cross_entropy, mean_cross_entropy])
@pytest.mark.parametrize("spec", [EVERYTHING, local_sgd(lr=0.1, batch_size=None, epochs=2)])
def test_a_round_in_float64_is_torchs(loss: Any, spec: LocalSGD) -> None:
    own = trainer(perceptron(), loss)
    work = assignment(spec, examples())
    ours, theirs = own.train(own.initial(), work), in_torch(own.initial(), work, own.layout.names)
    step = theirs.weights.vector - own.initial().vector
    assert ours.weights.vector.dtype == np.float64
    assert np.linalg.norm(ours.weights.vector - theirs.weights.vector) <= 1e-10 * np.linalg.norm(step)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-10)


@pytest.mark.slow
def test_the_users_setting_of_64_bits_is_not_changed() -> None:
    assert not jax.config.jax_enable_x64
    own = trainer(perceptron())
    own.evaluate(own.initial(), examples())
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(1).dtype == jnp.float32


def test_first_weights_are_a_function_of_the_seed_and_named_by_their_path() -> None:
    first, again, other = (trainer(perceptron("float32"), seed=s).initial().vector for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32
    assert set(trainer(perceptron()).layout.names) == {"last.0", "zeroth.bias", "zeroth.weight"}


def test_the_model_comes_back_as_its_tree() -> None:
    own = trainer(perceptron())
    tree = own.model(Weights(np.arange(own.layout.size, dtype=float), np.empty(0, np.float32)))
    assert tree["last"][0].shape == (16, CLASSES)
    assert tree["zeroth"]["weight"].dtype == np.float64
    assert float(tree["last"][0].reshape(-1)[0]) == own.layout.offsets[own.layout.names.index("last.0")]


@pytest.mark.slow
def test_ragged_batches_compile_once() -> None:
    compiled = []
    model = perceptron("float32")

    def apply(p: Any, x: Any, *, train: bool, key: Any) -> Any:
        compiled.append(x.shape)
        return model.apply(p, x, train=train, key=key)

    own = trainer(JaxModel(model.init, apply))
    spec = local_sgd(lr=0.1, batch_size=8)
    own.train(own.initial(), assignment(spec, examples(21)))
    before = len(compiled)
    for count in (19, 23, 17, 31):
        own.train(own.initial(), assignment(spec, examples(count)))
    assert len(compiled) == before


@pytest.mark.slow
def test_padding_is_refused_where_it_changes_the_step() -> None:
    assert trainer(perceptron()).unpadded(examples()) is None
    assert trainer(perceptron(dropout=0.5)).unpadded(examples()) is None
    assert "interact" in (trainer(perceptron(centred=True)).unpadded(examples()) or "")
    assert "mean of a batch" in (trainer(perceptron(), mean_cross_entropy).unpadded(examples()) or "")


@pytest.mark.slow
def test_batches_that_interact_keep_their_exact_shapes() -> None:
    """The mean is subtracted over the real rows of a smaller last batch, as done by hand."""
    own, work = trainer(perceptron(centred=True)), assignment(local_sgd(lr=0.1, batch_size=8), examples(11))
    vector = own.initial().vector
    with own.types():
        for rows, count in zip(work.plan.rows, work.plan.count, strict=True):
            part = work.examples.take(rows[:count])

            def loss(p: Any, part: Examples = part) -> Any:
                return cross_entropy(
                    perceptron(centred=True).apply(p, part.inputs[0], train=True, key=None), part.targets
                ).mean()

            grads = jax.grad(loss)(own.model(Weights(vector, np.empty(0))))
            flat = {"last.0": grads["last"][0], **{f"zeroth.{n}": g for n, g in grads["zeroth"].items()}}
            vector = vector - 0.1 * own.layout.flatten(flat)
    found = own.train(own.initial(), work).weights.vector
    np.testing.assert_allclose(found, vector, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_dropout_is_counted() -> None:
    own = trainer(perceptron(dropout=0.5))
    work = assignment(local_sgd(lr=0.1, batch_size=8), examples())
    again = assignment(local_sgd(lr=0.1, batch_size=8), examples())
    first, second = own.train(own.initial(), work), own.train(own.initial(), again)
    assert np.array_equal(first.weights.vector, second.weights.vector)
    other = work._replace(plan=work.plan._replace(keys=work.plan.keys + np.uint32(1)))
    assert not np.array_equal(first.weights.vector, own.train(own.initial(), other).weights.vector)


@pytest.mark.slow
def test_every_step_is_observed_and_the_start_is_not_changed() -> None:
    own, seen = trainer(perceptron("float32")), []
    start = own.initial()
    before = start.vector.copy()
    work = assignment(local_sgd(lr=0.1, batch_size=8), examples(), observe=lambda t, w: seen.append(w.vector.copy()))
    trained = own.train(start, work)
    assert np.array_equal(start.vector, before)
    assert len(seen) == 4
    assert np.array_equal(seen[-1], trained.weights.vector)


@pytest.mark.slow
def test_evaluation_over_batches() -> None:
    own, many = trainer(perceptron("float32")), examples(1203, "float32")
    figures, scores = own.evaluate(own.initial(), many), own.predict(own.initial(), many)
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == many.targets).mean())
    assert figures["loss"] == pytest.approx(float(mean_cross_entropy(jnp.asarray(scores), many.targets)), rel=1e-5)
    assert own.predict(own.initial(), examples(0)).shape == (0,)


@pytest.mark.slow
def test_a_label_out_of_range_gives_an_update_that_will_be_refused() -> None:
    own, few = trainer(perceptron("float32")), examples(8, "float32")
    wrong = Examples(few.inputs, np.where(np.arange(8) == 3, 77, few.targets))
    trained = own.train(own.initial(), assignment(local_sgd(lr=0.1, batch_size=8), wrong))
    assert np.isnan(trained.loss)
    assert np.isnan(trained.weights.vector).all()


def test_a_failing_step_says_whose_and_where() -> None:
    wrong = Examples.of(np.ones((8, 65), np.float32), np.zeros(8, int))
    own, work = trainer(perceptron("float32")), assignment(local_sgd(lr=0.1, batch_size=8), wrong)
    with pytest.raises(TrainingError, match="client 'anna' in round 2, step 0") as caught:
        own.train(own.initial(), work)
    assert caught.value.batch[0][0].shape == (8, 65)


WHOLE = JaxModel(lambda key: {"w": jnp.zeros(3, int)}, lambda p, x, **_: x)
EMPTY = JaxModel(lambda key: {}, lambda p, x, **_: x)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not so: w"):
        trainer(WHOLE)
    with pytest.raises(ConfigurationError, match="it gave none"):
        trainer(EMPTY)
    with pytest.raises(ConfigurationError, match="no device 'abacus'"):
        open_trainer(Task(perceptron(), cross_entropy), seed=0, device="abacus")
    own = trainer(perceptron("float32"))
    with pytest.raises(ConfigurationError, match="no torch module"):
        own.train(own.initial(), assignment(local_training(loop=lambda *a: None), examples()))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_step_for_the_compiled_executor() -> None:
    own = trainer(perceptron())
    made, reason = recipe(own, Task(perceptron(), cross_entropy), EVERYTHING, width=8, examples=examples())
    assert reason is None
    assert made.wide
    batch = examples(8)
    with own.types():
        params = dict(zip(own.layout.names, own.leaves(own.initial().vector), strict=True))
        words = np.array([-5, 7], np.int32)
        mask = np.arange(8) < 3
        loss, grads, buffers = made.step(params, {}, {}, batch.inputs, batch.targets, mask, words)
        part = batch.take(slice(0, 3))
        own_loss, own_grads, _ = own.step.function(params, {}, {}, part.inputs, part.targets, None, words)
    assert float(loss) == pytest.approx(float(own_loss), rel=1e-12)
    assert buffers == {}
    for name in own.layout.names:
        np.testing.assert_allclose(grads[name], own_grads[name], rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_opening_a_trainer_leaves_every_core_to_the_compiled_executor() -> None:
    """Jax fixes the number of CPU devices when it is first used, and a jax task's trainer is what uses it first."""
    script = """
import jax.numpy as jnp
import foedus as fd
from foedus.backends import open_trainer
from foedus.backends.cores import cores
from foedus.backends.jax_devices import devices

model = fd.JaxModel(lambda key: {"w": jnp.ones((2, 2))}, lambda p, x, *, train, key: x @ p["w"])
trainer = open_trainer(fd.Task(model, loss=lambda output, target: ((output - target) ** 2).mean(1)), seed=0)
assert trainer.device != "cpu" or len(devices()) == cores(), devices()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
