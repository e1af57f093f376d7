"""The gate: checks of one message or update before it can change anything, on the server and on the client itself.

On the server a :class:`Gate` looks at what arrived: names, shapes and dtypes, finite values, the norm, the claimed
weight, and whether this client is counted already. Whatever fails is refused with a
:class:`~foedus.errors.UpdateRefused` that names its reason, and never enters an aggregate. On the client,
:func:`self_checked` makes a method look at its own result before it sends it.

Behind masks (secure aggregation) a server sees no single update: shape, dtype, the range of codes and replay can be
checked, norms and scores cannot. :func:`check_maskable` refuses a combination that would need more.

Not here: rules that compare updates with each other (``core/robust.py``), scores over rounds (``core/scores.py``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator
from foedus.core.checks import check_number
from foedus.core.method import Contribution, Local, Measure, Method, Visit, averaging
from foedus.core.values import Context, Message, Update
from foedus.errors import ConfigurationError, IncompatibleStages, Reason, UpdateRefused

Range = tuple[float, float]  # the lowest and the highest that is let pass


class Form(NamedTuple):
    """What an array of a message looks like: dtype, and length along every axis, ``None`` where it varies."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What every single update has to pass. A value; its checks are pure and raise.

    Shape, dtype, finite values and replay are always checked.

    Attributes:
        max_norm: the largest Euclidean norm; ``None`` for any. (To scale down instead of refusing: ``clip``.)
        max_weight: the largest weight that a client may claim, such as its number of examples.

    Example:
        >>> gate = Gate(max_norm=10.0)
        >>> gate.check(Update(np.array([30.0, 40.0], "f4"), weight=1), Context(0, 1, client=7))
        Traceback (most recent call last):
        foedus.errors.UpdateRefused: the update of client 7 has the norm 50, and at most 10 passes
    """

    max_norm: float | None = None
    max_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_norm", "max_weight"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, above=True, also=", or None")

    @property
    def label(self) -> str:
        given = [f"{n}={v}" for n in ("max_norm", "max_weight") if (v := getattr(self, n)) is not None]
        return f"Gate({', '.join(given)})"

    @property
    def needs_single(self) -> bool:
        """Whether it looks at more of a single update than can be seen behind a mask."""
        return self.max_norm is not None or self.max_weight is not None

    def lets(self, norm: float, weight: float) -> bool:
        """Whether a finite update of that norm and weight passes; who does not is told why by :meth:`check`.

        Example:
            >>> Gate(max_norm=10.0).lets(5.0, 1), Gate(max_norm=10.0).lets(50.0, 1)
            (True, False)
        """
        light = weight > 0 and (self.max_weight is None or weight <= self.max_weight)
        return light and (self.max_norm is None or norm <= self.max_norm)

    def check(self, update: Update, context: Context, *, counted: Collection[int] = ()) -> None:
        """Check one client's update.

        Args:
            update: as it arrived, or as it was decoded.
            context: whose it is; ``context.size`` its length, 0 if any length will do.
            counted: the clients whose updates are counted already in this round.

        Raises:
            UpdateRefused: with the reason.
        """
        check_replay(context, counted)
        vector, size = update.vector, context.size or update.vector.size
        if vector.shape != (size,):
            _refuse(context, Reason.SHAPE, f"has the shape {vector.shape}, and the model has {size} parameters")
        if vector.dtype.kind != "f":
            _refuse(context, Reason.DTYPE, f"has the dtype {vector.dtype}, and updates are floating-point numbers")
        norm = _norm(vector)
        if not math.isfinite(norm):
            _refuse(context, Reason.NOT_FINITE, _told(vector, context))
        if self.max_norm is not None and norm > self.max_norm:
            _refuse(context, Reason.NORM, f"has the norm {norm:g}, and at most {self.max_norm:g} passes")
        self.check_weight(update.weight, context)

    def check_message(
        self, message: Message, forms: Mapping[str, Form], context: Context, *, counted: Collection[int] = ()
    ) -> None:
        """Check what arrived, before anything of it is used: this much is possible behind masks, too.

        Args:
            message: one client's.
            forms: see :func:`forms_of`.
            context: whose it is.
            counted: the clients whose messages are counted already in this round.

        Raises:
            UpdateRefused: with the reason.
        """
        check_replay(context, counted)
        if message.keys() != forms.keys():
            _refuse(context, Reason.SHAPE, f"consists of {sorted(message)}, and should of {sorted(forms)}")
        for name, form in forms.items():
            array = message[name]
            if array.dtype.str != form.dtype:
                _refuse(context, Reason.DTYPE, f"has {name!r} of dtype {array.dtype}, and should of {form.dtype}")
            if len(array.shape) != len(form.shape) or any(
                n is not None and n != m for n, m in zip(form.shape, array.shape, strict=True)
            ):
                _refuse(context, Reason.SHAPE, f"has {name!r} of shape {array.shape}, and should of {form.shape}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                _refuse(context, Reason.NOT_FINITE, f"has values in {name!r} that are not finite")

    def check_weight(self, weight: float, context: Context) -> None:
        """Check what a client says it counts: a number above 0, and at most ``max_weight``."""
        if not (math.isfinite(weight) and weight > 0):
            _refuse(context, Reason.WEIGHT, f"claims the weight {weight}, and weights are numbers above 0")
        if self.max_weight is not None and weight > self.max_weight:
            _refuse(
                context,
                Reason.WEIGHT,
                f"claims the weight {weight:g}, and at most {self.max_weight:g} passes",
            )


def forms_of(aggregator: Aggregator, context: Context, *, dtype: str = "<f4") -> dict[str, Form]:
    """What messages to an aggregator look like, found by encoding two updates: what differs may vary.

    Args:
        aggregator: the one that clients encode for.
        context: with ``size``, the number of parameters, and a layout if the aggregator needs one.
        dtype: the updates'.

    Example:
        >>> from foedus.core.robust import median
        >>> forms_of(median(), Context(0, 1, 0, size=3))["values"]
        Form(dtype='<f4', shape=(3,))
    """
    low = -1 if np.dtype(dtype).kind != "u" else 0
    ramp = np.resize(np.linspace(low, 1, min(context.size, 1 << 10), dtype=dtype), context.size)
    probes = [aggregator.encode(Update(v, 1.0), context) for v in (np.zeros_like(ramp), ramp)]
    return {n: _form(probes[0][n], probes[1][n]) for n in probes[0]}


def check_maskable(aggregator: Aggregator, gate: Gate | None = None) -> None:
    """Refuse what cannot work where only masked sums are seen.

    Args:
        aggregator: the one whose sums are to be masked, or are.
        gate: what looks at updates before that.

    Raises:
        IncompatibleStages: says what needs single updates, and what to use instead.

    Example:
        >>> from foedus.core.robust import krum
        >>> check_maskable(krum(2))
        Traceback (most recent call last):
        foedus.errors.IncompatibleStages: krum(attackers=2) compares single updates, and under masks only their sum is
        seen. Bound what each can do instead: chain(clip(radius), mean(weighted=False))
    """
    if not aggregator.additive:
        raise IncompatibleStages(
            f"{aggregator.label} compares single updates, and under masks only their sum is "
            "seen. Bound what each can do instead: chain(clip(radius), mean(weighted=False))"
        )
    if gate is not None and gate.needs_single:
        raise IncompatibleStages(
            f"{gate.label} looks at norms or weights of single updates, and under masks nobody sees these. Let clients "
            "keep the bound themselves: chain(clip(radius), mean(weighted=False)) and Gate()"
        )


# --- on the client ------------------------------------------------------------------------------------------


def check_own(before: float, after: float, limits: Range) -> bool:
    """Whether a figure is finite and within a range of what it was: from ``limits[0] · before`` to
    ``limits[1] · before``.

    Example:
        >>> check_own(0.5, 0.6, (0.0, 1.5)), check_own(0.5, 0.8, (0.0, 1.5)), check_own(0.5, float("nan"), (0.0, 1.5))
        (True, False, False)
    """
    return math.isfinite(after) and limits[0] * before <= after <= limits[1] * before


def self_checked(method: Method | None = None, *, within: Mapping[str, Range]) -> Method:
    """A method whose clients look at their own result before they send it.

    Each client measures the received model and its own on its training examples; if a figure left its range, it
    sends nothing in this round, keeps what it kept before, and reports ``withheld``. That protects a
    federation from clients that went wrong by accident: diverged, or with damaged data.

    Args:
        method: what clients do otherwise; by default they train and send the update.
        within: by figure ("loss", or the name of a metric) the range of after / before.

    Example:
        >>> self_checked(within={"loss": (0.0, 1.5)}).label
        "self_checked(plain(), within={'loss': (0.0, 1.5)})"
    """
    inner = averaging() if method is None else method
    if not within or any(not 0 <= low <= high for low, high in within.values()):
        raise ConfigurationError(
            f"within gives each figure a range of after / before, e.g. {{'loss': (0.0, 1.5)}}; not {within!r}"
        )

    if inner.updates:
        raise ConfigurationError(
            f"{inner.label} sends what it learned in channels of its own ({', '.join(sorted(inner.updates))}), which "
            "are no model that a client could measure: check inside that method, or leave self_checked() out"
        )

    def local(visit: Visit) -> Local:
        before = yield Measure(visit.received)
        brought = yield from inner.local(visit)
        if brought.update is None:
            return brought
        after = yield Measure(visit.received + brought.update, brought.buffers)
        good = all(check_own(before[name], after[name], limits) for name, limits in within.items())
        report = dict(brought.report) | {"withheld": float(not good)}
        if good:
            return brought._replace(report=report)
        return Contribution(None, kept=visit.kept, loss=brought.loss, steps=brought.steps, report=report)

    return inner._replace(local=local, label=f"self_checked({inner.label}, within={dict(within)})", looks=True)


# --- reasons ------------------------------------------------------------------------------------------------


def _refuse(context: Context, reason: Reason, told: str) -> None:
    raise UpdateRefused(f"the update of client {context.client} {told}", client=context.client, reason=reason)


def check_replay(context: Context, counted: Collection[int]) -> None:
    """Refuse a client that is counted already in this round."""
    if context.client in counted:
        _refuse(context, Reason.REPLAY, f"is counted already in round {context.round}")


def check_side(values: NDArray[Any], context: Context, what: str, *, like: tuple[int, ...]) -> None:
    """Refuse what travels beside an update if it is no vector of real numbers, or of another length than others'."""
    if values.dtype.kind not in "fiu":
        _refuse(context, Reason.DTYPE, f"has {what} of dtype {values.dtype}, and these are real numbers")
    if values.shape != like:
        _refuse(context, Reason.SHAPE, f"has {what} of shape {values.shape}, and should of {like}")


def _norm(vector: NDArray[Any]) -> float:
    """The Euclidean norm; one pass in the vector's own precision where that is exact enough."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(vector @ vector)
    if math.isfinite(squared) or vector.dtype == np.float64:
        return math.sqrt(squared) if squared >= 0 else math.nan
    return float(np.linalg.norm(vector.astype(np.float64)))


def _told(vector: NDArray[Any], context: Context) -> str:
    """Where the first value lies that is not finite."""
    wrong = ~np.isfinite(vector)
    if not wrong.any():
        return "is too long for its norm to be a number"
    first = int(np.argmax(wrong))
    layout = context.layout
    named = repr(layout.name_at(first)) if layout is not None and layout.size == len(vector) else str(first)
    return f"has {vector[first]} in parameter {named} ({int(wrong.sum())} values not finite)"


def _form(one: NDArray[Any], other: NDArray[Any]) -> Form:
    return Form(one.dtype.str, tuple(n if n == m else None for n, m in zip(one.shape, other.shape, strict=True)))
