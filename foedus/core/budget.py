"""Which compression for how many bytes: the chain with the least error that fits.

Candidates are built for the budget, their error is measured on a probe (a vector like an update: normally distributed
unless you give one of yours), and the best whose message really is small enough is taken. Nothing is looked up: the
figures are those of the stages as they are.

Not here: the stages (``core/rotation.py``, ``core/sparse.py``, ``core/quantise.py``, ``core/layers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean, message_bytes
from foedus.core.checks import check_whole
from foedus.core.feedback import error_feedback
from foedus.core.layers import matrices
from foedus.core.quantise import eden, quantise
from foedus.core.random import generator
from foedus.core.rotation import padded, rotate
from foedus.core.sparse import random_mask, subsample, top_k
from foedus.core.stage import Stage, chain, clip
from foedus.core.values import Context, Update
from foedus.errors import ConfigurationError
from foedus.tree import Layout

_PROBE = 1 << 13  # entries that errors are measured on; none of them depends much on the length
_SPARE = 64  # bytes for what travels beside the codes: a weight, a scale


class Plan(NamedTuple):
    """What :func:`plan_compression` chose.

    Attributes:
        aggregator: ready for use.
        bytes: of one update on the wire.
        error: expected ‖what the server finds of one update − the update‖² / ‖the update‖². The mean over m clients of
            an unbiased chain with randomness of each client's own (``eden``, ``subsample``) has this divided by m.
        considered: label, bytes and error of the best five that fit, best first.

    Example:
        >>> plan = plan_compression(50_000, 199_210)
        >>> plan.aggregator.label, plan.bytes <= 50_000, 0.1 < plan.error < 0.16
        ('chain(subsample(0.985), eden(2), mean())', True, True)
    """

    aggregator: Aggregator
    bytes: int
    error: float
    considered: tuple[tuple[str, int, float], ...]


def plan_compression(
    budget: int,
    model: int | Layout,
    *,
    additive: bool = False,
    norm: float | None = None,
    feedback: bool = False,
    probe: NDArray[Any] | None = None,
) -> Plan:
    """The chain with the least error whose message of one update takes at most ``budget`` bytes.

    Args:
        budget: bytes; ``4 * n // 32`` for a message 32 times smaller than n plain floats.
        model: the number of parameters, or the model's layout: then biases and the scales of norms are left alone
            (unless ``additive``).
        additive: only chains that add up as they are, as secure aggregation needs them.
        norm: a bound on an update's Euclidean norm; additive chains need it to quantise (updates are clipped to it).
        feedback: also consider biased chains with error feedback; clients then keep a vector between rounds.
        probe: an update like those that will travel, to measure the errors on; by default normally distributed.

    Raises:
        ConfigurationError: no chain fits into the budget.

    Example:
        >>> plan = plan_compression(20_000, 199_210)
        >>> plan.aggregator.label, plan.bytes
        ('chain(subsample(0.781), eden(1), mean())', 19468)
    """
    check_whole("budget", budget, least=1)
    size = model.size if isinstance(model, Layout) else model
    check_whole("model", size, least=1)
    vector = _probe(probe, norm)
    rows = [
        (_error(bare, vector), rule)
        for rule, bare in _candidates(budget, model, len(vector), additive=additive, norm=norm, feedback=feedback)
    ]
    fits: list[tuple[Aggregator, int, float]] = []
    for error, rule in sorted(rows, key=lambda row: row[0]):
        if len(fits) < 5 and (taken := _bytes(rule, model)) <= budget:
            fits.append((rule, taken, error))
    if not fits:
        raise ConfigurationError(_nothing(budget, size, additive=additive, norm=norm))
    rule, taken, error = fits[0]
    return Plan(rule, taken, error, tuple((r.label, b, e) for r, b, e in fits))


def _candidates(
    budget: int, model: int | Layout, probe: int, *, additive: bool, norm: float | None, feedback: bool
) -> Iterator[tuple[Aggregator, Aggregator]]:
    """Each chain as it will be used, and as it is measured on ``probe`` entries, without a look at layers."""
    size, plain, wrap = _for_layers(model, additive=additive)
    room = budget - plain - _SPARE
    if additive:
        for stages, bare in zip(_additive(room, size, size, norm), _additive(room, size, probe, norm), strict=True):
            yield chain(*stages, mean()), chain(*bare, mean())
        return
    for stages in _single(room, size):
        yield chain(*wrap(stages), mean()), chain(*stages, mean())
    for stages in _biased(room, size) if feedback else ():
        yield error_feedback(chain(*wrap(stages), mean())), chain(*stages, mean())


def _for_layers(
    model: int | Layout, *, additive: bool
) -> tuple[int, int, Callable[[Sequence[Stage]], Sequence[Stage]]]:
    """How many entries are compressed, how many bytes the others take, and what chooses the former."""
    if isinstance(model, int):
        return model, 0, list
    if additive:
        return model.size, 0, list
    size = sum(n for n, shape in zip(model.sizes, model.shapes, strict=True) if len(shape) > 1)
    return size, 4 * (model.size - size), lambda stages: [matrices(*stages)]


def _single(room: int, size: int) -> Iterator[list[Stage]]:
    """Unbiased chains that are undone message by message."""
    for bits in range(1, 9):
        share = _share(8 * room / bits, size)
        if share == 1:
            yield [eden(bits)]
        elif bits <= 4 and share:
            yield [subsample(share), eden(bits)]


def _additive(room: int, size: int, length: int, norm: float | None) -> Iterator[list[Stage]]:
    """Chains that add up, quantised on the scale of a vector of ``length`` entries."""
    if share := _floor(room / 4 / size):
        yield [random_mask(min(share, 1.0))]
    for bits, width in product(range(1, 9), (2.0, 3.0, 4.0)) if norm is not None else ():
        assert norm is not None
        scale = float(f"{width * norm / math.sqrt(length):.3g}")  # ``width`` standard deviations of a rotated entry
        share = _share(8 * room / bits, size)
        if share == 1:
            yield [clip(norm), rotate(), quantise(bits, scale)]
        elif bits <= 4 and share:
            yield [clip(norm), random_mask(share), rotate(), quantise(bits, scale)]


def _biased(room: int, size: int) -> Iterator[list[Stage]]:
    """Chains for error feedback: the largest entries, coarsely."""
    for bits in (2, 4, 8):
        low, high = 0.0, 1.0
        for _ in range(40):  # a share s costs about s·(bits + 2 + log₂(1/s)) bits an entry
            share = (low + high) / 2
            fits = share * (1.04 * bits + 2 - math.log2(share)) <= 8 * room / size
            low, high = (share, high) if fits else (low, share)
        if share := _floor(low):
            yield [top_k(share), eden(bits, biased=True)]


def _share(entries: float, size: int) -> float:
    """Of ``size`` entries, so many that they are at most ``entries`` once rotated; 0 if there are none."""
    count = min(int(entries), size)
    while count > 0 and padded(count) > entries:
        count -= max(1, padded(count) - int(entries))
    return 1.0 if count == size else _floor(count / size)


def _floor(share: float) -> float:
    """A share of three digits, rounded down; 0 if there is none."""
    if share <= 0:
        return 0.0
    digits = 3 - math.ceil(math.log10(share))
    scale = 10.0**digits
    return math.floor(share * scale) / scale


def _probe(given: NDArray[Any] | None, norm: float | None) -> NDArray[np.float32]:
    """A vector to measure on, of norm ``norm`` if there is one."""
    draw = generator(0, "probe")
    vector = draw.standard_normal(_PROBE) if given is None else np.asarray(given, np.float64).reshape(-1)
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length) or not length:
        raise ConfigurationError("probe must be an update of finite numbers that are not all 0")
    if len(vector) > 4 * _PROBE:  # entries at random stand for all of them
        vector = vector[draw.choice(len(vector), 4 * _PROBE, replace=False)]
        length = float(np.linalg.norm(vector)) or 1.0
    return (vector / length * (norm or 1.0)).astype(np.float32)


def _error(rule: Aggregator, vector: NDArray[np.float32]) -> float:
    """Of one update, the mean over a few draws."""
    found = []
    for seed in range(3):
        context = Context(seed, 1, 0, size=len(vector))
        message = rule.admit(rule.encode(Update(vector, 1.0), context), context)
        found.append(np.square(rule.decode({}, message, context)[0] - vector).sum())
    return float(np.mean(found) / np.square(vector.astype(np.float64)).sum())


def _bytes(rule: Aggregator, model: int | Layout) -> int:
    """Of the message of an update of this size."""
    layout = model if isinstance(model, Layout) else None
    size = model.size if isinstance(model, Layout) else model
    update = Update(generator(0, "bytes").standard_normal(size, np.float32), 1.0)
    return message_bytes(rule.encode(update, Context(0, 1, 0, layout, size)))


def _nothing(budget: int, size: int, *, additive: bool, norm: float | None) -> str:
    """Why no chain fits."""
    told = f"no chain sends an update of {size:,} parameters in {budget:,} bytes"
    if additive and norm is None:
        return f"{told} that adds up without a bound on its norm. Give norm=..., so that entries can be quantised"
    return f"{told}. Give more bytes, or a smaller model"
