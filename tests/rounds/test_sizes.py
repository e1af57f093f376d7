"""What one client may upload: enough for whatever its algorithm writes, and no more than some times its model."""

from __future__ import annotations

import numpy as np
import pytest

import foedus as fd
from foedus.backends import Weights
from foedus.core.aggregate import Aggregator
from foedus.core.linear import logistic
from foedus.core.method import Contribution
from foedus.privacy.noise import known_to_all_who_know_the_seed
from foedus.rounds.freight import update_blob
from foedus.rounds.parcel import Terms, packed
from foedus.rounds.sizes import BESIDE, upload_bytes
from foedus.rounds.work import Job, Orders
from foedus.tree import Layout

from ..conformance.test_aggregators import MEMBERS

SIZE = 200_000
LAYOUTS = (Layout(("w",), ((SIZE,),), ("float32",)), Layout((), (), ()))
CLIENTS = fd.Clients.of({0: (np.ones((2, 5), np.float32), [0, 1])})
OPEN = [member for member in MEMBERS if not member.hidden]


def terms_of(member: Aggregator, dtype: str = "f4") -> Terms:
    job = Job(fd.Task(logistic(5, 2)), fd.fedavg(fd.local_sgd(0.1), aggregator=member), CLIENTS, seed=11)
    told = {} if member.tell is None else {"update": member.tell(member.init(LAYOUTS[0]))}
    start = Weights(np.zeros(SIZE, dtype), np.empty(0, dtype))
    return Terms.of(job, Orders(3, start, np.array([0]), told=told), LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("member", OPEN, ids=lambda member: member.label)
def test_whatever_a_rule_writes_is_let_in(member: Aggregator) -> None:
    rng = np.random.default_rng(1)
    for vector in (rng.normal(size=SIZE), np.where(rng.random(SIZE) < 0.5, 0.1, -0.1) * rng.random(SIZE) ** 9):
        terms = terms_of(member, "f8")
        parcel = packed(
            terms, 0, Contribution(vector * 1e-3, steps=1), 7, secret=known_to_all_who_know_the_seed
        )  # fmt: skip
        assert len(update_blob(parcel)) <= upload_bytes(terms)


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.sealed is None], ids=lambda member: member.label)
def test_what_is_let_in_fits_the_model(member: Aggregator) -> None:
    most = 2 * 16 * 2 * SIZE + BESIDE + (0 if member.masking is None else 1 << 21)
    assert BESIDE < upload_bytes(terms_of(member)) <= most
    if member.label == "mean()":
        assert upload_bytes(terms_of(member)) == 2 * (4 * SIZE + 8) + BESIDE
