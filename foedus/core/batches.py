"""Which examples every local step of a cohort trains on, laid out flat.

Randomness is counted: the order of a client's examples in an epoch is a function of (seed, round, client,
epoch) and of nothing else, found by sorting hashed keys; it is the same in every executor, whichever other
clients are in the cohort. A whole cohort's plan is made in a few vectorised lines.

A plan is a table whose rows are as wide as the widest batch in it. Where clients take all of their data as one
batch and differ a lot in size, one table for all would be mostly padding: :func:`alike` cuts such a cohort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.client import Client
from foedus.core.random import Words, bits, fold, key, order
from foedus.errors import ConfigurationError

if TYPE_CHECKING:
    from jaxtyping import Int, Int32, Int64, UInt64


ROOM = 1 << 20  # row numbers in a plan (4 MB) up to which padding is no matter
MOST = 1 << 31  # row numbers in a plan (8 GB) beyond which it is refused


class Plan(NamedTuple):
    """The local steps of a cohort, client after client.

    Attributes:
        rows: int32 [T, B], row numbers within the client's own examples, padded by the batch's first row.
        count: int32 [T], how many rows of the batch are real.
        client: int32 [T], which slot of the cohort the step belongs to.
        first, last: bool [T], whether the step is its client's first or last.
        keys: uint32 [T, 2], the key of the step's other randomness (dropout).
        steps: int32 [C], number of steps of each client.
    """

    rows: NDArray[np.int32]
    count: NDArray[np.int32]  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a plan
    client: NDArray[np.int32]
    first: NDArray[np.bool_]
    last: NDArray[np.bool_]
    keys: NDArray[np.uint32]
    steps: NDArray[np.int32]

    def of(self, slots: NDArray[np.integer]) -> Plan:
        """The plan of some slots only, renumbered 0, 1, … in the order given."""
        starts = np.concatenate([[0], np.cumsum(self.steps)])
        at = _ranges(starts[:-1][slots], self.steps[slots])
        client = np.repeat(np.arange(len(slots), dtype=np.int32), self.steps[slots])
        return Plan(
            self.rows[at], self.count[at], client, self.first[at], self.last[at], self.keys[at], self.steps[slots]
        )


def plan(
    spec: Client,
    sizes: Int64[NDArray[np.int64], " client"],
    clients: Int64[NDArray[np.int64], " client"],
    *,
    seed: int,
    round: int,
    limit: int | NDArray[np.integer] | None = None,
    phase: int = 0,
) -> Plan:
    """The plan of one round.

    Args:
        spec: local training; its epochs or steps and batch size are used.
        sizes: int64 [C], number of training examples of each client of the cohort, each at least 1.
        clients: int64 [C], their positions in the population.
        seed: the run's seed.
        round: counted from 1.
        limit: at most so many steps for each client; one number, or one for each [C].
        phase: which training of the client's visit it is; each has batches of its own.

    Raises:
        ConfigurationError: the plan would take more than 8 GB; says how many steps of how many examples.
    """
    count = len(sizes)
    batch = int(min(spec.batch_size or sizes.max(initial=1), sizes.max(initial=1)))
    per_epoch, steps, epochs = _amounts(spec, sizes, limit)
    if (planned := int((epochs * per_epoch).sum())) * batch > MOST:
        raise ConfigurationError(
            f"the batches of a round cannot be planned: {planned:,} batches of up to {batch:,} examples, for {count:,} "
            f"client{'s' * (count > 1)} together, take {4 * planned * batch / 2**30:.0f} GB. Give a smaller "
            "batch_size, or fewer steps or epochs"
        )
    base = key(seed, round, "batches") if not phase else key(seed, round, "batches", phase)
    own = fold(np.full(count, base, np.uint64), clients.astype(np.uint64))
    rows, filled = _epochs(own, sizes, epochs, batch)
    starts = np.concatenate([[0], np.cumsum(epochs * per_epoch)])[:-1]
    at = _ranges(starts, steps)  # drops the steps beyond `steps`
    slot = np.repeat(np.arange(count, dtype=np.int32), steps)
    number = _ranges(np.zeros(count, np.int64), steps)
    hashed = bits(fold(own[slot], 1 << 62), number)
    keys = np.stack([hashed >> np.uint64(32), hashed & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)
    return Plan(rows[at], filled[at], slot, number == 0, number == steps[slot] - 1, keys, steps.astype(np.int32))


def processed(spec: Client, sizes: Int64[NDArray[np.int64], " client"]) -> Int64[NDArray[np.int64], " client"]:
    """How many examples each client goes through in a round, int64 [C], counted without a plan; 0 without data.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> processed(local_sgd(0.1, steps=3, batch_size=4), np.array([6, 100, 0])).tolist()
        [10, 12, 0]
    """
    full = np.maximum(sizes, 1)
    batch = np.minimum(spec.batch_size or full, full)
    per_epoch, steps, _ = _amounts(spec, full, None)
    epochs, rest = np.divmod(steps, per_epoch)
    return np.where(sizes > 0, epochs * full + rest * batch, 0).astype(np.int64)  # the rest is of whole batches


def uniform_widths(spec: Client, sizes: Int64[NDArray[np.int64], " client"]) -> Int64[NDArray[np.int64], " client"]:
    """How wide each client's batches are, int64 [C]; 0 where they are not all of one width, or there are none.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> uniform_widths(local_sgd(0.1, batch_size=4), np.array([3, 4, 8, 9, 0])).tolist()
        [3, 4, 4, 0, 0]
    """
    full = np.maximum(sizes, 1)
    batch = np.minimum(spec.batch_size or full, full)
    one_width = (full % batch == 0) | (np.full(len(full), spec.steps or MOST) <= full // batch)
    return np.where((sizes > 0) & one_width, batch, 0).astype(np.int64)


def taken(spec: Client, sizes: Int64[NDArray[np.int64], " client"]) -> Int64[NDArray[np.int64], " client"]:
    """How many local steps each client makes in a round, int64 [C]; 0 without data.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> taken(local_sgd(0.1, epochs=2, batch_size=4), np.array([6, 100, 0])).tolist()
        [4, 50, 0]
    """
    return np.where(sizes > 0, _amounts(spec, np.maximum(sizes, 1), None)[1], 0).astype(np.int64)


def alike(
    spec: Client, sizes: Int64[NDArray[np.int64], " client"], *, limit: int | NDArray[np.integer] | None = None
) -> list[NDArray[np.int64]]:
    """A cohort cut into parts, so that the plan of each is not mostly padding.

    A part's plan has at most ``ROOM`` row numbers, or at most twice as many as there are examples to go through.
    Hence there are about log₂(largest / smallest client) parts at most, and nearly always there is one.

    Args:
        spec, limit: as for :func:`plan`.
        sizes: int64 [C], each at least 1.

    Returns:
        Slots of the cohort, ascending, one array per part.

    Example:
        >>> from foedus.core.client import local_sgd
        >>> whole = local_sgd(0.1, batch_size=None)
        >>> [part.tolist() for part in alike(whole, np.array([10, 2**23, 9, 8]))]
        [[0, 1], [2, 3]]
    """
    widths = np.minimum(spec.batch_size or sizes, sizes)
    per_epoch, _, epochs = _amounts(spec, sizes, limit)
    rows = per_epoch * epochs
    table, real = int(rows.sum()) * int(widths.max(initial=0)), int((rows * widths).sum())
    if table <= max(ROOM, 2 * real):
        return [np.arange(len(sizes))]
    order, parts, begin = np.argsort(-widths, kind="stable"), [], 0
    while begin < len(order):
        left = order[begin:]
        needed = np.cumsum(rows[left] * widths[left])
        fits = np.cumsum(rows[left]) * widths[left[0]] <= np.maximum(ROOM, 2 * needed)
        end = len(left) if fits.all() else int(np.argmin(fits))
        parts.append(np.sort(left[:end]))
        begin += end
    return parts


def _amounts(
    spec: Client, sizes: Int64[NDArray[np.int64], " client"], limit: int | NDArray[np.integer] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Batches in an epoch, steps, and epochs begun by them, each int64 [C]."""
    per_epoch = -(-sizes // np.minimum(spec.batch_size or sizes, sizes))
    steps = np.full(len(sizes), spec.steps) if spec.steps else per_epoch * (spec.epochs or 1)
    steps = steps if limit is None else np.minimum(steps, limit)
    return per_epoch, steps, -(-steps // per_epoch)


def _epochs(
    own: UInt64[Words, " client"],
    sizes: Int64[NDArray[np.int64], " client"],
    epochs: Int64[NDArray[np.int64], " client"],
    batch: int,
) -> tuple[Int32[NDArray[np.int32], "step batch"], Int32[NDArray[np.int32], " step"]]:
    """All epochs of all clients: rows [steps, B] and filled [steps]."""
    segments = np.repeat(np.arange(len(sizes)), epochs)  # one segment per client and epoch
    epoch = _ranges(np.zeros(len(sizes), np.int64), epochs)
    lengths = sizes[segments]
    owner = np.repeat(np.arange(len(segments)), lengths)
    row = order(fold(own[segments], epoch.astype(np.uint64)), lengths).astype(np.int32)
    per_segment = -(-lengths // batch)
    begin = np.concatenate([[0], np.cumsum(per_segment)])
    place = _ranges(np.zeros(len(segments), np.int64), lengths)
    step, column = begin[owner] + place // batch, place % batch
    rows = np.zeros((int(begin[-1]), batch), np.int32)
    rows[step, column] = row
    filled = np.full(int(begin[-1]), batch, np.int32)
    filled[begin[1:] - 1] = lengths - (per_segment - 1) * batch
    padding = np.arange(batch) >= filled[:, None]
    rows[padding] = np.broadcast_to(rows[:, :1], rows.shape)[padding]
    return rows, filled


def _ranges(
    starts: Int[NDArray[np.integer], " segment"], lengths: Int[NDArray[np.integer], " segment"]
) -> Int64[NDArray[np.int64], " total"]:
    """start, start + 1, … for each (start, length), one after the other."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    offset: NDArray[np.int64] = np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)
    return np.arange(len(offset)) + offset
