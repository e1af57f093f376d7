"""A client's own budget for single examples ends its part in a served run: for good, whatever dies in between."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from foedus.net.owner.spending import Row
from foedus.net.served import Rounds
from foedus.net.training import Training
from foedus.privacy import rdp
from foedus.privacy.events import Gaussian, Sampled

from .agents import DATA, URL, Client, Server, client, closing, killed_at, owner

pytestmark = [pytest.mark.slow, pytest.mark.anyio]  # each starts processes

PRIVATE = """fd.fedavg(fd.dp_sgd(0.1, clip=1.0, noise_multiplier=1.0, batch_size=3, steps=2, delta=1e-3{more}))
    import functools, torch
    task = fd.Task(functools.partial(torch.nn.Linear, 3, 2), torch.nn.functional.cross_entropy)
"""
BUDGETED = PRIVATE.format(more=", budget={budget}")
EXAMPLES = len(DATA[0][1])
STEP = Sampled(3 / EXAMPLES, Gaussian(1.0))
ALONE: dict[str, Any] = {"rounds": 6, "each": Rounds(minimum=1, window=1e6, deadline=1e6)}
FREE = "[protections]\nleast_others = 0\n"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def budget(visits: int) -> float:
    """An ε that is enough for so many visits of two steps, and not for one more."""
    return (rdp([(STEP, 2 * visits)], 1e-3) + rdp([(STEP, 2 * visits + 2)], 1e-3)) / 2


async def to_its_end(each: Client, server: Server, most: int = 60) -> None:
    """Sessions until the server knows that there is nothing to train on."""
    for _ in range(most):
        with server.store.begin() as rows:
            if rows.clients()[0].examples == 0:
                return
        await each.agent.work(once=True)
        await each.agent.clock.rest(5.0)
    raise AssertionError(each.said)


def digests(server: Server) -> list[str]:
    """Of the different updates that left."""
    found = [e.departure.digest for e in owner(server, 0).ledger().entries() if e.departure.what.startswith("update")]
    return sorted(set(found))


def paid(server: Server) -> int:
    """Steps that the data set's examples have paid for."""
    rows = owner(server, 0).spending().rows("data", f"{URL} run").here
    return sum(row.steps for row in rows)


async def test_a_client_says_when_it_trains_no_more_and_a_restart_changes_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, BUDGETED.format(budget=budget(2)), how=ALONE, only=1)
    first = client(server, 0, rules=FREE)
    async with closing(first):
        await to_its_end(first, server)
    assert (len(digests(server)), paid(server)) == (2, 4)
    assert any("this client trains no more in run run: of ε" in line for line in first.said)
    assert not any("training failed" in line for line in first.said)
    again = client(server, 0)
    async with closing(again):
        for _ in range(3):
            await again.agent.work(once=True)
            await again.agent.clock.rest(5.0)
    assert not any(line.startswith("training") for line in again.said), "nothing is even begun"
    assert (len(digests(server)), paid(server)) == (2, 4)


async def test_whatever_left_was_paid_for_once_whenever_the_agent_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at every action in turn."""
    monkeypatch.setattr("foedus.net.agent.COOL_S", 1e9)  # one training process for all of them
    training: Training | None = None
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        server = Server(folder, BUDGETED.format(budget=budget(1)), how=ALONE, only=1)
        first = client(server, 0, rules=FREE, training=training)
        training = first.agent.training
        if killed := await killed_at(first.agent, at, to_its_end(first, server)):
            second = client(server, 0, training=training)
            await to_its_end(second, server)
            second.agent.journal.close()
        assert (len(digests(server)), paid(server)) == (1, 2)
        if not killed:
            break
    assert training is not None
    await training.close()
    assert at > 5


@pytest.mark.parametrize("where", ["another run", "another server"])
async def test_the_owners_own_bound_holds_over_all_runs(tmp_path: Path, where: str) -> None:
    server = Server(tmp_path, PRIVATE.format(more=""), how=ALONE, only=1)
    rules = f"{FREE}most_example_epsilon = {budget(3)}\nexample_delta = 1e-3\n"
    each = client(server, 0, rules=rules)
    elsewhere = f"{URL} other" if where == "another run" else "https://other run"
    owner(server, 0).spending().add("data", elsewhere, Row(1.0, 3 / EXAMPLES, 4))
    owner(server, 0).spending().add("another data set", f"{URL} run", Row(0.1, 1.0, 400))
    async with closing(each):
        await to_its_end(each, server)
    assert (len(digests(server)), paid(server)) == (1, 2)
    owner(server, 0).rules_file.write_text(rules.replace(str(budget(3)), str(budget(4))))
    again = client(server, 0)
    async with closing(again):
        await again.agent.work(once=True)  # says how many examples there are
        await again.agent.clock.rest(5.0)
        await to_its_end(again, server)
    assert (len(digests(server)), paid(server)) == (2, 4), "another rule, another visit"


async def test_a_bound_of_the_owners_asks_for_dp_sgd(tmp_path: Path) -> None:
    server = Server(tmp_path, how=ALONE, only=1)
    each = client(server, 0, rules=f"{FREE}most_example_epsilon = 8.0\n")
    async with closing(each):
        await to_its_end(each, server)
    assert any("does not train by dp_sgd() alone" in line for line in each.said)
    assert digests(server) == []
