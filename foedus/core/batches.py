"""Which examples every local step of a cohort trains on, laid out flat.

Randomness is counted: the order of a client's examples in an epoch is a function of (seed, round, client,
epoch) and of nothing else, found by sorting hashed keys; it is the same in every executor, whichever other
clients are in the cohort. A whole cohort's plan is made in a few vectorised lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.client import Client
from foedus.core.random import Words, bits, fold, key, order

if TYPE_CHECKING:
    from jaxtyping import Int, Int32, Int64, UInt64


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
    """
    count = len(sizes)
    batch = int(min(spec.batch_size or sizes.max(initial=1), sizes.max(initial=1)))
    per_epoch = -(-sizes // batch)
    steps = np.full(count, spec.steps) if spec.steps else per_epoch * (spec.epochs or 1)
    steps = steps if limit is None else np.minimum(steps, limit)
    epochs = -(-steps // per_epoch)
    base = key(seed, round, "batches") if not phase else key(seed, round, "batches", phase)
    own = fold(np.full(count, base, np.uint64), clients.astype(np.uint64))
    rows, filled = _epochs(own, sizes, epochs, batch)
    starts = np.concatenate([[0], np.cumsum(epochs * per_epoch)])[:-1]
    at = _ranges(starts, steps)  # drops the steps beyond `steps`
    slot = np.repeat(np.arange(count, dtype=np.int32), steps)
    number = _ranges(np.zeros(count, np.int64), steps)
    hashed = bits(fold(own[slot], 1 << 62), number)
    keys = np.stack([hashed >> np.uint64(32), hashed & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)
    return Plan(
        rows[at], filled[at], slot, number == 0, number == steps[slot] - 1, keys, steps.astype(np.int32)
    )


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
