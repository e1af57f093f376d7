"""How many bytes one client's upload may take, by what its model and algorithm need.

The memory of a server for uploads is everybody's: without a bound that fits the model, one client takes all of it with
one announcement. A message is as large as the rule's own encoding makes it, found by encoding two updates as the gate
does; twice that is let in, and a megabyte for names, figures and, behind masks, what clients say beside their numbers.

Not here: the memory itself (``net/uploads.py``), whether what came is what the rule writes (``parcel.py``).
"""

from __future__ import annotations

import math

import numpy as np

from foedus.core.aggregate import Aggregator
from foedus.core.gate import forms_of
from foedus.core.values import Context
from foedus.rounds.parcel import Terms
from foedus.rounds.work import BUFFERS, UPDATE

BESIDE = 1 << 20  # bytes of an upload beside its arrays
BETWEEN = 1 << 10  # bytes that a client says for each other one, where masks are agreed on
ENTRY = 16  # bytes that an entry may take where lengths vary: a number, and where it stands


def upload_bytes(terms: Terms) -> int:
    """The most bytes that a client of a round has to upload at once; what a method sends in channels of its own is
    taken to be as long as the model.

    Args:
        terms: of a round.
    """
    algorithm, found = terms.job.algorithm, 0
    for channel, rule in algorithm.channels(buffers=terms.job.task.average_buffers):
        size = terms.layout(channel, 0).size if channel in (UPDATE, BUFFERS) else sum(x.size for x in terms.layouts)
        found += _message_bytes(rule, terms.context(0, channel, size))
    return 2 * found + BESIDE


def _message_bytes(rule: Aggregator, context: Context) -> int:
    """Bytes of one message, about."""
    if rule.sealed is not None:
        return rule.sealed.bytes(context.size)
    if rule.masking is not None:
        clients: int = rule.masking.withstand.clients
        return 8 * rule.masking.entries(context.size) + BETWEEN * clients
    if not context.size:
        return 0
    forms = forms_of(rule, context).values()
    exact = [np.dtype(form.dtype).itemsize * math.prod(n for n in form.shape if n is not None) for form in forms]
    varying = any(n is None for form in forms for n in form.shape)
    return max(sum(exact), ENTRY * context.size if varying else 0)


__all__ = ["BESIDE", "upload_bytes"]
