"""Noise in shares: every client adds a little, and the sum over a round has enough for all of them.

With :func:`central` noise the server sees updates; with :func:`local` noise every update carries all the noise that it
needs alone. In between: each client adds a share, whole numbers on a grid, and only the *sum* is ever seen, because it
is formed under masks (:func:`foedus.masked`). What is seen then has about as little noise as with a trusted server.

How a client encodes: clip to the bound; rotate, so that no entry of a sum sticks out; round at random to whole steps of
a grid, again and again until the bound holds exactly; add integer noise. Sums are taken modulo 2^bits, and the grid is
so coarse that they hardly ever wrap around. If they do, the model is hurt; privacy is not.

Sources: Kairouz, Liu & Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation" (algorithms 1 and 2, theorem 1); Agarwal, Kairouz & Liu 2021, "The Skellam mechanism for differentially
private federated learning" (corollary 4.1).

Not here: masks (``foedus.secure``), what it is worth (``accounting.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator
from foedus.core.checks import check_number, check_whole
from foedus.core.coding import dither, draws, part
from foedus.core.lengths import about, squared
from foedus.core.rotation import padded, turned, turned_back
from foedus.core.stage import Kind, Stage
from foedus.core.values import Context, Message, State, Update
from foedus.errors import ConfigurationError, IncompatibleStages, NoGuarantee, NothingToAggregate, SumOverflow
from foedus.privacy.events import SharedGaussian, SharedSkellam
from foedus.privacy.mechanisms import square_of
from foedus.privacy.noise import discrete_gaussian, skellam
from foedus.tree import Layout, Vector

SPREAD = 2.0  # steps of the grid that a share's standard deviation has at least
FINEST = 1024.0  # and at most: finer gains nothing
REJECTED = 2.0**-20  # the probability that a rounding has to be repeated, at most
_TRIES = 64
_BLOCK = 1 << 14

Noise = Callable[[Context, NDArray[np.int64], float], NDArray[np.int64]]


class Shares(NamedTuple):
    """What clients of a round share: see :func:`gaussian_shares`.

    Attributes:
        clip: the bound of one client's update.
        noise_multiplier: of the sum of ``honest`` shares.
        cohort: most contributions that a sum holds.
        honest: fewest honest ones.
        bits: sums are taken modulo 2^bits.
        rotated: whether updates are rotated first.
        wrap: the probability that an entry of a round's sum wraps around, at most.
        noise: draws a share's noise for whole numbers, of a standard deviation in steps.
        least: steps of the grid that the standard deviation of all noise must have.
    """

    clip: float
    noise_multiplier: float
    cohort: int
    honest: int
    bits: int
    rotated: bool
    wrap: float
    noise: Noise
    least: float

    @property
    def deviation(self) -> float:
        """Of one share's noise, in the units of an update."""
        return self.noise_multiplier * self.clip / math.sqrt(self.honest)

    def entries(self, size: int) -> int:
        """Of an encoded update."""
        return padded(size) if self.rotated else size

    def step(self, size: int) -> float:
        """The distance of neighbouring values of the grid, for an update of so many entries.

        An entry of the sum is within ±half steps but with probability ``wrap``: noise, rounding and (if rotated) the
        updates themselves are sub-Gaussian, and so is their sum; a union bound goes over the entries.

        Raises:
            NoGuarantee: so few bits leave too coarse a grid.
        """
        entries, half = self.entries(size), 2.0 ** (self.bits - 1) - 1
        far = 2 * math.log(2 * max(entries, 1) / self.wrap)  # squared deviations
        variance, surely = self.cohort * self.deviation**2, 0.0
        if self.rotated:  # no entry of the matrix exceeds √(2 / entries)
            variance += 2 * (self.cohort * self.clip) ** 2 / max(entries, 1)
        else:
            surely = self.cohort * self.clip
        # (half · step − surely)² = far · (variance + cohort · step² / 4), a quadratic equation for the step
        a, b, c = half**2 - far * self.cohort / 4, half * surely, surely**2 - far * variance
        if a <= 0:
            raise self._coarse(size, math.inf)
        found = max((b + math.sqrt(b**2 - a * c)) / a, self.deviation / FINEST)
        few = self.deviation < SPREAD * found or self.noise_multiplier * self.clip < self.least * found
        if few or self.room(size, found) < 0:
            raise self._coarse(size, found)
        return found

    def room(self, size: int, step: float) -> float:
        """To what norm, in steps, an update is clipped before it is rounded: with probability 1 − ``REJECTED`` it is
        within the bound afterwards (theorem 1), or surely. Negative if less than half of the bound is left."""
        reach, entries = self.clip / step, self.entries(size)
        t = math.sqrt(2 * math.log(1 / REJECTED))
        below = t**2 - 4 * (entries / 4 + t * math.sqrt(entries) / 2 - reach**2)
        likely = (math.sqrt(below) - t) / 2 if below > 0 else 0.0
        found = max(likely, reach - math.sqrt(entries))
        return found if found >= reach / 2 else -1.0

    def _coarse(self, size: int, step: float) -> NoGuarantee:
        return NoGuarantee(
            f"{self.bits} bits are too few for {size:,} entries and sums of {self.cohort} clients: the grid's step "
            f"would be {step / self.clip:.2g} of the bound. A share's noise must have {SPREAD:g} steps "
            f"({self.deviation / step:.2g} here), all noise together {self.least:g}, and rounding must leave half of "
            "the bound. "
            f"Write more bits"
            f"{'' if self.rotated else ', or rotated=True'}"
        )

    # --- a client's part, and its inverse

    def encode(self, update: Update, context: Context) -> Update:
        """The update as whole steps with a share of the noise, int64."""
        vector = update.vector
        step, reach = self.step(len(vector)), self.clip / self.step(len(vector))
        if self.rotated:
            if not math.isfinite(about(vector)):
                raise SumOverflow("an update that is not finite cannot be clipped")
            vector = turned(vector, draws(context, "rotate", own=False))
        whole = rounded(vector, context, factor=1 / step, room=self.room(len(update.vector), step), reach=reach)
        whole += self.noise(context, whole, self.deviation / step)
        return update._replace(vector=whole, weight=1.0)

    def decode(self, update: Update, context: Context) -> Update:
        """The mean of whole numbers back in the units of an update, and turned back."""
        vector = update.vector * self.step(context.size)
        if self.rotated:
            if context.layout is not None:
                vector = vector.astype(context.layout.dtype)
            vector = turned_back(vector, draws(context, "rotate", own=False), context.size)
        return update._replace(vector=vector)

    def size(self, n: int, layout: Layout | None) -> int:  # noqa: ARG002
        self.step(n)  # refuses
        return self.entries(n)


def rounded(
    vector: Vector, context: Context, *, factor: float, room: float, reach: float
) -> NDArray[np.int64]:  # fmt: skip
    """``factor`` · vector, clipped to a norm of ``room``, rounded at random to whole numbers whose norm is at most
    ``reach``, exactly. Unbiased, but for what is refused and drawn again (once in a million times).

    Raises:
        SumOverflow: an entry is not finite.
    """
    found = squared(vector) * factor * factor
    if not math.isfinite(found):
        raise SumOverflow("an update that is not finite cannot be clipped")
    if found > room**2:
        factor *= room / math.sqrt(found)
    draw, most = draws(context, "rounding", own=True), square_of(reach)
    for _ in range(_TRIES):
        whole = np.empty(len(vector), np.int64)
        for at in range(0, len(vector), _BLOCK):
            steps = vector[at : at + _BLOCK] * np.float64(factor)
            steps += dither(draw, len(steps))
            np.copyto(whole[at : at + _BLOCK], np.floor(steps, out=steps), casting="unsafe")
        if squared(whole.astype(np.float64)) <= most:
            return whole
    raise SumOverflow("an update cannot be rounded within its bound")  # a probability below 2⁻¹²⁰⁰


# --- the two mechanisms -------------------------------------------------------------------------------------


def gaussian_shares(
    *, clip: float, noise_multiplier: float, cohort: int, honest: int, bits: int = 16, rotated: bool = True,
    wrap: float = 1e-6,
) -> Stage:  # fmt: skip
    """Shares of discrete Gaussian noise: the distributed discrete Gaussian mechanism (Kairouz, Liu & Steinke 2021).

    The noise of ``honest`` clients together has standard deviation ``noise_multiplier · clip``; if more come, there is
    more. A sum of discrete Gaussians is not quite one; how far it is from it is accounted for (theorem 1).

    Give it to masks, or to :func:`trusted_sum`. It protects only if nobody sees anything but the sum of at least
    ``honest`` honest clients: of one message alone, only a share of the noise hides anything.

    Args:
        clip: the bound C of an update.
        noise_multiplier: z; ``foedus.calibrate()`` finds it.
        cohort: most clients whose messages are added up in a round.
        honest: fewest contributors that keep their noise to themselves. A round with fewer is not decoded.
        bits: of a number on the wire, and of the sum.
        rotated: spread every update over all entries first; without it a much coarser grid is needed.
        wrap: the probability that any entry of a round's sum wraps around, at most. It hurts the model, not privacy.

    Raises:
        ConfigurationError: a figure is out of its range.
        NoGuarantee: (when a model's size is known) so few bits leave too coarse a grid.

    Example:
        >>> shares = gaussian_shares(clip=1.0, noise_multiplier=1.0, cohort=100, honest=60)
        >>> trusted_sum(shares, planned=100).event
        SharedGaussian(noise_multiplier=1.0, shares=60, spread=2.0, entries=4294967296)
    """
    told = _told(clip, noise_multiplier, cohort, honest)
    event = SharedGaussian(float(noise_multiplier), int(honest), SPREAD)
    return _stage("gaussian_shares", told, _checked_bits(bits, rotated, wrap), (_gaussian, SPREAD, event))


def skellam_shares(
    *, clip: float, noise_multiplier: float, cohort: int, honest: int, bits: int = 16, rotated: bool = True,
    wrap: float = 1e-6, spread: float = 64.0,
) -> Stage:  # fmt: skip
    """Shares of Skellam noise (Agarwal, Kairouz & Liu 2021): differences of Poisson numbers, whose sums are Skellam
    again, so that nothing is lost by sharing. For the rest, see :func:`gaussian_shares`.

    Args:
        clip, noise_multiplier, cohort, honest, bits, rotated, wrap: as there.
        spread: how many steps of the grid the standard deviation of ``honest`` clients' noise has at least: the coarser
            the grid, the more the noise costs (corollary 4.1).

    Example:
        >>> skellam_shares(clip=1.0, noise_multiplier=1.0, cohort=100, honest=60).event
        SharedSkellam(noise_multiplier=1.0, shares=60, spread=64.0)
    """
    told = _told(clip, noise_multiplier, cohort, honest)
    check_number("spread", spread, above=True)
    event = SharedSkellam(float(noise_multiplier), int(honest), float(spread))
    return _stage("skellam_shares", told, _checked_bits(bits, rotated, wrap), (_skellam, float(spread), event))


def _gaussian(context: Context, whole: NDArray[np.int64], sigma: float) -> NDArray[np.int64]:
    return discrete_gaussian(context, "share", whole, sigma=sigma)


def _skellam(context: Context, whole: NDArray[np.int64], sigma: float) -> NDArray[np.int64]:
    return skellam(context, "share", whole, variance=sigma**2)


def _told(clip: Any, noise_multiplier: Any, cohort: Any, honest: Any) -> dict[str, Any]:
    check_number("clip", clip, above=True)
    check_number("noise_multiplier", noise_multiplier, above=True)
    check_whole("cohort", cohort)
    check_whole("honest", honest)
    if honest > cohort:
        raise ConfigurationError(f"of {cohort} clients, {honest} cannot be honest. Write honest={cohort}, or less")
    return {"clip": clip, "noise_multiplier": noise_multiplier, "cohort": cohort, "honest": honest}


def _checked_bits(bits: Any, rotated: Any, wrap: Any) -> dict[str, Any]:
    check_whole("bits", bits, least=2, most=32)
    check_number("wrap", wrap, above=True, below=1)
    return {"bits": bits, "rotated": bool(rotated), "wrap": wrap}


def _stage(name: str, told: dict[str, Any], how: dict[str, Any], law: tuple[Noise, float, Any]) -> Stage:
    noise, least, event = law
    shares = Shares(
        float(told["clip"]), float(told["noise_multiplier"]), int(told["cohort"]), int(told["honest"]),
        int(how["bits"]), how["rotated"], float(how["wrap"]), noise, least,
    )  # fmt: skip
    label = f"{name}({', '.join(f'{key}={value}' for key, value in {**told, **how}.items())})"
    return Stage(
        shares.encode, shares.decode, label, linear=True, takes=Kind.REALS, gives=Kind.WHOLE, bits=shares.bits,
        size=shares.size, scatters=shares.rotated, event=event, room=shares.cohort,
    )  # fmt: skip


# --- a sum without masks ------------------------------------------------------------------------------------


def trusted_sum(shares: Stage, *, planned: float) -> Aggregator:
    """The mean of updates with shares of noise, added up in the open: whoever does that is trusted to look at nothing
    but the sum. Masks (:func:`foedus.masked`) take the place of that trust, and give the same numbers.

    Args:
        shares: :func:`gaussian_shares` or :func:`skellam_shares`.
        planned: what the sum is divided by, however many came: the planned cohort.

    Raises:
        IncompatibleStages: it is given something else.

    Example:
        >>> from foedus.core.aggregate import fold
        >>> from foedus.privacy.noise import known_to_all_who_know_the_seed as known
        >>> rule = trusted_sum(gaussian_shares(clip=5.0, noise_multiplier=0.01, cohort=2, honest=2, bits=20), planned=2)
        >>> contexts = [Context(0, 1, who, size=2, secret=known) for who in range(2)]
        >>> sent = [rule.encode(Update(np.array(v), 1.0), c) for v, c in zip([[3.0, 4.0], [1.0, 0.0]], contexts)]
        >>> total = fold(rule, [rule.admit(m, c) for m, c in zip(sent, contexts)])
        >>> rule.decode({}, total, contexts[0]._replace(client=-1))[0].round(1).tolist()
        [2.0, 2.0]
    """
    if not (isinstance(shares, Stage) and isinstance(shares.event, SharedGaussian | SharedSkellam)):
        raise IncompatibleStages(
            "trusted_sum() adds up shares of noise, e.g. gaussian_shares(...); not "
            f"{getattr(shares, 'label', shares)!r}"
        )
    check_number("planned", planned, above=True)
    return _Open(shares, shares.bits or 0, shares.event.shares, float(planned)).aggregator()


class _Open(NamedTuple):
    """A sum modulo 2^bits without masks."""

    shares: Stage
    bits: int
    honest: int
    planned: float

    def aggregator(self) -> Aggregator:
        return Aggregator(
            init=self.init, encode=self.encode, admit=self.admit, merge=self.merge, decode=self.decode, additive=True,
            label=f"trusted_sum({self.shares.label}, planned={self.planned:g})", event=self.shares.event,
            least=self.honest,
        )  # fmt: skip

    @property
    def wire(self) -> np.dtype[Any]:
        """The smallest whole numbers that hold the bits."""
        return np.dtype("<u1" if self.bits <= 8 else "<u2" if self.bits <= 16 else "<u4")

    def init(self, layout: Layout) -> State:
        self.shares.size(layout.size, layout)  # refuses a grid that is too coarse before anybody has trained
        return {}

    def encode(self, update: Update, context: Context) -> Message:
        whole = self.shares.encode(update, context._replace(size=len(update.vector))).vector
        return {"values": (whole.astype(np.int64, copy=False) & np.int64(2**self.bits - 1)).astype(self.wire)}

    def admit(self, message: Message, context: Context) -> Message:
        entries = self.shares.size(context.size, context.layout)
        values = part(message, "values", context, dtype=self.wire.name, shape=(entries,))
        return {"sum": values.astype(np.uint64), "count": np.ones(1, np.int64)}

    def merge(self, a: Message, b: Message) -> Message:
        if a["sum"].shape != b["sum"].shape:
            raise ConfigurationError(f"messages of {len(b['sum'])} and {len(a['sum'])} numbers do not add up")
        a["sum"] += b["sum"]
        a["sum"] &= np.uint64(2**self.bits - 1)
        a["count"] += b["count"]
        return a

    def decode(self, state: State, message: Message, context: Context) -> tuple[Vector, State]:
        count = int(message["count"][0])
        if count < self.honest:
            raise NothingToAggregate(
                f"{count} clients have contributed, and {self.shares.label} hides them in sums of {self.honest} and "
                "more",
                round=context.round,
            )
        half = np.int64(1 << (self.bits - 1))
        total = message["sum"].astype(np.int64)
        centred = ((total + half) & np.int64(2**self.bits - 1)) - half
        return self.shares.decode(Update(centred / self.planned, 1.0), context).vector, state
