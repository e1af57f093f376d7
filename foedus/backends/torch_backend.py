"""The torch backend: one client's local training and evaluation of a ``torch.nn.Module``, eagerly.

This is the reference that the faster executors are held to. The module's parameters are loaded from and read
into one flat vector; frozen parameters stay in the module, tied ones appear once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from foedus.backends.located import located
from foedus.backends.masking import compared, divided_by
from foedus.backends.torch_random import DrawnAgain, counted
from foedus.backends.trainer import (
    Assignment,
    Losses,
    Mean,
    Tally,
    Trained,
    Weights,
    bases_of,
    leaves_of,
    with_momentum,
)  # fmt: skip
from foedus.core.client import LocalSGD, LocalTraining, LoopContext, Steering, descend
from foedus.core.population import Examples
from foedus.core.random import key
from foedus.core.task import Task
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

EVALUATION_BATCH = 1000

P = ParamSpec("P")
R = TypeVar("R")
Advance = Callable[[torch.Tensor, AbstractContextManager[Any]], None]
GATHERED_BYTES = 1 << 22  # of batches gathered at once; more would leave the processor's cache


@contextmanager
def same_bits() -> Iterator[None]:
    """One torch thread: how many take part, which can depend on the machine's load, changes the rounding of
    products, and a run must end with the same bits wherever it is resumed. Cores are put to use by training
    clients side by side. And full float32 products on a GPU: TF32 keeps 10 bits, too few for executors to agree."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_num_threads(threads)


def reproducibly(work: Callable[P, R]) -> Callable[P, R]:
    """Run under :func:`same_bits`."""

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with same_bits():
            return work(*args, **kwargs)

    return wrapped


class TorchTrainer:
    """See :class:`foedus.backends.trainer.Trainer`."""

    backend = "torch"

    def __init__(self, task: Task, module: torch.nn.Module, device: str) -> None:
        _check_shaped(module)
        self._task, self._module, self.device = task, module.to(device), device
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.buffers = {n: b for n, b in module.named_buffers() if b is not None}
        self._places = [(m._buffers, n, b) for m in module.modules() for n, b in m._buffers.items()]
        if not self.parameters:
            raise ConfigurationError(
                f"{type(module).__name__} has no trainable parameters, so there is nothing to federate. "
                "Give a module with parameters whose requires_grad is True"
            )
        self.layout = _layout(self.parameters)
        self.buffer_layout = _layout(self.buffers)
        _check_exact(self.buffer_layout, self.buffers)
        self._initial = self.read()
        self._draws = False  # whether the model was ever seen to draw random numbers in training
        self._fits = False  # whether outputs and targets were ever seen to go together
        self._repeats = False  # whether it was ever seen to draw them in a backward pass, too
        self._generators = _generators(torch.device(device))

    @property
    def module(self) -> torch.nn.Module:
        return self._module

    def initial(self) -> Weights:
        return Weights(self._initial.vector.copy(), self._initial.buffers.copy())

    # --- weights in and out

    def load(self, weights: Weights) -> None:
        """Put flat weights into the module."""
        for place, name, buffer in self._places:  # a model may have put other tensors in their place
            place[name] = buffer
        _load(self.layout, self.parameters, weights.vector)
        _load(self.buffer_layout, self.buffers, weights.buffers)

    def read(self) -> Weights:
        """The module's weights, flat, copied."""
        now = dict(self._module.named_buffers())
        buffers = {name: now[name] for name in self.buffers}
        return Weights(_read(self.layout, self.parameters), _read(self.buffer_layout, buffers))

    def tensors(self, examples: Examples) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A client's examples on the device; shares memory with numpy on the CPU."""
        inputs = [_tensor(a).to(self.device) for a in examples.inputs]
        return inputs, _tensor(examples.targets).to(self.device)

    # --- training

    @reproducibly
    def train(self, start: Weights, work: Assignment) -> Trained:
        self._begin(start, work)
        if isinstance(work.spec, LocalTraining) and work.spec.loop is not None:
            _check_unsteered(work)
            with self._seeded(work):
                loss = self._own_loop(work.spec.loop, work)
            return Trained(self.read(), loss)
        momenta = self._leaves(work.momenta)
        with self._seeded(work) as untouched:
            try:
                loss = self._steps(work, momenta)
                missed = not self._draws and not untouched()
            except DrawnAgain:  # in a backward pass: once more, so that it can be the same draw
                missed = self._repeats = True
        if missed:  # or it drew nothing in the first step, but did later: once more, every draw counted
            self._draws = True
            return self.train(start, work)
        return Trained(self.read(), loss, self._flat(momenta))

    @contextmanager
    def _seeded(self, work: Assignment) -> Iterator[Callable[[], bool]]:
        """torch's own generators seeded by the client's key, and put back after: for draws that cannot be
        counted (a user's own loop or optimiser). Gives a function that tells whether nothing was drawn."""
        seed = _seed(work)
        before = [g.get_state() for g in self._generators]
        seeded = [g.manual_seed(seed).get_state() for g in self._generators]
        try:
            yield lambda: all(map(torch.equal, seeded, (g.get_state() for g in self._generators)))
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)

    def _begin(self, start: Weights, work: Assignment) -> None:
        self.load(start)
        self._module.train()
        if work.observe:
            work.observe(0, start)

    def _steps(self, work: Assignment, momenta: list[torch.Tensor]) -> float:
        losses: list[torch.Tensor] = []
        advance = self._advance(work, momenta)
        keys = torch.from_numpy(work.plan.keys.view(np.int32)).to(self.device)
        for step, (batch, target) in enumerate(self._batches(work)):
            try:
                # Watching every call costs 20 µs a step: only where the model draws, and to find out whether.
                if self._draws or not step or work.observe:
                    with counted(keys[step], repeatable=self._repeats or bool(work.observe)) as draw:
                        loss = self.loss(self._module(*batch), target)
                    self._draws = self._draws or draw.calls > 0
                    advance(loss, draw.again() if draw.calls else nullcontext())
                else:
                    loss = self.loss(self._module(*batch), target)
                    advance(loss, nullcontext())
            except DrawnAgain:
                raise
            except Exception as error:
                raise located(error, work, step, batch, target) from error
            losses.append(loss.detach())
            if work.observe:
                work.observe(step + 1, self.read())
        return float(torch.stack(losses).mean()) if losses else float("nan")

    def _batches(self, work: Assignment) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """The batches of a plan; many are gathered in one go, since an indexing for each would cost 10 µs."""
        (inputs, targets), plan = self.tensors(work.examples), work.plan
        width = plan.rows.shape[1]
        each = max(1, sum(x[:1].nbytes for x in (*inputs, targets)) * width)
        stride = max(1, GATHERED_BYTES // each)
        for begin in range(0, len(plan.count), stride):
            rows = torch.from_numpy(plan.rows[begin : begin + stride].reshape(-1)).to(self.device)
            parts = [torch.split(x.index_select(0, rows), width) for x in (*inputs, targets)]
            counts = plan.count[begin : begin + stride].tolist()
            for count, *batch, target in zip(counts, *parts, strict=True):
                full = count == width
                yield (batch, target) if full else ([x[:count] for x in batch], target[:count])

    def _advance(self, work: Assignment, momenta: list[torch.Tensor]) -> Advance:
        """The function that takes one step down a loss, whose backward pass runs in the context given; it changes the
        momenta in place."""
        spec, parameters, rate = work.spec, list(self.parameters.values()), work.spec.rate(work.round)
        anchor, shift, mask = (self._leaves(v) for v in (work.anchor, work.shift, work.mask))
        if isinstance(spec, LocalTraining):
            return _by_optimiser(spec, parameters, rate, Steering(shift, mask))
        bases = [None if a is None else self._tensor(a) for a in bases_of(self.layout, work.bases)]
        with_momentum(spec, work.momenta)
        return _by_descent(spec, parameters, rate, _Guide(anchor, Steering(shift, mask, bases), momenta))

    def _flat(self, tensors: list[torch.Tensor]) -> Vector | None:
        """The vector of arrays, if there are any."""
        return _read(self.layout, dict(zip(self.layout.names, tensors, strict=True))) if tensors else None

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.tensor(array, device=self.device)

    def _leaves(self, vector: Vector | None) -> list[torch.Tensor]:
        """The arrays of a flat vector on the device; none without one."""
        return [self._tensor(a) for a in leaves_of(self.layout, vector)]

    def _own_loop(self, loop: Callable[..., float | None], work: Assignment) -> float:
        plan = work.plan
        batches = [plan.rows[t, : plan.count[t]] for t in range(len(plan.count))]
        context = LoopContext(
            loss=self.loss, round=work.round, client=work.client, batches=batches,
            lr=work.spec.rate(work.round), key=_seed(work), context=work.context,
        )  # fmt: skip
        try:
            loss = loop(self._module, work.examples, context)
        except Exception as error:
            raise located(error, work, None, [], None) from error
        return float("nan") if loss is None else float(loss)

    def loss(self, output: Any, target: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, whether the task's loss gives a mean or one value per example."""
        value = self._value(output, target)
        return value.mean() if value.ndim else value

    def _value(self, output: Any, target: torch.Tensor) -> torch.Tensor:
        """What the task's loss gives; the first time with an eye on the shapes."""
        loss = self._task.loss
        assert loss is not None
        value: torch.Tensor = loss(output, target) if self._fits else compared(loss, output, target)
        self._fits = True
        return value

    # --- evaluation

    @reproducibly
    def evaluate(self, weights: Weights, examples: Examples) -> dict[str, float]:
        self.load(weights)
        tally, losses = Tally(self._task.metrics), Losses(self._mean)
        for output, target in self._outputs(examples):
            losses.add(output, target)
            tally.add(output.cpu().numpy(), target.cpu().numpy())
        return {"loss": losses.result()} | tally.result()

    @torch.no_grad()
    def _mean(self, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> Mean:
        """The mean loss of batches together."""
        output, target = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (outputs, targets))
        value = self._value(output, target)
        if value.ndim:
            return Mean(float(value.mean()), value.numel(), sure=True)
        assert self._task.loss is not None
        return Mean(float(value), *divided_by(self._task.loss, target))

    @reproducibly
    def predict(self, weights: Weights, examples: Examples) -> NDArray[Any]:
        self.load(weights)
        parts = [output.cpu().numpy() for output, _ in self._outputs(examples)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _outputs(self, examples: Examples) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._module.eval()
        inputs, targets = self.tensors(examples)
        for at in range(0, len(targets), EVALUATION_BATCH):
            part = slice(at, at + EVALUATION_BATCH)
            with torch.no_grad():
                yield self._module(*(x[part] for x in inputs)), targets[part]

    def model(self, weights: Weights) -> torch.nn.Module:
        self.load(weights)
        return copy.deepcopy(self._module).cpu().eval()


def build(task: Task, *, seed: int, device: str | None = None) -> TorchTrainer:
    """A trainer whose first weights are a function of the seed, on a GPU if torch sees one."""
    device = _present(device) if device else "cuda" if torch.cuda.is_available() else "cpu"
    assert callable(task.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "weights") >> 1)
        module = task.model()
    if not isinstance(module, torch.nn.Module):
        raise ConfigurationError(
            f"the task's model made {type(module).__name__}, where a torch.nn.Module is needed "
            "(or give a JaxModel or NumpyModel)"
        )
    return TorchTrainer(task, module, device)


def _present(device: str) -> str:
    """The device, if torch can use it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        told = str(error).splitlines()[0]
        raise ConfigurationError(
            f"torch cannot use the device {device!r} here ({told}); there is: {', '.join(there)}. Without device=... "
            "a GPU is taken if torch sees one"
        ) from error
    return device


class _Guide(NamedTuple):
    """What pulls and steers: the arrays that penalties pull towards (none: where training begins), how gradients are
    steered, and the momenta to begin with (none: zeros)."""

    anchor: list[torch.Tensor]
    steering: Steering
    momenta: list[torch.Tensor]


def _by_descent(spec: LocalSGD, parameters: list[torch.nn.Parameter], lr: float, guide: _Guide) -> Advance:
    steered = any(guide.steering)
    plain = not (spec.momentum or spec.weight_decay or spec.clip_norm or spec.penalty or steered)
    received = guide.anchor or ([] if plain else [p.detach().clone() for p in parameters])
    memory = guide.momenta or ([torch.zeros_like(p) for p in parameters] if spec.momentum else [])

    def advance(loss: torch.Tensor, backward: AbstractContextManager[Any]) -> None:
        with backward:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            if plain:  # the same step as `descend`, without temporaries
                torch._foreach_add_(parameters, grads, alpha=-lr)  # type: ignore[arg-type]
                return
            new, memory[:] = descend(
                spec, parameters, grads, memory=memory, received=received, lr=lr, steering=guide.steering
            )
            torch._foreach_copy_(parameters, new)  # type: ignore[arg-type]

    return advance


def _by_optimiser(spec: LocalTraining, parameters: list[torch.nn.Parameter], lr: float, steering: Steering) -> Advance:
    assert spec.optimiser is not None
    optimiser = spec.optimiser(parameters)
    if spec.lr is not None:
        for group in optimiser.param_groups:
            group["lr"] = lr

    def advance(loss: torch.Tensor, backward: AbstractContextManager[Any]) -> None:
        optimiser.zero_grad()
        with backward:
            torch.autograd.backward(loss)
        with torch.no_grad():
            for i, parameter in enumerate(parameters if steering.shift or steering.mask else ()):
                slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                slope = slope + steering.shift[i] if steering.shift else slope
                parameter.grad = slope * steering.mask[i] if steering.mask else slope
        before = [p.detach().clone() for p in parameters] if steering.mask else []
        optimiser.step()
        with torch.no_grad():  # an optimiser moves weights without a gradient, too: by decay, by what it remembers
            for parameter, mask, old in zip(parameters, steering.mask, before, strict=False):
                parameter.copy_(torch.where(mask == 0, old, parameter))

    return advance


def _seed(work: Assignment) -> int:
    """64 bits of a client's key in a round."""
    high, low = work.plan.keys[0].tolist() if len(work.plan.keys) else (0, 0)
    return int(high) << 32 | int(low)


def _check_unsteered(work: Assignment) -> None:
    if any(v is not None for v in (work.shift, work.mask, work.bases, work.momenta)):
        raise ConfigurationError(
            "this algorithm steers every gradient of local training, which a loop of your own hides. Give "
            "local_training(optimiser=lambda p: torch.optim.AdamW(p)) or local_sgd(...) instead"
        )


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators that a model on the device draws from, unless it brings its own."""
    if device.type != "cuda":
        return [torch.default_generator]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[number]]


def _layout(tensors: dict[str, Any]) -> Layout:
    shapes = tuple(tuple(t.shape) for t in tensors.values())
    dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return Layout(tuple(tensors), shapes, dtypes)


def _check_shaped(module: torch.nn.Module) -> None:
    """Refuse a module whose parameters have no shapes yet (``LazyLinear`` and the like)."""
    both = (*module.named_parameters(), *module.named_buffers())
    if lazy := [name for name, tensor in both if torch.nn.parameter.is_lazy(tensor)]:
        raise ConfigurationError(
            f"{type(module).__name__} does not know the shape of {lazy[0]!r} before its first call. Let the function "
            "that makes it call it once on an example: net = Net(); net(torch.zeros(1, 64)); return net"
        )


def _check_exact(layout: Layout, buffers: dict[str, torch.Tensor]) -> None:
    """Refuse whole numbers that the flat vector of buffers would round."""
    bits = np.finfo(layout.dtype).nmant + 1
    whole = {n: b for n, b in buffers.items() if b.numel() and not (b.is_floating_point() or b.dtype == torch.bool)}
    if wrong := [n for n, b in whole.items() if max(int(b.max()), -int(b.min())) > 2**bits]:
        raise ConfigurationError(
            f"the buffer {wrong[0]!r} holds whole numbers beyond 2**{bits}, which would be rounded on their way to the "
            f"clients: buffers travel as {layout.dtype}. If it never changes, make it a plain attribute of the module "
            "instead of a registered buffer"
        )


@torch.no_grad()
def _load(layout: Layout, tensors: dict[str, Any], vector: Vector) -> None:
    flat = torch.from_numpy(np.ascontiguousarray(vector))
    for t, at, size in zip(tensors.values(), layout.offsets, layout.sizes, strict=True):
        part = flat[at : at + size]
        t.copy_((part if t.is_floating_point() else part.round()).view(t.shape))


@torch.no_grad()
def _read(layout: Layout, tensors: dict[str, Any]) -> Vector:
    vector = np.empty(layout.size, layout.dtype)
    flat = torch.from_numpy(vector)
    for t, at, size in zip(tensors.values(), layout.offsets, layout.sizes, strict=True):
        flat[at : at + size].copy_(t.reshape(-1))
    return vector


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """Shares memory where it can; torch does not take read-only or byte-swapped memory."""
    return torch.from_numpy(np.require(array, requirements=["C", "W", "A"]))
