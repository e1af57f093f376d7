"""Weak clients train a narrower part of the model: HeteroFL.

A client of fraction 0.5 holds the first half of the units of every hidden layer, and of every array the block that
connects them; it trains that part, and only that part travels. The server averages every entry over those that hold it.
Which entries a fraction holds is read off the Layout, so that a sub-model needs no module of its own: the others are
zero and stay zero, and a unit all of whose weights are zero computes what a missing one does.

Source: Diao, Ding, Tarokh 2021, "HeteroFL: Computation and communication efficient federated learning for
heterogeneous clients", section 3 (without its masked loss and static batch normalisation).

Not here: narrower modules as such. In simulation a sub-model takes as long as the whole one; its bytes are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, mean
from foedus.core.checks import named
from foedus.core.client import Client
from foedus.core.compose import Algorithm, fedavg
from foedus.core.method import Contribution, Gathered, Local, Method, Train, Visit, steered
from foedus.core.server import ServerOptimiser
from foedus.core.values import State
from foedus.errors import ConfigurationError
from foedus.tree import Layout, Vector

Mask = NDArray[np.bool_]


def heterofl(
    client: Client,
    fraction: Callable[[int], float],
    *,
    fractions: Sequence[float] = (1.0, 0.5, 0.25),
    held: Callable[[Layout, float], Mask] | None = None,
    aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None,
) -> Algorithm:
    """Federated averaging over clients that hold parts of different width (Diao et al. 2021).

    Args:
        client: local training of the part that a client holds.
        fraction: a client's position → its fraction, one of ``fractions``.
        fractions: that occur, each in (0, 1].
        held: ``(layout, fraction) -> bool [parameter]``, the entries that a fraction holds; by default
            :func:`prefix`, which knows models whose layers follow one another.
        aggregator: of each fraction's updates; by default the weighted mean.
        server: takes a step along the averaged update.

    Raises:
        ConfigurationError: a fraction is none of those announced, or the layers do not follow one another.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> weak_third = heterofl(local_sgd(lr=0.1), lambda client: 0.5 if client % 3 == 0 else 1.0)
        >>> sorted(weak_third.method.sides)
        ['shares', 'width 0.25', 'width 0.5', 'width 1.0']
    """
    if not callable(fraction):
        raise ConfigurationError(
            f"heterofl() takes a function from a client's position to its fraction, e.g. lambda client: 0.5; not "
            f"{fraction!r}"
        )
    widths = tuple(float(f) for f in fractions) if isinstance(fractions, Sequence) else ()
    if not widths or not all(0 < f <= 1 for f in widths) or len(set(widths)) < len(widths):
        raise ConfigurationError(f"fractions are different numbers in (0, 1], e.g. (1.0, 0.5); not {fractions!r}")
    chosen = held or prefix

    def local(visit: Visit) -> Local:
        mine = _index(fraction, visit.client, widths)
        mask, floats = _masks(chosen, widths, visit.layout)[mine]
        start = np.where(mask, visit.received, 0).astype(visit.received.dtype)
        trained = yield Train(start=start, anchor=start, mask=floats)
        update = (trained.vector - start)[mask]
        share = np.zeros(len(widths))
        share[mine] = 1.0
        sent = Contribution.of(trained, visit)
        return sent._replace(update=None, sides={f"width {widths[mine]}": update, "shares": share})

    def finish(gathered: Gathered) -> tuple[Vector | None, State]:
        if "shares" not in gathered.sides:
            return None, gathered.state
        total = np.zeros(len(gathered.vector))
        weight = np.zeros(len(gathered.vector))
        assert gathered.layout is not None
        for k, (width, (mask, _)) in enumerate(zip(widths, _masks(chosen, widths, gathered.layout), strict=True)):
            if (update := gathered.sides.get(f"width {width}")) is not None:
                share = float(gathered.sides["shares"][k])
                total[mask] += share * update
                weight[mask] += share
        return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), gathered.state

    rule = aggregator or mean()
    sides: Mapping[str, Aggregator] = {f"width {w}": rule for w in widths} | {"shares": mean()}
    told = "" if held is None else f", held={named(held)}"
    label = f"heterofl({named(fraction)}, fractions={widths}{told})"
    method = Method(local, label, sides=sides, finish=finish)
    method = method._replace(updates=frozenset(sides) - {"shares"}, fits=steered)
    return Algorithm(client=client, server=server or fedavg(client).server, method=method)


def prefix(layout: Layout, fraction: float) -> Mask:
    """The entries [parameter] of the first units of every hidden layer, for layers that follow one another.

    Arrays of two or more axes are weights [out, in, ...]; arrays of one axis belong to the units of the weights before
    them (biases, normalisation). Inputs of the first and outputs of the last weights are whole.

    Example:
        >>> layout = Layout(("a.weight", "a.bias", "b.weight"), ((4, 3), (4,), (2, 4)), ("float32",) * 3)
        >>> prefix(layout, 0.5).sum()
        np.int64(12)
    """
    weights = [shape for shape in layout.shapes if len(shape) > 1]
    if not weights:
        raise ConfigurationError("a model without weights of two axes has no units to leave out; give held=...")
    parts, before, number = [], (weights[0][1], weights[0][1]), 0  # units of the layer before: in all, and held
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        mask = np.zeros(shape, bool)
        if len(shape) > 1:
            number += 1
            each, rest = divmod(shape[1], before[0])
            if rest:
                raise ConfigurationError(
                    f"{name!r} has {shape[1]} inputs, which do not follow on {before[0]} units: these layers are no "
                    "chain. Say which entries a fraction holds: heterofl(held=lambda layout, fraction: ...)"
                )
            units = shape[0] if number == len(weights) else math.ceil(fraction * shape[0])
            mask[:units, : before[1] * each] = True
            before = shape[0], units
        elif shape == (before[0],):
            mask[: before[1]] = True
        else:
            mask[...] = True  # a scalar, or what belongs to no layer
        parts.append(mask.reshape(-1))
    return np.concatenate(parts)


class _Both(NamedTuple):
    """A mask, bool [parameter], and the same as the numbers 0 and 1."""

    mask: Mask
    floats: Vector


@lru_cache(maxsize=16)
def _masks(held: Callable[[Layout, float], Mask], widths: tuple[float, ...], layout: Layout) -> list[_Both]:
    """The masks of all fractions, once per layout: one object each, so that clients of one width train together."""
    found = [np.asarray(held(layout, width), bool) for width in widths]
    if wrong := [m.shape for m in found if m.shape != (layout.size,)]:
        raise ConfigurationError(f"held(layout, fraction) gives bool [{layout.size}], and gave {wrong[0]}")
    return [_Both(mask, mask.astype(layout.dtype)) for mask in found]


def _index(fraction: Callable[[int], float], client: int, widths: Sequence[float]) -> int:
    own = float(fraction(client))
    if own not in widths:
        raise ConfigurationError(
            f"the client at position {client} has the fraction {own}, which is none of {tuple(widths)}; announce it: "
            "heterofl(fractions=...)"
        )
    return widths.index(own)
