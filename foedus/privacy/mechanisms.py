"""Mechanisms: clipping and noise that make the model say little about any one client.

:func:`central` and :func:`adaptive` are aggregators: clients clip, the server adds noise to the sum before anything is
made of it. They protect against everybody who sees models, not against the server, which sees updates (secure
aggregation is for that). :func:`local` is a stage: each client adds the noise itself, and needs to trust nobody; that
takes far more noise for the same ε.

What makes a bound hold, in all three: entries become whole multiples of a grid (a power of two, far finer than the
noise), scaled so that the norm on the grid is at most the bound, exactly; sums are exact; the noise is a discrete
Gaussian on the same grid, added to whole numbers (``noise.py``), which may lie in floats as long as these hold every
sum exactly. A sum is divided by the *planned* number of clients: how many really came is data, and neither the noise
nor ε depends on it.

Not here: what it is worth (``accounting.py``), which combinations keep it (``claims.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import HIGH_BITS, LOW_BITS, Aggregator, Shortcut, fold, lift, mean
from foedus.core.checks import check_number
from foedus.core.lengths import BLOCK, CLOSE, about, of_block, squared, within
from foedus.core.stage import Stage, same
from foedus.core.totals import EXACT, Grid, Total, peak, whole_dtype
from foedus.core.values import Context, Message, State, Update
from foedus.errors import IncompatibleStages, NoGuarantee, Reason, SumOverflow, UpdateRefused
from foedus.privacy.events import Gaussian, LocalGaussian
from foedus.privacy.noise import add_discrete_gaussian
from foedus.tree import Vector

_STEPS = 512  # the noise's standard deviation in steps of the grid, at least
_FINE = 64  # a typical entry in steps of the grid, at least
_LEAST = 2.0**-56  # the finest grid that exact sums hold with room to spare
_FARTHEST = 20  # standard deviations that no noise exceeds: 13 for each of its parts


def grid(norm: float, noise_multiplier: float, size: int) -> float:
    """The distance of neighbouring values: the largest power of two of which the noise has at least 512, and the
    entries of an update as long as the bound typically 64.

    Args:
        norm: the bound C.
        noise_multiplier: z; the noise's standard deviation is z · C.
        size: entries of a vector.

    Raises:
        NoGuarantee: it would be finer than exact sums are.

    Example:
        >>> grid(1.0, 1.0, 100) == 2.0**-10
        True
    """
    coarse = norm * min(noise_multiplier / _STEPS, 1 / (_FINE * math.sqrt(max(size, 1))))
    step = 2.0 ** math.floor(math.log2(coarse))
    if step < _LEAST:
        raise NoGuarantee(
            f"clip={norm:g} with noise_multiplier={noise_multiplier:g} is finer than exact sums, whose steps are 2⁻⁶⁰. "
            "Scale updates and clip up, e.g. with a server learning rate below 1, or add more noise"
        )
    return step


def on_grid(vector: Vector, norm: float, step: float) -> NDArray[np.float64]:
    """A vector [entry] clipped, in whole steps of the grid, as float64: its norm is at most ``norm / step``, exactly.

    Squares of whole numbers add up exactly in float64 as long as the sum is below 2⁵³, so that the bound is checked
    without rounding; beyond, it is kept with some room.

    Args:
        vector: of any length.
        norm: the bound.
        step: of the grid; a power of two.

    Raises:
        SumOverflow: a value is not finite.

    Example:
        >>> on_grid(np.array([3.0, 4.0]), 1.0, 0.0625).tolist()
        [9.0, 12.0]
    """
    return steps_of(vector, norm / step, 1 / step)


def steps_of(
    vector: Vector, reach: float, factor: float, *, dtype: Any = np.float64, room: NDArray[Any] | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Whole numbers near ``factor`` · vector [entry], scaled so that their norm is at most ``reach``, exactly.

    Args:
        vector: of any length.
        reach: the bound, in steps.
        factor: steps in a unit.
        dtype: of the result; float32 must hold whole numbers up to the reach.
        room: for the result, if it fits.

    Raises:
        SumOverflow: a value is not finite.
    """
    most, found = square_of(reach), about(vector) * factor * factor
    if not math.isfinite(found):
        raise SumOverflow("an update that is not finite cannot be clipped")
    spare = 1 / max(math.sqrt(most), 2.0)  # by about so much the rounding of single entries may lengthen an update
    fits = room is not None and room.shape == vector.shape and room.dtype == dtype
    out = room if room is not None and fits else np.empty(len(vector), dtype)
    if found > most:
        left = max(most - len(vector) / 12, most / 4)  # rounding adds 1/12 to the square of an entry, on average
        factor *= math.sqrt(left / found * _room(out)) * (1 - spare)
    while (found := _rounded(vector, factor, out) / _room(out)) > most:
        factor *= math.sqrt(most / found) * (1 - spare)
        spare = min(2 * spare, 0.5)
    return out


def _room(whole: NDArray[Any]) -> float:
    """What share of a bound on squares may be used up: sums of squares in float32 may be too small by the rest."""
    return 1 - 2 * CLOSE if whole.dtype == np.float32 else 1.0


def _rounded(vector: Vector, factor: float, out: NDArray[Any]) -> float:
    """out = round(factor · vector), in blocks that stay in the cache; the squared norm of the whole numbers: exactly
    below 2⁵³ if they are float64, about if they are float32."""
    scratch, parts, factor = np.empty(min(BLOCK, len(vector)), out.dtype), [], out.dtype.type(factor)
    for at in range(0, len(vector), BLOCK):
        steps = out[at : at + BLOCK]
        np.multiply(vector[at : at + BLOCK], factor, out=steps, casting="same_kind")
        parts.append(of_block(np.rint(steps, out=steps), scratch))
    return math.fsum(parts)


def square_of(length: float) -> int:
    """The largest whole number that is at most the square of a length, less what adding up could round beyond 2⁵³."""
    above, below = length.as_integer_ratio()
    found = above**2 // below**2
    return found if found < 2**53 else found - (found >> 40)


class _Bound(NamedTuple):
    """A clipped sum with noise: the bound of one client's share, and the noise's standard deviation over it."""

    norm: float
    noise_multiplier: float

    def step(self, size: int) -> float:
        return grid(self.norm, self.noise_multiplier, size)

    def reach(self, size: int) -> float:
        """The bound in steps."""
        return self.norm / self.step(size)

    def clipped(
        self, vector: Vector, farthest: float = 1.0, *, scale: float = 1.0, room: NDArray[Any] | None = None
    ) -> NDArray[Any]:  # fmt: skip
        """``scale`` · vector [entry], clipped and put on the grid, in steps: floats that hold whole numbers up to the
        bound times ``farthest``."""
        step, reach = self.step(len(vector)), self.reach(len(vector))
        return steps_of(vector, reach, scale / step, dtype=whole_dtype(vector, reach * farthest), room=room)

    def noised(self, steps: NDArray[Any], purpose: str, context: Context) -> NDArray[Any]:
        """Whole steps [entry] with noise, in the same memory."""
        if (largest := peak(steps)) >= EXACT:
            raise SumOverflow(
                f"a sum of {largest:.3g} steps of {self.step(len(steps)):g} is no longer exact. Let fewer clients take "
                "part at once"
            )
        add_discrete_gaussian(steps, context, purpose, sigma=self.noise_multiplier * self.reach(len(steps)))
        return steps

    def noisy(self, steps: NDArray[Any], purpose: str, context: Context, *, unit: float = 1.0) -> NDArray[Any]:
        """Whole steps [entry] with noise, in the units of the norm, times ``unit``; overwrites the steps."""
        noised = self.noised(steps, purpose, context)
        noised *= self.step(len(steps)) * unit
        return noised

    def steps(self, message: Message, entries: slice = slice(None)) -> NDArray[np.float64]:
        """A sum of multiples of the grid, in whole steps [entry]."""
        high, low = (message[name][entries] for name in ("high", "low"))
        step = self.step(len(high))
        steps = high * (2.0**-HIGH_BITS / step)
        if low.any():
            steps += low * (2.0 ** -(HIGH_BITS + LOW_BITS) / step)
        return np.asarray(steps)

    def check(self, vector: NDArray[Any], context: Context) -> None:
        """Refuse what arrived if it is not on the grid, or longer than the bound: no client of ours sent it."""
        steps = vector.astype(np.float64) / self.step(len(vector))
        found = squared(steps)
        if not math.isfinite(found):
            reason, told = Reason.NOT_FINITE, "has values that are not finite"
        elif found > square_of(self.norm / self.step(len(vector))):
            reason, told = Reason.NORM, f"is longer than the bound {self.norm:g} that clients are to keep"
        elif (steps != np.rint(steps)).any():
            reason, told = Reason.RANGE, f"is not on the grid of {self.step(len(vector)):g} that clients are to keep"
        else:
            return
        raise UpdateRefused(f"the update of client {context.client} {told}", client=context.client, reason=reason)


def _one_by_one(rule: Aggregator, encode: _Encode, updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
    """The sum of updates as messages."""
    total = fold(rule, [encode(u, c) for u, c in zip(updates, contexts, strict=True)])
    assert total is not None
    return lift(total)


_Encode = Callable[[Update, Context], Message]


# --- noise on the server ------------------------------------------------------------------------------------


def central(
    rule: Aggregator | None = None, *, clip: float, noise_multiplier: float, cohort: float, most: float | None = None,
) -> Aggregator:  # fmt: skip
    """The mean of clipped updates with Gaussian noise that the server adds: user-level differential privacy
    (McMahan, Ramage, Talwar & Zhang 2018, "Learning differentially private recurrent language models", algorithm 1
    with the estimator f̃_f of section 3).

    With or without one client, the sum differs by at most ``clip`` in norm. It gets noise of standard deviation
    ``noise_multiplier · clip`` in every entry, and is divided by ``cohort``, the planned size, however many came.

    Args:
        rule: may be ``mean(weighted=False)``, which is what is meant; any other is refused with the reason.
        clip: the bound C of one client's contribution.
        noise_multiplier: z; ``foedus.calibrate()`` finds it.
        cohort: planned clients in a round; ``sampler.expected(population)``.
        most: by default all clients count the same. With it, a client of n examples counts min(n / most, 1), which only
            shortens what is clipped; let ``cohort`` then be the planned sum of these.

    Raises:
        IncompatibleStages: the rule is a weighted mean, or none at all.
        NoGuarantee: noise and bound are finer than exact sums.

    Example:
        >>> from foedus.core.values import SERVER
        >>> from foedus.privacy.noise import known_to_all_who_know_the_seed as known
        >>> rule = central(clip=1.0, noise_multiplier=0.01, cohort=2)
        >>> client, server = (Context(0, 1, who, size=2, secret=known) for who in (0, SERVER))
        >>> messages = [rule.encode(Update(np.array(v), weight=1), client) for v in ([30.0, 40.0], [0.0, 1.0])]
        >>> rule.decode({}, rule.merge(*messages), server)[0].round(1).tolist()
        [0.3, 0.9]
    """
    _check(clip, noise_multiplier, cohort)
    _check_rule(rule)
    if most is not None:
        check_number("most", most, above=True, also=", or None")
    bound = _Bound(float(clip), float(noise_multiplier))
    grid(bound.norm, bound.noise_multiplier, 1)
    added = mean(weighted=False)

    def clipped(update: Update, context: Context, room: NDArray[Any] | None = None) -> NDArray[Any]:
        vector = update.vector if most is None else _lighter(update, most, context)
        return bound.clipped(vector, room=room)

    def encode(update: Update, context: Context) -> Message:
        steps = clipped(update, context)
        steps *= bound.step(len(steps))
        return added.encode(Update(steps, 1.0), context)

    def admit(message: Message, context: Context) -> Message:
        bound.check(message["values"], context)
        return message

    def encode_all(updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        total = Grid(bound.step, bound.reach, clipped).total(updates, contexts)
        return _one_by_one(added, encode, updates, contexts) if total is None else total

    def decode(state: State, message: Message, context: Context) -> tuple[Vector, State]:
        return bound.noisy(bound.steps(lift(message)), "central", context, unit=1 / cohort), state

    weights = "" if most is None else f", most={most}"
    return added._replace(
        encode=encode, admit=admit, decode=decode, event=Gaussian(bound.noise_multiplier),
        encode_all=Shortcut(encode, added.merge, encode_all),
        label=f"central(clip={clip}, noise_multiplier={noise_multiplier}, cohort={cohort}{weights})",
    )  # fmt: skip


def _lighter(update: Update, most: float, context: Context) -> Vector:
    """The vector times min(weight / most, 1)."""
    weight = float(update.weight)
    if not (math.isfinite(weight) and weight >= 0):
        raise UpdateRefused(
            f"the update of client {context.client} claims the weight {weight}",
            client=context.client,
            reason=Reason.WEIGHT,
        )
    return update.vector * update.vector.dtype.type(min(weight / most, 1.0))


class _Clipping(NamedTuple):
    """How :func:`adaptive` follows a quantile of the norms."""

    quantile: float
    rate: float
    cohort: float

    def next(self, norm: float, surplus: float) -> float:
        """The next bound, from the noisy sum of (clipped? −1/2 : 1/2)."""
        share = surplus / self.cohort + 0.5
        return float(norm * math.exp(min(max(-self.rate * (share - self.quantile), -50.0), 50.0)))


def adaptive(
    *, noise_multiplier: float, cohort: float, start: float = 0.1, quantile: float = 0.5, rate: float = 0.2,
    bit_noise: float | None = None,
) -> Aggregator:  # fmt: skip
    """:func:`central` whose bound follows a quantile of the norms of updates (Andrew, Thakkar, McMahan & Ramaswamy
    2021, "Differentially private learning with adaptive clipping", algorithm 1).

    Beside its update, a client sends whether it was within the bound C: b ∈ {0, 1}, as b − 1/2. The server adds noise
    σ_b to their sum and moves C ← C · exp(−rate · (b̄ − quantile)). Both noises together cost what ``noise_multiplier``
    = z alone does, because updates get a little more: z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2). All clients count the same.

    C travels to the clients beside the model. Updates are sent divided by it, on the grid of a bound of 1.

    Args:
        noise_multiplier: z, of the whole.
        cohort: planned clients in a round.
        start: the bound C of the first round.
        quantile: the share of updates that is to be within the bound.
        rate: how fast C moves.
        bit_noise: σ_b; by default ``cohort / 20``, as in the paper (section 3.1), but no less than z, since small
            cohorts would have to spend everything on their bits.

    Raises:
        NoGuarantee: σ_b is so small that the bits alone would cost more than z.

    Example:
        >>> from foedus.tree import Layout
        >>> rule = adaptive(noise_multiplier=1.0, cohort=100)
        >>> rule.event, rule.tell(rule.init(Layout((), (), ())))["clip"].tolist()
        (Gaussian(noise_multiplier=1.0), [0.1])
    """
    _check(start, noise_multiplier, cohort)
    check_number("quantile", quantile, above=True, below=1)
    check_number("rate", rate, above=True)
    sigma = max(cohort / 20, noise_multiplier) if bit_noise is None else bit_noise
    check_number("bit_noise", sigma, above=True)
    own = _Bound(1.0, update_noise(noise_multiplier, sigma))
    bit = _Bound(0.5, 2 * sigma)
    follow = _Clipping(quantile, rate, cohort)
    added = mean(weighted=False)

    def clipped(update: Update, context: Context, room: NDArray[Any] | None = None) -> tuple[NDArray[Any], float]:
        norm = _told(context)
        inside = 0.5 if within(update.vector, norm) else -0.5
        return own.clipped(update.vector, scale=1 / norm, room=room), inside

    def encode(update: Update, context: Context) -> Message:
        steps, inside = clipped(update, context)
        steps *= own.step(len(steps))
        return added.encode(Update(np.append(steps, steps.dtype.type(inside)), 1.0), context)

    def encode_all(updates: Sequence[Update], contexts: Sequence[Context]) -> Message:
        size = len(updates[0].vector)
        total = Total(own.step(size), own.reach(size), [u.vector for u in updates], beside=1)
        if not total.exact:
            return _one_by_one(added, encode, updates, contexts)
        for update, context in zip(updates, contexts, strict=True):
            total.add(*clipped(update, context, total.room))
        return total.message()

    def admit(message: Message, context: Context) -> Message:
        values = message["values"]
        own.check(values[:-1], context)
        if not len(values) or abs(values[-1]) != 0.5:
            raise UpdateRefused(
                f"the bit of client {context.client} is neither −1/2 nor 1/2",
                client=context.client,
                reason=Reason.RANGE,
            )
        return message

    def decode(state: State, message: Message, context: Context) -> tuple[Vector, State]:
        total, norm = lift(message), float(state["clip"][0])
        surplus = bit.noisy(bit.steps(total, slice(-1, None)), "adaptive bit", context)
        noisy = own.noisy(own.steps(total, slice(-1)), "adaptive", context, unit=norm / cohort)
        return noisy, {"clip": np.array([follow.next(norm, float(surplus[0]))])}

    label = f"adaptive(noise_multiplier={noise_multiplier}, cohort={cohort}, start={start}, quantile={quantile}"
    return added._replace(
        init=lambda layout: {"clip": np.array([float(start)])}, encode=encode, admit=admit, decode=decode,
        tell=lambda state: {"clip": state["clip"]}, event=Gaussian(float(noise_multiplier)),
        encode_all=Shortcut(encode, added.merge, encode_all),
        label=f"{label}, rate={rate}, bit_noise={sigma})",
    )  # fmt: skip


def update_noise(noise_multiplier: float, bit_noise: float) -> float:
    """z_Δ of :func:`adaptive`: what updates need so that they and the bits together have ``noise_multiplier``.

    Raises:
        NoGuarantee: the bits alone cost more.

    Example:
        >>> round(update_noise(1.0, 100 / 20), 5)
        1.00504
    """
    left = noise_multiplier**-2 - (2 * bit_noise) ** -2
    if left <= 0:
        raise NoGuarantee(
            f"noise of {bit_noise:g} on the bits has a multiplier of {2 * bit_noise:g}, which leaves nothing of "
            f"noise_multiplier={noise_multiplier:g} for the updates. Write bit_noise={noise_multiplier:g}, or more, "
            "or use central() with a fixed bound"
        )
    return float(left**-0.5)


def _told(context: Context) -> float:
    """The bound that the server told this client."""
    told = context.told.get("clip")
    if told is None or told.shape != (1,) or not (math.isfinite(told[0]) and told[0] > 0):
        raise NoGuarantee(
            f"client {context.client} was told no bound to clip at. Whoever runs adaptive() sends what "
            "Aggregator.tell() gives beside the model, and puts it into the context"
        )
    return float(told[0])


# --- noise on the client ------------------------------------------------------------------------------------


def local(*, clip: float, noise_multiplier: float) -> Stage:
    """Noise that each client adds to its own clipped update before it is sent: local differential privacy, which needs
    no trust in anybody.

    Any two updates are at most ``2 · clip`` apart, so that one release is worth a Gaussian of half the multiplier. The
    server sees who sends, so no sampling makes it stronger. The number of examples would be sent beside the noise and
    is private too: every update gets the weight 1. Everything after it, any rule included, costs nothing more.

    A client must encode an update once, and send the same bytes when asked again; see ``noise.keyed``.

    Args:
        clip: the bound C of an update.
        noise_multiplier: z; every entry gets noise of standard deviation z · C.

    Raises:
        NoGuarantee: noise and bound are finer than exact sums.

    Example:
        >>> from foedus.core.stage import chain
        >>> chain(local(clip=1.0, noise_multiplier=4.0), mean()).event
        LocalGaussian(noise_multiplier=4.0)
    """
    _check(clip, noise_multiplier, 1)
    bound = _Bound(float(clip), float(noise_multiplier))
    grid(bound.norm, bound.noise_multiplier, 1)

    farthest = 1 + _FARTHEST * bound.noise_multiplier  # times the bound: no entry is beyond

    def noised(update: Update, context: Context, room: NDArray[Any] | None = None) -> NDArray[Any]:
        return bound.noised(bound.clipped(update.vector, farthest, room=room), "local", context)

    def encode(update: Update, context: Context) -> Update:
        steps = noised(update, context)
        steps *= bound.step(len(steps))
        return update._replace(vector=steps, weight=1.0)

    label = f"local(clip={clip}, noise_multiplier={noise_multiplier})"
    grid_of = Grid(bound.step, lambda size: farthest * bound.reach(size), noised)
    return Stage(encode, same, label, event=LocalGaussian(bound.noise_multiplier), grid=grid_of)


# --- refusals -----------------------------------------------------------------------------------------------


def _check(norm: Any, noise_multiplier: Any, cohort: Any) -> None:
    check_number("clip", norm, above=True)
    check_number("noise_multiplier", noise_multiplier, above=True)
    check_number("cohort", cohort, above=True)


def _check_rule(rule: Any) -> None:
    """Refuse every rule but the plain mean."""
    if rule is None or (isinstance(rule, Aggregator) and rule.label == mean(weighted=False).label):
        return
    name = getattr(rule, "label", repr(rule))
    if isinstance(rule, Aggregator) and rule.label == mean().label:
        why = (
            "weights by numbers of examples, which are data: one client could change the sum and the divisor without "
            "bound. Leave the rule out, so that all count the same, or write central(..., most=100), where none "
            "counts more than 1"
        )
    elif isinstance(rule, Aggregator) and not rule.additive:
        why = (
            "compares single updates: no bound on one update bounds what it changes there, and noise on a sum is not "
            "noise on it. Leave the rule out; or write chain(local(...), rule), which any rule may follow"
        )
    else:
        why = "is no mean. Stages go before it: chain(rotate(), central(...))"
    raise IncompatibleStages(f"central() adds noise to a sum of clipped updates, and {name} {why}")
