"""Pace steering: when a client is to come back, so that enough are there when a round begins and never all at once.

Every final answer carries a window, and the client draws its own moment in it. Two regimes, after section 2.3 of
Bonawitz et al. (2019):

* *few* clients, about as many as a round takes: they are to be there together, soon after the next round can begin;
* *many*: each is to come so rarely that a round's worth of them arrives in every round, spread evenly whatever they did
  before, so that a server of a million clients sees a steady stream.

Not here: how long a round still takes, which the coordinator knows (``round.worthwhile_s``, and the last rounds).
"""

from __future__ import annotations

from foedus.protocol.messages import Window

MARGIN = 1.3  # so many times a round's worth arrive, since some will be turned away or lost
FEW = 4  # up to so many clients for each that a round takes, all come together
SPREAD = 0.1  # of a round: how far those that come together are apart
LONGEST = 86400.0  # seconds; whoever is told to come later than that is forgotten


def come_back(*, population: int, wanted: int, period_s: float, left_s: float = 0.0, floor_s: float = 1.0) -> Window:
    """When one client is to come back.

    Args:
        population: how many clients there are that might come.
        wanted: how many a round takes.
        period_s: how long a round takes, from beginning to beginning.
        left_s: seconds until the next round can begin, if that is known.
        floor_s: never sooner than this, and never all in a narrower window.

    Example:
        >>> come_back(population=10, wanted=10, period_s=60.0, left_s=20.0)
        Window(after_s=20.0, until_s=26.0)
        >>> window = come_back(population=1_000_000, wanted=100, period_s=60.0)
        >>> round(window.after_s), round(window.until_s)  # each about once in five days, cut to a day
        (43200, 86400)
    """
    wanted, period_s = max(1, wanted), max(period_s, floor_s)
    begin = min(max(left_s, floor_s), LONGEST / 2)
    if population <= FEW * wanted:
        return Window(after_s=begin, until_s=begin + max(floor_s, SPREAD * period_s))
    between = period_s * population / (MARGIN * wanted)
    after = max(begin, min(0.5 * between, LONGEST / 2))
    return Window(after_s=after, until_s=max(after + floor_s, min(1.5 * between, LONGEST)))
