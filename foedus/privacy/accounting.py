"""Accountants: what events are worth together, as (ε, δ). The only file that knows ``dp_accounting``.

Two accountants, both upper bounds. :func:`rdp` adds Rényi divergences up (Mironov 2017; Poisson sampling: Mironov,
Talwar & Zhang 2019); it stays valid where events are chosen on the way, which makes it the one for budgets that may
stop a run at any time (a *filter*, Lécuyer 2021; Feldman & Zrnic 2021). A filter is proven for an order that is fixed
beforehand, and :func:`rdp` takes the best one afterwards. For the rounds of one run that is the same: all of them make
the same event, so that how long the run may get, and by which order, is settled before it begins, and stopping earlier
only shows less. Whoever chooses *events* by what was released before leaves that proof. :func:`pld` convolves the
distributions of the privacy loss (Koskela et al. 2020; Doroshenko et al. 2022), which is tighter, and valid for
schedules that were fixed beforehand.

Not here: which events a run makes (``claims.py``), how many there were (``ledger.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus.core.checks import check_number, check_whole
from foedus.errors import ConfigurationError, MissingExtra, NoGuarantee
from foedus.privacy.events import (
    BandedStream,
    Concentrated,
    Event,
    Gaussian,
    LocalGaussian,
    Neighbours,
    Sampled,
    SharedGaussian,
    SharedSkellam,
    Stream,
    ToeplitzStream,
    Tree,
    TreeStream,
    known,
)

History = Sequence[tuple[Event, int]]  # events, and how often each took place
Accountant = Callable[[History, float], float]  # (history, δ) -> ε

_FINEST = 1e-4  # of a privacy loss, where ε is about 1


def rdp(history: History, delta: float) -> float:
    """ε by Rényi differential privacy, converted at the best of dp_accounting's orders.

    Args:
        history: events and how often each took place; nothing gives 0.
        delta: δ in (0, 1).

    Raises:
        NoGuarantee: an event is unknown, or two have different neighbours.
        MissingExtra: ``pip install 'foedus[privacy]'``.

    Example:
        >>> round(rdp([(Sampled(0.01, Gaussian(4.0)), 10_000)], 1e-5), 2)  # Abadi et al. 2016 found 1.26
        1.04
    """
    return _rdp(checked(history), _share(delta))


def within(history: History, first: Event, epsilon: float, delta: float) -> bool:
    """Whether a history keeps within (ε, δ), as a filter: also if what is released next was chosen by what was before.

    That is proven where Rényi's order is fixed beforehand (Feldman & Zrnic 2021, "Individual privacy accounting via a
    Rényi filter"). Here it is the one at which ``first``, over and over, could take place most often; where all events
    are like it, that is the same as asking whether :func:`rdp` is at most ε.

    Args:
        history: events and how often each took place, or is to.
        first: the event that took place first of all.
        epsilon, delta: the bound.

    Example:
        >>> [within([(Gaussian(4.0), count)], Gaussian(4.0), 4.74, 1e-5) for count in (16, 17)]
        [True, False]
    """
    rows, orders = _singly(checked([(first, 0), *history])), np.array(_orders())
    usable = orders > 1.01  # nearer to 1 the conversion is not stable, and worth nothing
    left = np.where(usable, epsilon - np.log1p(-1 / orders) + np.log(_share(delta) * orders) / (orders - 1), -np.inf)
    ((alone, _),) = _singly(((known(first), 1),))
    at = int(np.argmax(left / _divergences(alone)))
    return bool(left[at] > 0 and sum(count * _divergences(event)[at] for event, count in rows) <= left[at])


def pld(history: History, delta: float, *, step: float | None = None) -> float:
    """ε by the distribution of the privacy loss: tighter than :func:`rdp`, for schedules fixed beforehand.

    Args:
        history: as for :func:`rdp`; no ``Tree``, no shares of noise, and no ``Concentrated``.
        delta: δ in (0, 1).
        step: of the grid that privacy losses are put on, upwards: a finer one gives less, never less than the truth. By
            default 10⁻⁴ where ε is about 1, and in proportion elsewhere.

    Raises:
        NoGuarantee: an event is unknown, cannot be accounted for so, or two have different neighbours.
        MissingExtra: ``pip install 'foedus[privacy]'``.

    Example:
        >>> round(pld([(Gaussian(1.0), 1)], 1e-5), 2), round(rdp([(Gaussian(1.0), 1)], 1e-5), 2)
        (4.38, 4.73)
    """
    rows = checked(history)
    if loose := [event for event, _ in rows if isinstance(event, Tree | SharedGaussian | SharedSkellam | Concentrated)]:
        raise NoGuarantee(f"the privacy loss of {loose[0]} has no distribution that is known; use rdp")
    if step is not None:
        check_number("step", step, above=True)
    return _pld(rows, _share(delta), step)


def checked(history: History) -> tuple[tuple[Event, int], ...]:
    """A history as a tuple, once it can be accounted for: all events known, and against neighbours that go together."""
    rows = tuple((known(event), count) for event, count in history)
    for event, count in rows:
        check_whole(f"how often {event} took place", count, least=0)
    kinds = {event.neighbours for event, _ in rows}
    if len({kind.of_a_sum for kind in kinds}) > 1:
        raise NoGuarantee(
            f"privacy against different neighbours does not add up ({'; '.join(sorted(kinds))}). Account for each by "
            "itself"
        )
    return tuple((event, int(count)) for event, count in rows if count)


def _singly(rows: tuple[tuple[Event, int], ...]) -> tuple[tuple[Event, int], ...]:
    """The same history with streams, which are one release of so many rounds, as the Gaussian that they amount to."""
    return tuple((Gaussian(e.after(n)), 1) if isinstance(e, Stream) else (e, n) for e, n in rows)


def neighbours(history: History) -> Neighbours | None:
    """What a history's guarantee is about; ``None`` where nothing took place."""
    kinds = {event.neighbours for event, _ in checked(history)}
    return Neighbours.ONE_CLIENT_BLANK if Neighbours.ONE_CLIENT_BLANK in kinds else next(iter(kinds), None)


@lru_cache(maxsize=4096)
def _rdp(rows: tuple[tuple[Event, int], ...], delta: float) -> float:
    if not rows:
        return 0.0
    orders = _orders()
    total = sum((count * _divergences(event) for event, count in _singly(rows)), np.zeros(len(orders)))
    with _quiet() as library:
        return float(library.rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=4096)
def _divergences(event: Event) -> NDArray[np.float64]:
    """The Rényi divergence of one event at each of the orders; infinite where it is not known."""
    if isinstance(event, SharedSkellam):  # the library has no such event
        return np.array([event.divergence(order) for order in _orders()])
    with _quiet() as library:
        accountant = library.rdp.RdpAccountant(_orders(), neighboring_relation=_relation(event, library))
        found = np.asarray(_composed(accountant, ((event, 1),), library).rdp, np.float64)
    return np.where(found > 0, found, np.inf)  # what cancelled to nothing, or is not a number, is not known


@lru_cache(maxsize=1)
def _orders() -> tuple[float, ...]:
    with _quiet() as library:
        return tuple(map(float, library.rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS))


@lru_cache(maxsize=256)
def _pld(rows: tuple[tuple[Event, int], ...], delta: float, step: float | None) -> float:
    if not rows:
        return 0.0
    if step is None:
        step = _FINEST * max(0.1, _rdp(rows, delta))  # a grid as fine for an ε of 300 would have millions of points
    with _quiet() as library:
        accountant = library.pld.PLDAccountant(
            neighboring_relation=_relation(_singly(rows)[0][0], library), value_discretization_interval=step
        )
        return float(_composed(accountant, _singly(rows), library).get_epsilon(delta))


def _composed(accountant: Any, rows: tuple[tuple[Event, int], ...], library: Any) -> Any:
    for event, count in rows:
        try:
            accountant.compose(_translated(event, library), count)
        except library.UnsupportedEventError as error:
            raise NoGuarantee(f"{event} cannot be accounted for so: {error}") from error
    return accountant


def _translated(event: Event, library: Any) -> Any:
    """The event of dp_accounting."""
    match event:
        case Gaussian(z):
            return library.GaussianDpEvent(z)
        case LocalGaussian(z):
            return library.GaussianDpEvent(z / 2)
        case Sampled(rate, inner):
            return library.PoissonSampledDpEvent(rate, _translated(inner, library))
        case Tree(z, steps):
            return library.SingleEpochTreeAggregationDpEvent(z, steps)
        case Concentrated(rho):
            return library.ZCDpEvent(rho)
        case SharedGaussian():
            return library.ZCDpEvent(event.rho)
        case BandedStream() | TreeStream() | ToeplitzStream():
            return library.GaussianDpEvent(event.after(event.rounds))
        case SharedSkellam():
            raise NoGuarantee(f"{event} is accounted for by Rényi divergences only")


def _relation(event: Event, library: Any) -> Any:
    """The library's. Of a sum of those who take part each by itself, zeros in one's place and one less are the same,
    and its figures, too; for trees it has the first only."""
    kinds = library.NeighboringRelation
    return kinds.REPLACE_SPECIAL if isinstance(event, Tree) else kinds.ADD_OR_REMOVE_ONE


def smallest_noise(
    event_of: Callable[[float], tuple[Event, int]], target: tuple[float, float], by: Accountant
) -> float:
    """The smallest noise multiplier that keeps a target, to 0.01 % and never below it.

    Args:
        event_of: noise multiplier -> an event, and how often it takes place.
        target: (ε, δ).
        by: the accountant.

    Raises:
        ConfigurationError: no multiplier up to 10⁶ is enough.
    """
    epsilon, delta = target

    def enough(noise_multiplier: float) -> bool:
        return by([event_of(noise_multiplier)], delta) <= epsilon

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > 1e6:
            raise ConfigurationError(
                f"no noise gives ε = {epsilon:g} at δ = {delta:g}: what is known of so small an ε at this δ is not "
                "tight enough. Allow more, or a larger δ"
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return math.nextafter(high, math.inf)


def _share(delta: float) -> float:
    check_number("delta", delta, below=1, above=True)
    return float(delta)


@contextmanager
def _quiet() -> Iterator[Any]:
    """dp_accounting, which meanwhile does not warn of orders that it leaves out: ε is a minimum over the others."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
        from absl import logging as told
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy", "Privacy accounting") from error
    before = told.get_verbosity()
    told.set_verbosity(told.ERROR)
    try:
        yield dp_accounting
    finally:
        told.set_verbosity(before)
