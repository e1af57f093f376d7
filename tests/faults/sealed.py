"""Encrypted sums for the simulation: whole numbers that only those who have the key can make, and read.

What CKKS would do to them is left out: they lie in the open, under a name that the server's code knows nothing of.
Everything around is as it is: who is in the sum, in which round, is marked in it, and whoever opens it looks.

Not here: CKKS (``foedus/secure/homomorphic.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from foedus.core.aggregate import Aggregator, Sealed
from foedus.core.coding import part, refused
from foedus.core.values import Context, Message, State, Update
from foedus.errors import NoGuarantee, Reason, SecureAggregationFailed

STEP = 2.0**-20


def rule(silos: int, least: int, *, key: bool) -> Aggregator:
    """The mean of updates that the server cannot read; with the key, at a client."""

    def encode(update: Update, context: Context) -> Message:
        if not key:
            raise NoGuarantee("a server encrypts nothing")
        weight = int(update.weight)
        marks = np.zeros((2, silos), np.int64)
        marks[:, context.client] = 1, context.round
        entries = np.rint(update.vector / STEP).astype(np.int64) * weight
        return {"closed": np.concatenate([entries, [weight], marks.reshape(-1)])}

    def admit(message: Message, context: Context) -> Message:
        found = part(message, "closed", context, dtype="int64", shape=(context.size + 1 + 2 * silos,))
        return {"closed": found.copy(), "count": np.ones(1, np.int64)}

    def merge(a: Message, b: Message) -> Message:
        return {name: a[name] + b[name] for name in ("closed", "count")}

    def open_(message: Message, context: Context) -> Message:
        """As a silo looks at it, which has the key."""
        size = context.size
        there, rounds = message["closed"][size + 1 :].reshape(2, silos)
        if not np.isin(there, (0, 1)).all() or (rounds != there * context.round).any():
            raise SecureAggregationFailed("somebody is in the sum twice, or with another round's update")
        if there.sum() != message["count"][0] or there.sum() < least or not there[context.client]:
            raise SecureAggregationFailed(f"{there.sum()} are in the sum, or this client is not")
        return {"sum": message["closed"][:size], "weight": message["closed"][size : size + 1]}

    def opened(message: Message, count: int, context: Context) -> Message:
        weight = part(message, "weight", context, dtype="int64", shape=(1,))
        if int(weight[0]) < count:
            raise refused(f"says that {count} updates weigh {int(weight[0])}", context, Reason.WEIGHT)
        whole = part(message, "sum", context, dtype="int64", shape=(context.size,))
        return {"sum": whole.copy(), "weight": weight.copy(), "count": np.array([count], np.int64)}

    def decode(state: State, message: Message, context: Context) -> tuple[Any, State]:
        if "sum" not in message:
            raise NoGuarantee("a server decrypts nothing")
        return message["sum"] * (STEP / int(message["weight"][0])), state

    sealed = Sealed(
        silos, least, lambda size: 8 * (size + 1 + 2 * silos), STEP, 100.0,
        lambda secret: rule(silos, least, key=True), open_, opened,
    )  # fmt: skip
    return Aggregator(
        init=lambda layout: {}, encode=encode, admit=admit, merge=merge, decode=decode, additive=True,
        label=f"closed({silos}, least={least})", sealed=sealed,
    )  # fmt: skip


def numbers_of(message: Message, size: int) -> tuple[Any, float]:
    """The update in a client's message, as it was rounded, and its weight."""
    weight = int(message["closed"][size])
    return message["closed"][:size] * (STEP / weight), float(weight)


__all__ = ["numbers_of", "rule"]
