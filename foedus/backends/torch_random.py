"""Counted randomness for torch: dropout whose mask is a function of (key, call, element) and nothing else.

Inside ``with counted(key):`` every random function of torch that a model calls in training draws its bits
from an integer hash, made of plain int32 additions, multiplications, shifts and xors that wrap around. The
same lines run eagerly, under ``torch.func.vmap`` and, traced and lowered to jax, in a compiled program; all
three give the same bits. An element is known by its coordinates, not by its place in memory, so that a batch
with padded rows draws the same mask for its real ones.

The mixer is a 32-bit finaliser of the multiply-xorshift kind (constants: C. Wellons, "Prospecting for hash
functions", 2018, public domain).

* Counted: dropout in all its forms (attention's and stacked recurrent layers' included), ``rand``, ``randn``,
  ``rand_like``, ``randn_like``, ``bernoulli`` and ``normal``.
* Seeded: every other random function (``multinomial``, ``exponential_`` …) runs with torch's own generator,
  seeded from (key, call) in a fork of its state. That needs a key whose value is known, so a traced or
  vmapped key raises :class:`~foedus.errors.UnsupportedOperator`, which names the function.

Activation checkpointing (``torch.utils.checkpoint``) calls a part of the model once more in the backward pass. What
that part draws must come out again: the plain trainer runs the backward pass in ``with draw.again()``, which finds
out by the state that checkpointing puts torch's generator back to how many draws had been made before the part.
Traced and batched steps refuse such draws, in ``with unrepeated():``.

Not here: where the keys come from (``core/batches.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from types import FunctionType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foedus.errors import ConfigurationError, UnsupportedOperator

__all__ = ["Attention", "DrawnAgain", "attended", "counted", "unrepeated"]

Rule = Callable[..., Any]

# One odd step per axis, so that an element's number is the sum of its coordinates' own multiples.
_AXES: Final = (-1640531527, 668265263, -2048144777, 374761393, -1028477387, 1274126177, 1540483477)
_CALL: Final = 1013904223
_FACTORS: Final = (0x7FEB352D, 0x846CA68B - 2**32)
_SELU: Final = 1.7580993408473766  # −(scale · alpha) of SELU: where dropped units of alpha dropout saturate


class counted(TorchFunctionMode):
    """Draw a model's randomness in training from ``key``.

    Args:
        key: int32 [2]; may be traced, or batched by ``torch.func.vmap``.
        strict: refuse functions that cannot be counted, instead of seeding torch's generator; for tracing.
        repeatable: whether the backward pass may draw once more (:meth:`again`). Every draw then moves torch's
            generator on by one number, so that no two draws are made in the same state of it.

    Attributes:
        calls: how many draws were made so far.

    Raises:
        UnsupportedOperator: on a function that cannot be counted, where the key's value is not known.

    Example:
        >>> key, x = torch.tensor([1, 2], dtype=torch.int32), torch.ones(4, 5)
        >>> with counted(key):
        ...     first = torch.nn.functional.dropout(x, 0.5)
        >>> with counted(key):
        ...     torch.equal(first, torch.nn.functional.dropout(x, 0.5))
        True
    """

    def __init__(self, key: Tensor, *, strict: bool = False, repeatable: bool = False) -> None:
        super().__init__()
        self.key, self.strict, self.calls = key, strict, 0
        self.states = {_state(): 0} if repeatable else None  # of torch's generator: how many draws were made by then

    def again(self) -> counted:
        """The same draws in the backward pass, where a checkpointed part of the model is called once more.

        Raises:
            DrawnAgain: there, if these are not ``repeatable``.
            ConfigurationError: there, if torch's generator is not put back to where it was.
        """
        return _Again(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (rule := _COUNTED.get(func)) is not None:
            return rule(self, *args, **kwargs)
        if func in _RECURRENT:
            return _recurrent(self, func, args)
        if func in _SEEDED:
            return _seeded(self, func, args, kwargs)
        if (backward := _BACKWARD.get(func)) is not None:
            with self:
                return backward(*args, **kwargs)
        if type(func) is FunctionType and (inside := _opened(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        return func(*args, **kwargs)

    def bits(self, shape: Iterable[int]) -> Tensor:
        """Random bits, int32 [shape], of one more call; the upper ones are the best mixed."""
        number = self.number()
        word = self.key[0] + _wrapped((number + 1) * _CALL)
        mixed = _mixed(_cells(tuple(shape), self.key.device) + word, 16, _FACTORS[0]) ^ self.key[1]
        return _mixed(_mixed(mixed, 16, _FACTORS[0]), 15, _FACTORS[1])

    def number(self) -> int:
        """The number of the draw that is being made."""
        number = self.calls
        self.calls += 1
        if self.states is not None:
            self.states[_moved_on()] = self.calls
        return number

    def kept(self, shape: Iterable[int], share: float) -> Tensor:
        """A mask, bool [shape], true with probability ``share``."""
        threshold = round(share * 2**32) - 2**31
        bits = self.bits(shape)
        return bits < threshold if threshold < 2**31 else torch.ones_like(bits, dtype=torch.bool)

    def uniform(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Numbers in [0, 1) of 24 random bits, [shape]."""
        return ((self.bits(shape) >> 8) & 0xFFFFFF).to(dtype) * 2.0**-24

    def normal(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Standard normal numbers, [shape] (Box and Muller 1958)."""
        shape = tuple(shape)
        radius = (-2 * torch.log1p(-self.uniform(shape, dtype))).sqrt()
        return radius * torch.cos(2 * math.pi * self.uniform(shape, dtype))


class DrawnAgain(Exception):
    """A backward pass draws once more what was not ``repeatable``."""


class _Again(counted):
    """See :meth:`counted.again`."""

    def __init__(self, first: counted) -> None:
        super().__init__(first.key)
        self.states = first.states
        self._open: list[ExitStack] = []

    def __enter__(self) -> _Again:
        self._open.append(ExitStack())
        # The thread that the mode is in carries the pass out.
        self._open[-1].enter_context(torch.autograd.set_multithreading_enabled(False))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open.pop().close()

    def number(self) -> int:
        if self.states is None:
            raise DrawnAgain
        number = self.states.get(_state())
        if number is None:
            raise ConfigurationError(
                "a part of the model under torch.utils.checkpoint draws random numbers (dropout), and in the backward "
                "pass they cannot be drawn again, since torch's generator is not as it was then. Leave "
                "preserve_rng_state=True, its default, and do not seed torch's generator inside the model"
            )
        _moved_on()
        return number


class unrepeated(counted):
    """Refuses draws in a backward pass, for steps that are traced or batched: there they could not be the same again.

    Raises:
        UnsupportedOperator: a part of the model under ``torch.utils.checkpoint`` draws random numbers.
    """

    def __init__(self) -> None:
        super().__init__(torch.zeros(2, dtype=torch.int32))

    def number(self) -> int:
        raise UnsupportedOperator("random numbers under torch.utils.checkpoint")


def _state() -> bytes:
    """The state of the generator that checkpointing always puts back."""
    return torch.default_generator.get_state().numpy().tobytes()


def _moved_on() -> bytes:
    """The state after one more number, which is drawn and forgotten."""
    torch.empty((), dtype=torch.int32).random_()
    return _state()


# --- the hash -----------------------------------------------------------------------------------------------


def _wrapped(word: int) -> int:
    """A 32-bit word as the signed number that int32 arithmetic knows."""
    return (word + 2**31) % 2**32 - 2**31


def _cells(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A number for every element, of its coordinates alone (not of the axes' lengths), int32 [shape]."""
    cells = torch.zeros((), dtype=torch.int32, device=device)
    for axis, length in enumerate(shape):
        step = _wrapped(_AXES[axis % len(_AXES)] + 2 * (axis // len(_AXES)))
        along = torch.arange(length, dtype=torch.int32, device=device) * step
        cells = cells + along.view(-1, *[1] * (len(shape) - 1 - axis))
    return cells


def _mixed(word: Tensor, shift: int, factor: int) -> Tensor:
    """One stage of the mixer; the shift is made logical by a mask, since int32's own copies the sign."""
    mixed: Tensor = (word ^ ((word >> shift) & (2 ** (32 - shift) - 1))) * factor
    return mixed


# --- counted rules ------------------------------------------------------------------------------------------


def _dropout(draw: counted, x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    if not train or p == 0:
        return x
    return x * _scaled_mask(draw, x, x.shape, p)


def _dropout_(draw: counted, x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    return x.mul_(_scaled_mask(draw, x, x.shape, p)) if train and p else x


def _feature_dropout(draw: counted, x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    return x * _scaled_mask(draw, x, _features(x), p) if train and p else x


def _feature_dropout_(draw: counted, x: Tensor, p: float = 0.5, train: bool = True) -> Tensor:
    return x.mul_(_scaled_mask(draw, x, _features(x), p)) if train and p else x


def _alpha_dropout(draw: counted, x: Tensor, p: float = 0.5, train: bool = False) -> Tensor:
    return _self_normalising(draw, x, p, x.shape) if train and p else x


def _alpha_dropout_(draw: counted, x: Tensor, p: float = 0.5, train: bool = False) -> Tensor:
    return x.copy_(_alpha_dropout(draw, x.clone(), p, train))


def _feature_alpha_dropout(draw: counted, x: Tensor, p: float = 0.5, train: bool = False) -> Tensor:
    return _self_normalising(draw, x, p, _features(x)) if train and p else x


def _feature_alpha_dropout_(draw: counted, x: Tensor, p: float = 0.5, train: bool = False) -> Tensor:
    return x.copy_(_feature_alpha_dropout(draw, x.clone(), p, train))


def _scaled_mask(draw: counted, x: Tensor, shape: Iterable[int], p: float) -> Tensor:
    """0 with probability p, else 1 / (1 − p), in the dtype of x; all 0 for p = 1."""
    return draw.kept(shape, 1 - p).to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _self_normalising(draw: counted, x: Tensor, p: float, shape: Iterable[int]) -> Tensor:
    """Alpha dropout (Klambauer et al. 2017, section "New dropout technique"): mean and variance stay."""
    if p == 1:
        return x * 0.0
    scale = 1 / math.sqrt((_SELU**2 * p + 1) * (1 - p))
    mask = draw.kept(shape, 1 - p).to(x.dtype)
    return (x * mask + _SELU * (mask - 1) + _SELU * p) * scale


def _features(x: Tensor) -> tuple[int, ...]:
    """The shape of a mask that drops whole channels."""
    return (*x.shape[:2], *[1] * (x.ndim - 2))


class Attention(NamedTuple):
    """The options of torch's scaled dot-product attention, in its order."""

    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attended(
    query: Tensor, key: Tensor, value: Tensor, *, options: Attention, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """Scaled dot-product attention written out; ``drop`` is applied to the weights [..., query, key]."""
    if options.enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scale = 1 / math.sqrt(query.size(-1)) if options.scale is None else options.scale
    scores, mask = query @ key.transpose(-2, -1) * scale, options.attn_mask
    if options.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return drop((scores if mask is None else scores + mask).softmax(-1)) @ value
    # A row that may look nowhere gives 0, as torch's own kernels do.
    somewhere = mask.any(-1, keepdim=True)
    weights = torch.where(mask | ~somewhere, scores, -math.inf).softmax(-1)
    return drop(torch.where(somewhere, weights, 0.0)) @ value


def _attention(draw: counted, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Tensor:
    options = Attention(*args, **named)
    if not options.dropout_p:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **named)
    return attended(query, key, value, options=options, drop=lambda weights: _dropout(draw, weights, options.dropout_p))


def _recurrent(draw: counted, func: Rule, args: Any) -> Any:
    """A stack of recurrent layers with dropout between them, layer by layer.

    ``args`` as torch's own: (input, state, …) or, for packed sequences, (data, batch sizes, state, …).
    """
    at = next(i for i in range(len(args) - 1, 0, -1) if isinstance(args[i], list | tuple))  # the weights
    weights, biased, layers, p, train, both_ways = args[at : at + 6]
    if not (train and p and layers > 1):
        return func(*args)
    x, state, width = args[0], args[at - 1], len(weights) // layers
    finals: list[Sequence[Tensor]] = []
    for layer in range(layers):
        x = _dropout(draw, x, p) if layer else x
        own = _layer_state(state, layer, 2 if both_ways else 1)
        part = weights[layer * width : (layer + 1) * width]
        x, *final = func(x, *args[1 : at - 1], own, part, biased, 1, 0.0, train, both_ways, *args[at + 6 :])
        finals.append(final)
    return x, *(torch.cat(parts) for parts in zip(*finals, strict=True))


def _layer_state(state: Any, layer: int, ways: int) -> Any:
    if isinstance(state, Tensor):
        return state[layer * ways : (layer + 1) * ways]
    return [s[layer * ways : (layer + 1) * ways] for s in state]


def _rand(draw: counted, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return draw.uniform(_shape(size), dtype or torch.get_default_dtype())


def _randn(draw: counted, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return draw.normal(_shape(size), dtype or torch.get_default_dtype())


def _rand_like(draw: counted, x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return draw.uniform(x.shape, dtype or x.dtype)


def _randn_like(draw: counted, x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return draw.normal(x.shape, dtype or x.dtype)


def _bernoulli(draw: counted, x: Tensor, p: float | None = None, **_: Any) -> Tensor:
    return (draw.uniform(x.shape, x.dtype) < (x if p is None else p)).to(x.dtype)


def _normal(draw: counted, mean: Any, std: Any = 1.0, size: Any = None, **_: Any) -> Tensor:
    tensors = [v for v in (mean, std) if isinstance(v, Tensor)]
    shape = sum(tensors).shape if size is None else tuple(size)  # type: ignore[union-attr]
    dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
    drawn: Tensor = mean + std * draw.normal(shape, dtype)
    return drawn


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


# --- seeded: whatever else is random ------------------------------------------------------------------------


def _seeded(draw: counted, func: Rule, args: Any, kwargs: Any) -> Any:
    """Run with torch's generator seeded from (key, call), and put the generator's state back."""
    if draw.strict or torch._C._functorch.is_functorch_wrapped_tensor(draw.key):
        raise UnsupportedOperator(f"torch.{getattr(func, '__name__', func)}")
    word = int(draw.bits((1,))) & 0xFFFFFFFF
    with torch.random.fork_rng(devices=[draw.key.device] if draw.key.is_cuda else []):
        torch.manual_seed(word)
        return func(*args, **kwargs)


@lru_cache(maxsize=64)
def _opened(func: FunctionType) -> Rule | None:
    """A copy of a composite of ``torch.nn.functional`` whose inner calls are seen one by one.

    Such functions hand themselves over whole where a mode is active; the copy never does. ``None`` for
    functions that draw nothing.
    """
    if func.__module__ != "torch.nn.functional" or not _DRAWING & set(func.__code__.co_names):
        return None
    return _unseen(func)


_CHECKS: Final = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _unseen(func: Any) -> Rule:
    """A copy of a function of torch's that never hands itself over to a mode, so that the mode sees what it does."""
    assert isinstance(func, FunctionType)
    names = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# Checkpointed parts of a model are called inside these.
_BACKWARD: Final = {f: _unseen(f) for f in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)}

_COUNTED: Final[dict[Any, Rule]] = {
    torch.dropout: _dropout,
    torch.dropout_: _dropout_,
    torch.native_dropout: lambda draw, x, p, train: (_dropout(draw, x, p, train is not False), None),
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _feature_dropout_,
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _alpha_dropout_,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _feature_alpha_dropout_,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: lambda draw, x, p=0.5, **_: x.copy_(draw.uniform(x.shape, torch.float32) < p),
    torch.normal: _normal,
}

_RECURRENT: Final = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})

_OTHERS: Final = (
    "binomial", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_", "poisson",
    "randint", "randint_like", "randperm", "random_", "rrelu", "rrelu_", "uniform_", "_sample_dirichlet",
    "_standard_gamma",
)  # fmt: skip
_OWNERS: Final = (torch, torch.Tensor, torch._C._nn)
_SEEDED: Final = frozenset(getattr(o, name) for o in _OWNERS for name in _OTHERS if hasattr(o, name))

_DRAWING: Final = frozenset(_OTHERS) | {func.__name__ for func in _COUNTED}
