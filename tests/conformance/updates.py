"""Cohorts of updates, and the messages made of them: what the suites of aggregators and of stages share."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np

from foedus.core.aggregate import Aggregator
from foedus.core.values import Context, Message, Update
from foedus.privacy.noise import known_to_all_who_know_the_seed

CONTEXT = Context(seed=3, round=1, client=0, told={"clip": np.array([0.1])}, secret=known_to_all_who_know_the_seed)


@st.composite
def cohorts(draw: st.DrawFn, least: int = 1) -> list[Update]:
    """Updates of one size, of wildly different magnitudes and weights, in float32 or float64."""
    size, count = draw(st.integers(0, 6)), draw(st.integers(least, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vectors = rng.uniform(-1, 1, (count, size)) * 2.0 ** rng.integers(-70, 21, (count, size))
    vectors *= rng.choice([0.0, -0.0, 1.0], (count, size), p=[0.05, 0.05, 0.9])
    weights = np.where(rng.random(count) < 0.5, rng.integers(1, 10_000, count), 2.0 ** rng.uniform(-20, 20, count))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return [Update(v, float(w)) for v, w in zip(vectors.astype(dtype), weights, strict=True)]


def encoded(member: Aggregator, cohort: list[Update]) -> list[Message]:
    """Admitted messages."""
    contexts = [CONTEXT._replace(client=i, size=len(u.vector)) for i, u in enumerate(cohort)]
    return [member.admit(member.encode(u, c), c) for u, c in zip(cohort, contexts, strict=True)]


def copies(messages: list[Message]) -> list[Message]:
    """``merge`` may reuse the memory of its first argument."""
    return [{name: array.copy() for name, array in m.items()} for m in messages]


def merged_in_some_order(member: Aggregator, messages: list[Message], rng: np.random.Generator) -> Message:
    """Merged along a random tree: any two, again and again."""
    left = copies([messages[i] for i in rng.permutation(len(messages))])
    while len(left) > 1:
        b, a = (left.pop(int(rng.integers(len(left)))) for _ in range(2))
        left.append(member.merge(a, b))
    return left[0]


def same_bits(a: Message, b: Message) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in ((a[n], b[n]) for n in a)
    )
