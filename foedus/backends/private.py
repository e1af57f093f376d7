"""Local training that hides single examples: DP-SGD on the client (Abadi et al. 2016, "Deep learning with differential
privacy", algorithm 1).

Every step draws a Poisson batch, clips the gradient of *each example* to a bound, adds noise to their sum, and divides
by the batch's planned size. What a client sends is then private towards everybody, the server included, for each of
its examples; not for the client as a whole, whose examples may all say the same. Its training loss is not told, since
that would have no noise.

The gradient of an example is taken by itself (``vmap`` over calls with one example each, or one call after another
where a layer does not take that), so that nothing in a model or loss can mix examples behind the bound's back: a
class-weighted mean, for one, or batch normalisation.

Not here: what it is worth (:func:`foedus.privacy.example_epsilon`), noise that hides whole clients
(``foedus.privacy``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.core.client import LocalTraining, LoopContext, Schedule, local_training
from foedus.core.examples import Examples
from foedus.errors import ConfigurationError
from foedus.privacy.examples import Steps
from foedus.privacy.mechanisms import grid, steps_of
from foedus.privacy.noise import discrete_gaussian, source

_AT_ONCE = 64  # examples whose gradients are held side by side


def dp_sgd(
    lr: float | Schedule, *, clip: float, noise_multiplier: float, batch_size: int, epochs: int | None = None,
    steps: int | None = None, delta: float = 1e-5, budget: float | None = None,
) -> LocalTraining:  # fmt: skip
    """Local training by DP-SGD: single examples of a client are hidden from everybody who sees what it sends.

    Runs where ``local_training()`` does. What it costs each client is in the run's ``costs.jsonl`` as
    ``example_epsilon``, which ``foedus.privacy.example_epsilon`` foretells; numbers of examples are taken to be public.

    Args:
        lr: learning rate, or a function of the round.
        clip: the bound of one example's gradient.
        noise_multiplier: z; the sum of a batch's gradients gets noise of standard deviation z · clip in every entry.
        batch_size: planned: every example of a client is in a batch with probability batch_size / examples.
        epochs, steps: as in ``local_sgd``: an epoch is as many steps as it takes to see each example once on average.
        delta: δ of the ε that is told of each client, and of the budget.
        budget: ε that no example of any client may exceed over the whole run. Each client counts its own steps, and
            before a visit that would be too much it trains no more, for good.

    Raises:
        ConfigurationError: a figure is out of its range.

    Example:
        >>> dp_sgd(0.1, clip=1.0, noise_multiplier=1.1, batch_size=20, steps=5).label
        'local_training(loop=<dp_sgd(clip=1.0, noise_multiplier=1.1)>, steps=5, batch_size=20, lr=0.1)'
    """
    check_number("clip", clip, above=True)
    check_number("noise_multiplier", noise_multiplier, above=True)
    check_whole("batch_size", batch_size)
    check_number("delta", delta, above=True, below=1)
    if budget is not None:
        check_number("budget", budget, above=True, also=", or None")
    most = None if budget is None else float(budget)
    loop = PrivateDescent(float(clip), float(noise_multiplier), int(batch_size), float(delta), most)
    made = local_training(loop=loop, epochs=epochs, steps=steps, batch_size=batch_size, lr=lr)
    return replace(made, private=True)


@dataclass(frozen=True)
class PrivateDescent:
    """The loop of :func:`dp_sgd`."""

    clip: float
    noise_multiplier: float
    batch_size: int
    delta: float = 1e-5
    budget: float | None = None

    @property
    def __name__(self) -> str:
        """What a label shows of it."""
        most = "" if self.budget is None else f", delta={self.delta}, budget={self.budget}"
        return f"dp_sgd(clip={self.clip}, noise_multiplier={self.noise_multiplier}{most})"

    def steps(self, examples: int, count: int) -> Steps:
        """What so many steps of a client with so many examples cost each of these."""
        return Steps.of(self.noise_multiplier, self.batch_size, examples, count)

    def __call__(self, module: Any, examples: Examples, context: LoopContext) -> float | None:
        import torch

        _check_buffers(module)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        device = next(iter(parameters.values())).device
        arrays = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (*examples.inputs, examples.targets)]
        rate = min(1.0, self.batch_size / len(examples))
        for step in range(len(context.batches)):
            rows = self._drawn(len(examples), rate, step, context)
            total = self._summed(module, parameters, [a[rows] for a in arrays], context)
            self._step(parameters, total, step, context)
        return None  # a mean loss would be sent beside the update, and has no noise

    def _drawn(self, count: int, rate: float, step: int, context: LoopContext) -> NDArray[np.int64]:
        """The rows of a Poisson batch."""
        about, threshold = np.array([context.key, step], np.uint64), min(int(rate * 2.0**64), 2**64 - 1)
        words = source(context.context)(context.context, f"batch {context.key} {step}", about, count)
        return np.flatnonzero((words <= np.uint64(threshold)) if rate < 1 else np.ones(count, bool))

    def _summed(
        self, module: Any, parameters: dict[str, Any], batch: Sequence[Any], context: LoopContext
    ) -> NDArray[np.float64]:
        """The sum of the examples' clipped gradients, in whole steps of the grid."""
        size = sum(p.numel() for p in parameters.values())
        step = grid(self.clip, self.noise_multiplier, size)
        total = np.zeros(size)
        for at in range(0, len(batch[0]), _AT_ONCE):
            for row in each(module, parameters, [a[at : at + _AT_ONCE] for a in batch], context):
                total += steps_of(row, self.clip / step, 1 / step)
        return total

    def _step(
        self, parameters: dict[str, Any], total: NDArray[np.float64], number: int, context: LoopContext
    ) -> None:  # fmt: skip
        """One step down, with noise."""
        import torch

        step, whole = grid(self.clip, self.noise_multiplier, len(total)), total.astype(np.int64)
        sigma = self.noise_multiplier * self.clip / step
        whole += discrete_gaussian(context.context, f"gradient {context.key} {number}", whole, sigma=sigma)
        slope, at = torch.from_numpy(whole * (step / self.batch_size)), 0
        with torch.no_grad():
            for p in parameters.values():
                p -= context.lr * slope[at : at + p.numel()].view(p.shape).to(p)
                at += p.numel()


def each(
    module: Any, parameters: dict[str, Any], batch: Sequence[Any], context: LoopContext
) -> NDArray[Any]:  # fmt: skip
    """The gradient of every example by itself, [example, parameter].

    Raises:
        ConfigurationError: a layer cannot be called with one example at a time.
    """
    import torch
    from torch.func import functional_call, grad, vmap

    def loss(values: dict[str, Any], *example: Any) -> Any:
        *inputs, target = (part[None] for part in example)
        return context.loss(functional_call(module, values, tuple(inputs)), target)

    own = {name: p.detach() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            loss(own, *(a[0] for a in batch))  # the first call of all looks at shapes, which cannot be batched
        if type(module) not in _ALONE:
            axes = (None, *(0 for _ in batch))
            with contextlib.suppress(RuntimeError, NotImplementedError):
                found = vmap(grad(loss), in_dims=axes, randomness="different")(own, *batch)
                return _rows(found.values())
            _ALONE.add(type(module))
        return np.concatenate([_one(loss, own, [a[i] for a in batch]) for i in range(len(batch[0]))])
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"dp_sgd() takes the gradient of each example by itself, and this model or loss refuses that: {error}. "
            "Layers that look at several examples at once (batch normalisation) have to be replaced, e.g. by GroupNorm"
        ) from error


_ALONE: WeakSet[type] = WeakSet()  # modules of which examples go through one after another: vmap refuses a layer


def _one(loss: Callable[..., Any], own: dict[str, Any], example: Sequence[Any]) -> NDArray[Any]:
    """The gradient of one example, [1, parameter], without vmap."""
    import torch

    values = {name: p.clone().requires_grad_() for name, p in own.items()}
    found = torch.autograd.grad(loss(values, *example), list(values.values()), allow_unused=True)
    return _rows(torch.zeros_like(p)[None] if g is None else g[None] for g, p in zip(found, own.values(), strict=True))


def _rows(gradients: Iterable[Any]) -> NDArray[Any]:
    """Gradients of some examples [example, ...], one parameter after another, as [example, parameter]."""
    import torch

    rows: NDArray[Any] = torch.cat([g.reshape(len(g), -1) for g in gradients], 1).cpu().numpy()
    return rows


def _check_buffers(module: Any) -> None:
    """Refuse layers that gather statistics over examples, which noise on gradients does not cover."""
    import torch

    batches, instances = torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.instancenorm._InstanceNorm
    for name, layer in module.named_modules():
        if isinstance(layer, batches) or (isinstance(layer, instances) and layer.track_running_stats):
            raise ConfigurationError(
                f"{name} ({type(layer).__name__}) mixes examples or keeps statistics of them, which noise on single "
                "examples' gradients does not cover. Write torch.nn.GroupNorm(...) in its place"
            )
