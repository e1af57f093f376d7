"""Whatever order workers answer and die in, every share of a round is delivered, and once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from foedus.sim.crew import Rota

SHARES = [np.array([i]) for i in range(7)]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "collect", "die"]))))
def test_every_share_is_delivered_exactly_once(events: list[tuple[int, str]]) -> None:
    rota = Rota(SHARES)
    held: dict[int, list[int]] = {0: [], 1: [], 2: []}  # what each worker would deliver
    delivered: list[int] = []

    def step(worker: int, event: str) -> None:
        if event == "take" and (slots := rota.take(worker)) is not None:
            held[worker].append(int(slots[0]))
        elif event == "collect":
            rota.collected(worker)
            delivered.extend(held[worker])
            held[worker] = []
        elif event == "die":
            rota.lost(worker)
            held[worker] = []

    for worker, event in events:
        step(worker, event)
    assert rota.open == set(range(7)) - set(delivered)
    while rota.open:  # from here on nobody dies
        for worker in held:
            step(worker, "take")
        if not rota.waiting:
            for worker in held:
                step(worker, "collect")
    assert sorted(delivered) == list(range(7))


def slots_of(lost: tuple[NDArray[np.int64] | None, int]) -> tuple[list[int] | None, int]:
    return None if lost[0] is None else lost[0].tolist(), lost[1]


def test_a_death_is_laid_to_the_share_that_was_being_trained() -> None:
    rota = Rota(SHARES)
    for _ in range(3):
        rota.take("a")
    assert slots_of(rota.lost("a")) == ([2], 1)
    assert [int(s[0]) for s in iter(lambda: rota.take("b"), None)] == list(range(7))  # largest first again
    assert slots_of(rota.lost("b")) == ([6], 1)
    for _ in range(3):
        rota.take("c")
    assert slots_of(rota.lost("c")) == ([2], 2)
    assert slots_of(rota.lost("d")) == (None, 1)
