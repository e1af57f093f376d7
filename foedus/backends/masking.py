"""Whether a padded batch gives the same step as the batch itself, and the loss that makes it so.

Executors that compute in fixed shapes pad a client's last, smaller batch by repeating rows, and need a loss
that leaves those rows out: ``masked(output, target, mask)`` equals the user's own mean loss over the real
rows. This file finds one from the loss that the user wrote, in one of four forms:

* the loss gives one value per example: they are averaged over the real rows;
* it has an ``ignore_index`` (cross entropy): the targets of padding are set to it, so that class weights and
  ignored tokens keep the denominator that the user's loss has;
* it has a ``reduction``: it is asked for ``"none"``;
* it is none of these: it is tried with the label that torch's losses leave out (−100), and computed for every
  row alone, as a batch of one.

No form is believed: one is kept only if it gives the user's mean on real examples for several masks, and if
loss, gradients and buffers of the model stay the same when a batch is padded. Where examples of a batch
interact (BatchNorm), nothing can be masked, and executors must keep to exact batch shapes.

Not here: how batches are padded (``core/batches.py``, ``core/packing.py``).
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from foedus.backends.located import stray_axis
from foedus.backends.torch_random import counted, unrepeated
from foedus.errors import ConfigurationError

Loss = Callable[[Any, Tensor], Tensor]
MaskedLoss = Callable[[Any, Tensor, Tensor], Tensor]

_ROWS = 6  # real rows of the batch that forms are tried on
_PADDING = 2
_LEFT_OUT = -100  # the label that torch's losses leave out by default


class Objective(NamedTuple):
    """The mean loss of a batch, and of a padded batch.

    * ``exact(output, target) -> scalar``: the user's mean loss over all rows.
    * ``masked(output, target, mask) -> scalar``: the same over the rows whose mask [B] is not 0 (any dtype);
      0 if there is none. ``None`` if padding would change the step.
    * ``reason``: why there is no ``masked``; ``None`` if there is one.
    """

    exact: Loss
    masked: MaskedLoss | None
    reason: str | None


def objective(
    loss: Callable[[Any, Any], Tensor], module: torch.nn.Module, *, inputs: Sequence[Tensor], target: Tensor
) -> Objective:
    """The objective of a task's loss for a module, tried out on a few real examples.

    Args:
        loss: the user's ``loss(output, target)``: the mean over the batch, or one value per example [B, ...].
        module: the model, on the device of the examples; it is not changed.
        inputs: arrays [B, ...] of a few examples, the module's arguments. More than one row says more.
        target: [B, ...].

    Raises:
        Exception: whatever the user's model or loss raises on these examples.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 2)
        >>> found = objective(torch.nn.functional.mse_loss, net, inputs=[x], target=y)
        >>> output, mask = torch.tensor([[1.0, 1.0], [5.0, 5.0]]), torch.tensor([1.0, 0.0])
        >>> found.masked(output, torch.zeros(2, 2), mask)
        tensor(1.)
    """
    exact = functools.partial(mean_loss, loss)
    trial = _jittered(module)
    if reason := _interacts(trial):
        return Objective(exact, None, reason)
    inputs, target = [x[:_ROWS] for x in inputs], target[:_ROWS]
    with torch.no_grad(), counted(_key(target)):
        output = pytree.tree_map_only(Tensor, _spread, copy.deepcopy(trial)(*inputs))
        if isinstance(output, Tensor) and stray_axis(output.shape, target.shape):
            compared(loss, output, target)
    masked = _form(loss, exact, output, target)
    if masked is None:
        return Objective(exact, None, f"the loss {_name(loss)} is not a mean of one value per example")
    if not _harmless(trial, exact, masked, (inputs, target)):
        return Objective(exact, None, f"examples of one batch interact in {type(module).__name__}")
    return Objective(exact, masked, None)


def compared(loss: Callable[[Any, Any], Tensor], output: Any, target: Tensor) -> Tensor:
    """A loss's value, a mean or one per example.

    Raises:
        ConfigurationError: outputs [B, 1] were repeated to fit targets [B] (of which torch only warns), or the other
            way round. A loss that knows what to do with such shapes is let be.
    """
    told = stray_axis(output.shape, target.shape) if isinstance(output, Tensor) else None
    if told is None:
        return loss(output, target)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a target size", UserWarning)
        try:
            value = loss(output, target)
        except UserWarning:
            raise ConfigurationError(told) from None
    if value.ndim == 2 and value.shape[0] == value.shape[1] > 1:  # each with each
        raise ConfigurationError(told)
    return value


def mean_loss(loss: Callable[[Any, Any], Tensor], output: Any, target: Tensor) -> Tensor:
    """The mean of a loss, whether it gives a mean or one value per example."""
    value = loss(output, target)
    return value.mean() if value.ndim else value


def divided_by(loss: Callable[..., Any], target: Tensor) -> tuple[float, bool]:
    """What a loss that gives one number for a batch was divided by, and whether that is known for sure.

    Args:
        loss: the user's. Of torch's ``cross_entropy`` and ``nll_loss`` the weights and the label left out are known.
        target: [B, ...]. Of other losses whole numbers below 0 are taken for labels left out.

    Example:
        >>> weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), ignore_index=9)
        >>> divided_by(weighted, torch.tensor([0, 9, 1, 1]))
        (7.0, True)
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        return target.numel(), False
    options = _options(loss) if _by_labels(loss) else {}
    if options.get("reduction") != "mean":
        return int((target >= 0).sum()), False
    real = target != options["ignore_index"]
    if (weight := options.get("weight")) is None:
        return int(real.sum()), True
    return float(weight[target[real]].sum()), True


def _by_labels(loss: Callable[..., Any]) -> bool:
    """Whether a loss is one of torch's that divide by the weights of the labels that they do not leave out."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    functions = (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss)
    return loss in functions or type(loss) in (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)


# --- forms of a masked loss ---------------------------------------------------------------------------------


def _form(loss: Callable[..., Tensor], exact: Loss, output: Any, target: Tensor) -> MaskedLoss | None:
    """The first candidate that agrees with the user's mean."""
    safe = _runs_on_cpu(exact, output, target)
    if safe:  # there, a label out of range is an exception; on a GPU it ends all work
        output, target = pytree.tree_map_only(Tensor, Tensor.cpu, output), target.cpu()
    for masked in _candidates(loss, exact, output, target, safe=safe):
        if _agrees(exact, masked, (output, target), odd=safe):
            return masked
    return None


def _candidates(
    loss: Callable[..., Tensor], exact: Loss, output: Any, target: Tensor, *, safe: bool
) -> Iterator[MaskedLoss]:
    """Masked losses that may be right, the cheapest first."""
    if loss(output, target).ndim:
        yield functools.partial(_by_rows, loss)
        return
    options, labels = _options(loss), not target.is_floating_point()
    if labels and isinstance(ignored := options.get("ignore_index"), int):
        yield functools.partial(_by_ignoring, exact, ignored)
        return
    if options.get("reduction") == "mean":
        yield functools.partial(_by_rows, _unreduced(loss))
    if labels and safe:
        yield functools.partial(_by_ignoring, exact, _LEFT_OUT)
    yield functools.partial(_by_rows, functools.partial(_alone, exact))


def _runs_on_cpu(exact: Loss, output: Any, target: Tensor) -> bool:
    """Whether the loss can be tried on the CPU: not if it holds weights on another device."""
    try:
        exact(pytree.tree_map_only(Tensor, Tensor.cpu, output), target.cpu())
    except Exception:
        return False
    return True


def _by_rows(loss: Callable[[Any, Tensor], Tensor], output: Any, target: Tensor, mask: Tensor) -> Tensor:
    """The mean over the real rows of a loss that gives values per example."""
    rows = loss(output, target).reshape(mask.shape[0], -1).mean(1)  # [B]
    real = mask.to(rows.dtype)
    return (rows * real).sum() / real.sum().clamp(min=1)


def _by_ignoring(exact: Loss, ignored: int, output: Any, target: Tensor, mask: Tensor) -> Tensor:
    """The user's own mean, with the targets of padding set to the label that it leaves out."""
    real = mask != 0
    some = real.any()
    # Without any real row the mean would be 0/0: keep the targets, and multiply by 0 instead.
    keep = (real | ~some).reshape(-1, *[1] * (target.ndim - 1))
    value = exact(output, target.masked_fill(~keep, ignored))
    return value * some.to(value.dtype)


def _alone(exact: Loss, output: Any, target: Tensor) -> Tensor:
    """The loss of every row as a batch of one, [B]."""

    def one(row: Any, aim: Tensor) -> Tensor:
        return exact(pytree.tree_map_only(Tensor, lambda r: r.unsqueeze(0), row), aim.unsqueeze(0))

    rows: Tensor = torch.vmap(one)(output, target)
    return rows


def _options(loss: Callable[..., Any]) -> dict[str, Any]:
    """The values that a loss's own settings have: of a module, a function, or a partial application."""
    if isinstance(loss, torch.nn.Module):
        return {name: getattr(loss, name) for name in ("reduction", "ignore_index", "weight") if hasattr(loss, name)}
    if isinstance(loss, functools.partial):
        return {**_options(loss.func), **loss.keywords}
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _unreduced(loss: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    if isinstance(loss, torch.nn.Module):
        loss = copy.copy(loss)
        loss.reduction = "none"  # type: ignore[assignment]
        return loss
    if isinstance(loss, functools.partial) and isinstance(loss.func, torch.nn.Module):
        return functools.partial(_unreduced(loss.func), *loss.args, **loss.keywords)
    return functools.partial(loss, reduction="none")


# --- trying them out ----------------------------------------------------------------------------------------


def _agrees(exact: Loss, masked: MaskedLoss, batch: tuple[Any, Tensor], *, odd: bool) -> bool:
    """Whether a masked loss equals the user's mean, for several masks and for unusual targets."""
    output, target = batch
    try:
        if not all(_equal_under(mask, exact, masked, batch) for mask in _masks(target)):
            return False
    except Exception:
        return False
    return not odd or all(_agrees_if_valid(exact, masked, output, t) for t in _odd_targets(target))


def _agrees_if_valid(exact: Loss, masked: MaskedLoss, output: Any, target: Tensor) -> bool:
    """As `_agrees`, but targets that the user's loss itself does not take say nothing."""
    everything = torch.ones(len(target), device=target.device)
    try:
        exact(output, target)
    except Exception:
        return True
    try:
        return _equal_under(everything, exact, masked, (output, target))
    except Exception:
        return False


def _odd_targets(target: Tensor) -> Iterator[Tensor]:
    """Targets with a value in one row that losses like to leave out: their mean has another denominator then.

    The examples at hand may hold none, so that the mistake would go unnoticed until a client has one.
    """
    for value in (0, -1, float("nan") if target.is_floating_point() else _LEFT_OUT):
        odd = target.clone()
        odd[-1] = value
        yield odd


def _equal_under(mask: Tensor, exact: Loss, masked: MaskedLoss, batch: tuple[Any, Tensor]) -> bool:
    output, target = batch
    rows = mask.nonzero().squeeze(1)
    wanted = exact(pytree.tree_map_only(Tensor, lambda o: o[rows], output), target[rows])
    if not wanted.isfinite():
        return True
    return bool(_close(masked(output, target, mask), wanted))


def _masks(target: Tensor) -> Iterator[Tensor]:
    row = torch.arange(len(target), device=target.device)
    for real in (row >= 0, row < (len(row) + 1) // 2, row == row[-1], row % 2 == 0):
        yield real.float()


def _harmless(module: torch.nn.Module, exact: Loss, masked: MaskedLoss, batch: tuple[Sequence[Tensor], Tensor]) -> bool:
    """Whether loss, gradients and buffers of a step stay the same when the batch is padded."""
    inputs, target = batch
    rows = torch.tensor([*range(len(target)), *[0] * _PADDING], device=target.device)
    mask = (torch.arange(len(rows), device=target.device) < len(target)).float()
    plain = _step(module, inputs, lambda output: exact(output, target))
    try:
        padded = _step(module, [x[rows] for x in inputs], lambda output: masked(output, target[rows], mask))
    except Exception:
        return False
    return all(_close(a, b) for a, b in zip(padded, plain, strict=True))


def _step(module: torch.nn.Module, inputs: Sequence[Tensor], loss: Callable[[Any], Tensor]) -> tuple[Tensor, ...]:
    """Loss, gradient [parameter] and buffers [buffer] of one training step."""
    module = copy.deepcopy(module)
    with counted(_key(inputs[0])):
        value = loss(module(*inputs))
    parameters = [p for p in module.parameters() if p.requires_grad]
    with unrepeated():
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    buffers = [value.new_zeros(0), *(b.detach().to(value.dtype).reshape(-1) for b in module.buffers())]
    return value.detach(), torch.cat([g.reshape(-1) for g in grads]), torch.cat(buffers)


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(b.dtype).eps ** 0.6 if b.is_floating_point() else 0.0
    if a.shape != b.shape:
        return False
    # Equal infinities (a mask of −∞ among the buffers) do not differ, nor does a loss that is NaN either way.
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b)
    return bool(apart.norm() <= tolerance * torch.where(b.isfinite(), b, 0).norm() + 1e-30)


def _interacts(module: torch.nn.Module) -> str | None:
    """Names a layer that is known to mix the examples of a batch."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
            return f"{type(layer).__name__} {name!r} uses statistics of the whole batch"
    return None


def _jittered(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in training mode, its weights moved a little: zeros would hide what lies behind them."""
    module = copy.deepcopy(module).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.add_(noise * (0.05 * p.square().mean().sqrt() + 0.01))
    return module


def _spread(output: Tensor) -> Tensor:
    """Outputs that differ from row to row, so that rows of equal inputs are told apart."""
    if not output.is_floating_point():
        return output
    ramp = torch.linspace(1.0, 1.2, len(output), device=output.device, dtype=output.dtype)
    return output * ramp.reshape(-1, *[1] * (output.ndim - 1))


def _key(like: Tensor) -> Tensor:
    return torch.tensor([1, 2], dtype=torch.int32, device=like.device)


def _name(loss: Any) -> str:
    if isinstance(loss, functools.partial):
        return _name(loss.func)
    return getattr(loss, "__name__", None) or type(loss).__name__
