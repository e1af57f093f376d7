"""How often somebody may ask: token buckets, one for each identity and one for each address, in bounded memory.

A bucket holds ``burst`` tokens and gains ``rate`` a second; a request takes one. It is kept as a single number, the
time at which it would be full (the generic cell rate algorithm, ITU-T I.371), so that a hundred thousand cost a few
megabytes. When more come than are remembered, the one that was used longest ago is forgotten; it has most likely
filled up anyway.

Behind a proxy every client has the proxy's address: let the proxy limit addresses there, and leave identities to this.

Not here: how many requests run at once (the server's own bounds).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from foedus.errors import ConfigurationError, TooFast

__all__ = ["Rate"]


class Rate:
    """Buckets by whoever asks.

    Example:
        >>> rate = Rate(per_s=1.0, burst=2)
        >>> rate.take("clinic", now=0.0), rate.take("clinic", now=0.0)
        (None, None)
        >>> rate.take("clinic", now=0.0)
        Traceback (most recent call last):
        foedus.errors.TooFast: 'clinic' asks too often: 2 at once and 1 a second are let through. Come back in 1.0 s
        >>> rate.take("clinic", now=1.0)

    Args:
        per_s: tokens gained a second.
        burst: the most a bucket holds.
        remembered: the most buckets.
    """

    def __init__(self, *, per_s: float, burst: int, remembered: int = 100_000) -> None:
        if per_s <= 0 or burst < 1 or remembered < 1:
            raise ConfigurationError(
                f"a rate needs per_s above 0, burst and remembered of at least 1; not {per_s}, {burst}, {remembered}"
            )
        self._every, self._burst, self._most, self._per_s = 1.0 / per_s, burst, remembered, per_s
        self._full: OrderedDict[Hashable, float] = OrderedDict()  # who → when the bucket is full again, by last use

    def take(self, who: Hashable, *, now: float, tokens: float = 1.0) -> None:
        """Take from somebody's bucket, or raise `TooFast` with when to come back and take nothing."""
        full = max(self._full.get(who, now), now)
        if full > now + self._burst * self._every + 1e-3:  # emptier than empty: the clock was put back
            full = now
        full += tokens * self._every
        wait = full - now - self._burst * self._every
        if wait > 1e-9:
            raise TooFast(
                f"{who!r} asks too often: {self._burst} at once and {self._per_s:g} a second are let through. Come "
                f"back in {wait:.1f} s",
                after_s=wait,
            )
        self._full[who] = full
        self._full.move_to_end(who)
        if len(self._full) > self._most:
            self._full.popitem(last=False)

    @property
    def remembered(self) -> int:
        """How many buckets are kept at this moment."""
        return len(self._full)
