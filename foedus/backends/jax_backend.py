"""The jax backend: local training and evaluation of a :class:`~foedus.core.task.JaxModel`, step by step.

A step is one compiled function of fixed shapes: smaller last batches are padded and masked, so that they do not
compile anew, unless the examples of a batch interact or the loss is a mean already; then batches keep their
exact shapes. Parameters keep their own dtypes: a model with float64 arrays is computed in float64, within a scope
of its own, whatever the user's setting is.

Not here: a whole cohort as one program (``compiled.py``), or batched over clients (``jax_cohort.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from foedus.backends.jax_devices import devices
from foedus.backends.located import located, stray_axis
from foedus.backends.numpy_backend import plain_descent
from foedus.backends.trainer import (
    Assignment,
    Losses,
    Mean,
    Tally,
    Trained,
    Weights,
    bases_of,
    labelled,
    with_momentum,
)  # fmt: skip
from foedus.core.client import LocalSGD, Steering, descend
from foedus.core.population import Examples
from foedus.core.random import key
from foedus.core.task import JaxModel, Task
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

if TYPE_CHECKING:
    from foedus.backends.compiled import Recipe

Array = Any  # a jax array
Tree = Any  # the user's nested parameters

EVALUATION_BATCH = 1000
_TRIED = 6  # real rows that padding is tried out on
_PADDING = 2


class Step(NamedTuple):
    """A training step's loss and gradients as a pure function, and the form of its parameters.

    ``function(params, frozen, buffers, inputs, target, mask, key) -> (loss, gradients, buffers)``: dicts by name,
    inputs and target [B, ...], ``mask`` [B] 1 for real rows or ``None`` for all, ``key`` 32 bits [2].
    """

    function: Callable[..., tuple[Array, dict[str, Array], dict[str, Array]]]
    names: tuple[str, ...]


class JaxTrainer:
    """See :class:`foedus.backends.trainer.Trainer`. A JaxModel has no buffers."""

    backend = "jax"

    def __init__(self, task: Task, model: JaxModel, initial: Tree, place: Any) -> None:
        self._task, self._net, self._place = task, model, place
        self.device = "cpu" if place.platform == "cpu" else f"{place.platform}:{place.id}"
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(initial)
        named = {_name(path): np.asarray(leaf) for path, leaf in leaves}
        _check(named)
        self.wide = any(a.dtype == np.float64 for a in named.values())
        self.layout, self.buffer_layout = Layout.of(named), Layout((), (), ())
        self._initial = self.layout.flatten(named)
        self._tried, self._unpadded = False, ""
        self.step = Step(_step(task, model, self._tree), self.layout.names)
        self._advance = jax.jit(partial(advanced, self.step), static_argnums=0)
        self._output = jax.jit(partial(model.apply, train=False))

    def initial(self) -> Weights:
        return Weights(self._initial.copy(), _nothing())

    def types(self) -> AbstractContextManager[Any]:
        """64-bit types for a model that has them."""
        return jax.enable_x64(True) if self.wide else nullcontext()

    # --- training

    def train(self, start: Weights, work: Assignment) -> Trained:
        spec = plain_descent(work.spec)
        if work.observe:
            work.observe(0, start)
        with self.types():
            params = self.leaves(start.vector)
            received = params if work.anchor is None else self.leaves(work.anchor)
            shift, free, memory = ([] if v is None else self.leaves(v) for v in (work.shift, work.mask, work.momenta))
            steering = Steering(shift, free, bases_of(self.layout, work.bases))
            with_momentum(spec, work.momenta)
            memory = memory or ([jnp.zeros_like(w) for w in received] if spec.momentum else [])
            rate, still, losses = spec.rate(work.round), steady(spec), []
            for step, (inputs, target, mask) in enumerate(self._batches(spec, work)):
                words = work.plan.keys[step]
                batch = (inputs, target, mask, words)
                try:
                    params, memory, loss = self._advance(still, params, memory, (received, steering), batch, rate)
                except Exception as error:
                    count = work.plan.count[step]
                    real = [x[:count] for x in inputs]
                    raise located(error, work, step, real, target[:count]) from error
                losses.append(loss)
                if work.observe:
                    work.observe(step + 1, Weights(self.flat(params), _nothing()))
            mean = float(np.mean([float(x) for x in losses])) if losses else float("nan")
            vector = self.flat(params)
            momenta = None if work.momenta is None else self.flat(memory)
        if losses and np.isnan(mean):
            vector[:] = np.nan  # a label out of range gives a NaN loss and finite gradients: it is refused
        return Trained(Weights(vector, _nothing()), mean, momenta)

    def _batches(
        self, spec: LocalSGD, work: Assignment
    ) -> Iterator[tuple[tuple[NDArray[Any], ...], NDArray[Any], NDArray[Any] | None]]:
        """Inputs, target and mask of every step: of one width, or of their exact shapes without a mask."""
        plan, examples = work.plan, work.examples
        room = roomy(plan.rows.shape[1])
        width = min(spec.batch_size or room, room)
        ragged = bool((plan.count < width).any())
        exact = ragged and self.unpadded(examples) is not None
        for rows, count in zip(plan.rows, plan.count, strict=True):
            if exact or not ragged:
                part = examples.take(rows[:count])
                yield part.inputs, part.targets, None
                continue
            chosen = np.full(width, rows[0])
            chosen[:count] = rows[:count]
            part = examples.take(chosen)
            yield part.inputs, part.targets, np.arange(width) < count

    def unpadded(self, examples: Examples) -> str | None:
        """Why batches must keep their exact shapes; ``None`` if padding changes nothing. Tried out once."""
        if not self._tried:
            with self.types():
                self._unpadded = self._fault_of_padding(examples.take(slice(0, _TRIED)))
            self._tried = True
        return self._unpadded or None

    def _fault_of_padding(self, few: Examples) -> str:
        count = len(few)
        params = self._named(self.leaves(self._initial + _jitter(self._initial)))
        words = np.array([1, 2], np.uint32)
        output = jax.eval_shape(partial(self._net.apply, train=True), self._tree(params), *few.inputs, key=_key(words))
        value = jax.eval_shape(self._loss, output, few.targets)
        if not value.ndim:
            return "the loss gives the mean of a batch; give one that returns a value per example to allow padding"
        wide = few.take(np.array([*range(count), *[0] * _PADDING]))
        mask = np.arange(len(wide)) < count
        run = jax.jit(self.step.function)
        plain = run(params, {}, {}, few.inputs, few.targets, None, words)
        padded = run(params, {}, {}, wide.inputs, wide.targets, mask, words)
        if all(_close(a, b) for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True)):
            return ""
        return "examples of one batch interact in the model, or its randomness depends on the batch's size"

    def _loss(self, output: Array, target: Array) -> Array:
        return _compared(self._task, output, target)

    # --- evaluation

    def evaluate(self, weights: Weights, examples: Examples) -> dict[str, float]:
        tally, losses = Tally(self._task.metrics), Losses(self._mean)
        with self.types():
            for output, target in self._outputs(weights, examples):
                losses.add(output, target)
                tally.add(np.asarray(output), target)
            loss = losses.result()
        return {"loss": loss} | tally.result()

    def _mean(self, outputs: list[Array], targets: list[NDArray[Any]]) -> Mean:
        """The mean loss of batches together; put together by numpy, which compiles nothing."""
        if len(outputs) > 1:
            outputs = [self.put(np.concatenate([np.asarray(output) for output in outputs]))]
            targets = [np.concatenate(targets)]
        value = self._loss(outputs[0], targets[0])
        # By numpy in float64: XLA adds float32 one by one.
        mean = float(np.asarray(value).mean(dtype=np.float64))
        return Mean(mean, value.size, sure=True) if value.ndim else Mean(mean, labelled(targets[0]))

    def predict(self, weights: Weights, examples: Examples) -> NDArray[Any]:
        with self.types():
            parts = [np.asarray(output) for output, _ in self._outputs(weights, examples)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _outputs(self, weights: Weights, examples: Examples) -> Iterator[tuple[Array, NDArray[Any]]]:
        tree = self._tree(self._named(self.leaves(weights.vector)))
        for at in range(0, len(examples), EVALUATION_BATCH):
            part = examples.take(slice(at, at + EVALUATION_BATCH))
            inputs = self.put(part.inputs)
            yield self._output(tree, *inputs, key=_key(np.zeros(2, np.uint32))), part.targets

    def model(self, weights: Weights) -> Tree:
        with self.types():
            return self._tree(self._named(self.leaves(weights.vector)))

    # --- parameters

    def put(self, tree: Any) -> Any:
        """Arrays on the trainer's device."""
        return jax.device_put(tree, self._place)

    def leaves(self, vector: Vector) -> list[Array]:
        """The parameters of a flat vector, on the device."""
        leaves: list[Array] = self.put(list(self.layout.unflatten(vector).values()))
        return leaves

    def flat(self, leaves: Sequence[Array]) -> Vector:
        """One flat vector of parameters."""
        return self.layout.flatten({n: np.asarray(w) for n, w in self._named(leaves).items()})

    def _named(self, leaves: Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self.layout.names, leaves, strict=True))

    def _tree(self, named: dict[str, Array]) -> Tree:
        return jax.tree_util.tree_unflatten(self._structure, [named[n] for n in self.layout.names])


def build(task: Task, *, seed: int, device: str | None = None) -> JaxTrainer:
    """A trainer whose first weights are a function of the seed, on a GPU if jax sees one.

    Raises:
        ConfigurationError: jax has no such device, or ``init`` gives something other than floating-point arrays.
    """
    model = task.model
    assert isinstance(model, JaxModel)
    try:
        place = devices(device)[0]
    except RuntimeError as error:
        raise ConfigurationError(f"jax has no device {device!r}: {error}") from error
    word = key(seed, "weights")
    return JaxTrainer(task, model, model.init(_key(np.array([word >> 32, word & 0xFFFFFFFF], np.uint32))), place)


def recipe(trainer: Any, task: Task, spec: LocalSGD, *, width: int, examples: Examples) -> tuple[Recipe, str | None]:
    """What the compiled executor runs for a jax model, and why its batches may not be padded."""
    from foedus.backends.compiled import Recipe, tainted

    del task, width  # one step fits every width
    assert isinstance(trainer, JaxTrainer)
    reason = trainer.unpadded(examples)
    function = trainer.step.function

    def step(params: Any, frozen: Any, buffers: Any, inputs: Any, target: Any, mask: Any, key: Any) -> Any:
        loss, grads, after = function(params, frozen, buffers, inputs, target, None if reason else mask, key)
        return loss, tainted(grads, loss), after

    made = Recipe(step, spec, trainer.layout, trainer.buffer_layout, wide=trainer.wide)
    return made, reason


# --- steps --------------------------------------------------------------------------------------------------


def _step(task: Task, model: JaxModel, tree: Callable[[dict[str, Array]], Tree]) -> Callable[..., Any]:
    """See :class:`Step`."""

    def objective(params: dict[str, Array], inputs: Any, target: Array, mask: Array | None, words: Array) -> Array:
        output = model.apply(tree(params), *inputs, train=True, key=_key(words))
        value = _compared(task, output, target)
        if mask is None or not value.ndim:
            return value.mean()
        rows = value.reshape(mask.shape[0], -1).mean(1)
        real = mask.astype(rows.dtype)
        return (rows * real).sum() / jnp.maximum(real.sum(), 1)

    def step(
        params: dict[str, Array],
        frozen: Any,
        buffers: Any,
        inputs: Any,
        target: Array,
        mask: Array | None,
        words: Array,
    ) -> Any:
        del frozen  # a JaxModel has none
        loss, grads = jax.value_and_grad(objective)(params, inputs, target, mask, words)
        return loss, grads, buffers

    return step


def _compared(task: Task, output: Array, target: Array) -> Array:
    """What the task's loss gives; refuses outputs [B, 1] that were repeated to fit targets [B]."""
    assert task.loss is not None
    value = jnp.asarray(task.loss(output, target))
    if value.ndim == 2 and value.shape[0] == value.shape[1] > 1 and (told := _stray(output, target)):
        raise ConfigurationError(told)
    return value


def _stray(output: Array, target: Array) -> str | None:
    return stray_axis(output.shape, target.shape) if isinstance(output, jax.Array) else None


def advanced(
    step: Step, spec: LocalSGD, params: Any, memory: Any, guide: tuple[Any, Steering], batch: Any, lr: Array
) -> Any:
    """Parameters, momenta and loss after one step; ``guide``: what penalties pull towards, and the steering."""
    received, steering = guide
    inputs, target, mask, words = batch
    named = dict(zip(step.names, params, strict=True))
    loss, grads, _ = step.function(named, {}, {}, inputs, target, mask, words)
    slopes = [grads[n] for n in step.names]
    new, memory = descend(spec, params, slopes, memory=memory, received=received, lr=lr, steering=steering)
    return [w.astype(old.dtype) for w, old in zip(new, params, strict=True)], memory, loss


def steady(spec: LocalSGD) -> LocalSGD:
    """The spec without its learning rate, which is an argument: a schedule does not compile anew."""
    return replace(spec, lr=0.0)


def _key(words: Array) -> Array:
    """A jax PRNG key of two 32-bit words, signed or not."""
    words = jnp.asarray(words)
    if words.dtype == jnp.int32:
        words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def roomy(count: int) -> int:
    """``count`` rounded up to one of four sizes per power of two, so that few shapes occur."""
    quarter = max(1, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // quarter) * quarter


def _check(named: dict[str, NDArray[Any]]) -> None:
    wrong = [f"{n} ({a.dtype})" for n, a in named.items() if not jnp.issubdtype(a.dtype, jnp.floating)]
    if wrong or not named:
        raise ConfigurationError(
            "a JaxModel's init(key) gives nested floating-point arrays, at least one; "
            + (f"not so: {', '.join(wrong)}" if wrong else "it gave none")
        )


def _name(path: Any) -> str:
    """The dotted name of a leaf."""
    parts = (next(str(getattr(p, a)) for a in ("key", "idx", "name") if hasattr(p, a)) for p in path)
    return ".".join(parts) or "parameter"


def _jitter(vector: Vector) -> Vector:
    """Small random numbers: layers of zeros would hide what lies behind them."""
    scale = 0.05 * float(np.sqrt(np.mean(np.square(vector)))) + 0.01
    return (scale * np.random.default_rng(0).standard_normal(vector.shape)).astype(vector.dtype)


def _close(a: Array, b: Array) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b)
    tolerance = float(jnp.finfo(b.dtype).eps) ** 0.6
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-30)


def _nothing() -> NDArray[np.float32]:
    return np.empty(0, np.float32)
