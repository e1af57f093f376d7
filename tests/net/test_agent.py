"""The agent against a real coordinator: the simulated bits, the owner's word before everything, nothing lost."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from foedus.cli import foedus as command_line
from foedus.errors import NotTrusted, OwnerRefuses, TrainingError, Unreachable, WorkerDied
from foedus.net.agent import Data
from foedus.net.bundle import Bundle
from foedus.net.identity.keys import SigningKey
from foedus.net.served import Rounds
from foedus.net.source import own, to_bytes
from foedus.protocol.blob import unpack
from foedus.protocol.messages import Ask, CheckIn, Finished, Standing, Standings, Stands, Window

from .agents import DATA, FEDAVG, URL, Server, client, closing, heard, killed_at, owner, simulated

pytestmark = [pytest.mark.slow, pytest.mark.anyio]  # each starts processes


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


METHODS = {
    "fedavg": FEDAVG,
    "scaffold": "fd.scaffold(fd.local_sgd(0.1, batch_size=4))",
    "ditto": "fd.fedavg(fd.local_sgd(0.1, batch_size=4), personal=fd.ditto(0.1))",
}


@pytest.mark.parametrize("name", METHODS)
async def test_a_served_run_ends_with_the_bits_of_the_simulated_one(tmp_path: Path, name: str) -> None:
    server = Server(tmp_path, METHODS[name])
    clients = [client(server, position) for position in DATA]
    await asyncio.gather(*(each.agent.run() for each in clients))
    wanted = simulated(server, tmp_path / "run")
    state = server.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, wanted.weights.vector)
    for position, each in enumerate(clients):
        assert "-v[]+^" in each.agent.sessions
        assert each.agent.training.starts <= 2  # warm: one for the rounds, perhaps one for the final model
        folder = owner(server, position).server(URL)
        (model,) = (folder / "models").glob("*/model.safetensors")
        assert unpack(model.read_bytes()).arrays["weight"].shape == (3, 2)
        assert bool(list((folder / "models").glob("*/personal.safetensors"))) is (name == "ditto")
        entries = list(owner(server, position).ledger().entries())
        assert [e.departure.round for e in entries if e.departure.what == "update"] == [1, 2]
        # An attempt may fail, since time flies here: then the same bytes are sent under another key.
        assert len({e.departure.digest for e in entries}) == 2
        assert "summed with at least 2 others" in entries[0].departure.protections[0]


async def test_without_consent_or_approval_nothing_leaves(tmp_path: Path) -> None:
    server = Server(tmp_path)
    silent = client(server, 0, consent=False)
    with pytest.raises(OwnerRefuses, match="no consent"):
        await silent.agent.run(once=True)
    assert not silent.agent.training.starts  # the data was not even looked at
    unapproved = client(server, 1, approve=())
    await unapproved.agent.run(once=True)
    assert any("foedus tasks review" in line for line in unapproved.said)
    assert unapproved.agent.sessions == ["-!"] or unapproved.agent.sessions[-1].startswith("-!")
    assert server.coordinator.runs()[0]["declined"] == {"approval": 1}, "the server can tell why"
    for position in (0, 1):
        assert owner(server, position).ledger().count == 0


async def test_a_task_that_runs_by_its_digest_is_told_so_in_the_list_of_tasks(tmp_path: Path) -> None:
    server = Server(tmp_path)
    mine = client(server, 0)
    await mine.agent.run(once=True)
    (task,) = mine.agent.approvals.tasks()
    assert (task.decision, task.who) == ("waiting", "")
    assert task.listed
    assert not mine.agent.approvals.approved(server.bundle.digest), "it is no decision that holds without the digest"
    told = CliRunner().invoke(command_line, ["tasks", "list", "--folder", str(owner(server, 0).path)]).output
    assert "waiting, and ran by its digest (--approve, or rules.toml) since" in told


async def test_who_waits_says_for_what_and_now_and_then_again(tmp_path: Path) -> None:
    server = Server(tmp_path, how={"each": Rounds(minimum=3, clients=9)})
    mine = client(server, 0)
    for seconds in (0.0, 6.0, 6.0, 6.0, 601.0):
        server.time.now_ += seconds
        mine.agent._waits("a round begins once 9 clients can take part, and 3 can")
    await mine.agent.run(once=True)
    assert mine.said == ["waiting: a round begins once 9 clients can take part, and 3 can"] * 2
    again = client(server, 0)
    await again.agent.run(once=True)
    assert again.said == ["waiting: a round begins once 9 clients can take part, and 3 can"]


async def test_a_task_that_is_not_approved_is_never_imported(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    server = Server(tmp_path)
    bad = Bundle.of({"task.py": f"open({str(mark)!r}, 'w').close()\n".encode()})
    server.learning.bundle = server.coordinator.offer(bad.content)
    curious = client(server, 0)
    await curious.agent.run(once=True)
    assert any("is not approved" in line for line in curious.said)
    (filed,) = curious.agent.approvals.tasks()
    assert filed.digest == bad.digest.hex()
    assert not mark.exists()


# --- killed at every step -------------------------------------------------------------------------------------


async def test_an_agent_killed_at_any_step_goes_on_and_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client, two rounds, a kill at the k-th action for every k; the model is that of no kill at all."""
    monkeypatch.setattr("foedus.net.agent.COOL_S", 1e9)  # one training process for all of them
    models, sent, training = [], [], None
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        server = Server(folder, METHODS["scaffold"], how={"each": Rounds(minimum=1, window=1e6, deadline=1e6)}, only=1)
        first = client(server, 0, rules="[protections]\nleast_others = 0", training=training)
        training = first.agent.training
        if killed := await killed_at(first.agent, at, first.agent.work()):
            second = client(server, 0, training=training)
            await second.agent.work()
        state = server.learning.state
        assert state is not None
        models.append(state.weights.vector.tobytes())
        lines = [json.loads(line) for line in server.coordinator.lines("run", "metrics.jsonl", 0).splitlines()]
        assert [line["trained"] for line in lines] == [1, 1], "counted once in every round"
        entries = [e.departure for e in owner(server, 0).ledger().entries()]
        for round in (1, 2):
            assert len({e.digest for e in entries if e.round == round}) == 1, "the same bytes, whenever they are sent"
        sent.append(len(entries))
        if not killed:
            break
    await training.close()
    assert at > 15
    assert len(set(models)) == 1
    assert max(sent) <= 3  # one of the two may have left twice


# --- the owner's word, step by step ---------------------------------------------------------------------------

ALONE: dict[str, Any] = {"each": Rounds(minimum=1, window=1e6, deadline=1e6)}
FREE = "[protections]\nleast_others = 0\n"


async def until(each: Any, holds: Any, *, most: int = 60) -> None:
    """One client's sessions, one after another, until something holds."""
    for _ in range(most):
        if holds():
            return
        await each.agent.work(once=True)
        await each.agent.clock.rest(5.0)
    raise AssertionError(each.said)


@pytest.mark.parametrize("tell", [False, True])
async def test_how_many_examples_there_are_is_said_only_where_the_owner_lets_it(tmp_path: Path, tell: bool) -> None:
    server = Server(tmp_path)
    each = client(server, 2, rules="[data]\ntell_examples = true\n" if tell else "")
    said = heard(each)
    with server.store.begin() as rows:  # it had nothing yesterday
        found = rows.client("2")
        assert found is not None
        rows.put_client(found._replace(examples=0))
    server.restarted()
    async with closing(each):
        await each.agent.work(once=True)
    first = next(message for message in said if isinstance(message, CheckIn))
    assert first.examples == (len(DATA[2][1]) if tell else None)
    with server.store.begin() as rows:
        assert [each.examples for each in rows.clients()] == [9, 10, 11 if tell else -2]
    assert server.learning.population == 3


async def test_who_has_nothing_left_to_train_on_says_so_once(tmp_path: Path) -> None:
    """The rules decline to train on nothing; the server would wait for the client until the window's end."""
    server = Server(tmp_path)
    x, y = DATA[2]
    each = client(server, 2, data=Data("data", read=lambda: to_bytes(own((x[:0], y[:0])))))
    said = heard(each)
    async with closing(each):
        for _ in range(2):
            with pytest.raises(OwnerRefuses, match=r"data\.least"):
                await each.agent.work(once=True)
    assert [message.examples for message in said] == [0]
    with server.store.begin() as rows:
        assert [each.examples for each in rows.clients()] == [9, 10, 0]


async def test_rules_hold_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client on whom one rule after another is imposed; the first round is done when all let it pass."""
    monkeypatch.setattr("foedus.net.agent.DATA_S", -1.0)  # the data is looked at every time
    server = Server(tmp_path, how=ALONE, only=1)
    each = client(server, 0, rules=FREE)
    mine, path = owner(server, 0), owner(server, 0).rules_file
    refusals = {
        "data.offered": '[data]\noffered = ["other"]',
        "checks.highest": "[checks]\nhighest = -100.0",
        "when.on_power": "[when]\non_power = true",
        "jurisdictions.allowed": '[jurisdictions]\nallowed = ["DE"]',
    }
    for rule, text in refusals.items():
        path.write_text(FREE + text)
        with pytest.raises(OwnerRefuses, match=rule.replace(".", r"\.")):
            await each.agent.work(once=True)
    assert server.coordinator.courses()[0].state.seats == {}  # the server was not even asked
    for demand in ("budget = true", "secure_others = 0"):  # the server is told, and does not accept it for less
        path.write_text(FREE + demand)
        await each.agent.work(once=True)
        assert each.agent.sessions[-1] == "-#"
    path.write_text("[protections]\nleast_others = 5")  # of this it is not told: the client declines
    await each.agent.work(once=True)
    assert any("protections.least_others" in line for line in each.said)
    assert not mine.ledger().count
    path.write_text(FREE + "[limits]\nupload_megabytes = 0.0")
    await until(each, lambda: each.agent.state.held)
    await each.agent.work(once=True)
    assert any("limits.upload_megabytes" in line for line in each.said)
    assert not mine.ledger().count  # trained, kept, and not sent
    path.write_text(FREE)
    await until(each, lambda: mine.ledger().count)
    await each.agent.close()


async def test_a_withdrawal_deletes_what_waits_and_nothing_more_leaves(tmp_path: Path) -> None:
    server = Server(tmp_path, how=ALONE, only=1)
    each = client(server, 0, rules=FREE + "[limits]\nupload_megabytes = 0.0")
    await until(each, lambda: each.agent.state.held)
    mine = owner(server, 0)
    mine.consents().withdraw(URL, who="x", when=1.0)
    mine.rules_file.write_text(FREE)
    with pytest.raises(OwnerRefuses, match="no consent"):
        await each.agent.work(once=True)
    assert each.agent.state.held == each.agent.journal.held() == {}
    assert mine.ledger().count == 0
    await each.agent.close()


async def test_what_another_signed_is_declined_unread(tmp_path: Path) -> None:
    server = Server(tmp_path, how=ALONE, only=1)
    each = client(server, 0, rules=FREE)
    each.agent.place = each.agent.place._replace(signing=SigningKey.generate().public)
    await each.agent.work(once=True)
    assert any("signature" in line for line in each.said)
    assert "-!#" in each.agent.sessions
    assert each.agent.approvals.tasks() == []
    await each.agent.close()


async def test_training_that_fails_costs_a_round_and_not_the_agent(tmp_path: Path) -> None:
    server = Server(tmp_path, how=ALONE, only=1)
    each = client(server, 0, rules=FREE)
    plain, failures = each.agent.training.ask, [WorkerDied("killed"), TrainingError("out of memory")]

    async def ask(said: dict[str, Any], *given: Any, **more: Any) -> Any:
        if said["do"] == "train" and failures:
            raise failures.pop()
        return await plain(said, *given, **more)

    each.agent.training.ask = ask  # type: ignore[method-assign]
    await until(each, lambda: not failures)
    assert any("training failed: killed" in line for line in each.said)
    await until(each, lambda: owner(server, 0).ledger().count)
    await each.agent.close()


async def test_whoever_else_answers_at_the_address_is_told_of_and_the_agent_goes_on(tmp_path: Path) -> None:
    """A hotel's page, an organisation's proxy: no foedus server, and nothing was said to it."""
    server = Server(tmp_path, how=ALONE, only=1)
    transport = server.transport(0)
    plain, asked = transport.ask, itertools.count()

    async def ask(message: Any) -> Any:
        if next(asked) < 2:
            raise NotTrusted("this answers with a page; is it a foedus server?")
        return await plain(message)

    transport.ask = ask  # type: ignore[method-assign]
    each = client(server, 0, rules=FREE, transport=transport)
    await each.agent.run()
    assert any("is it a foedus server?" in line for line in each.said)
    assert server.learning.state is not None
    assert "-v[]+^" in each.agent.sessions


async def test_a_server_that_is_gone_when_the_run_is_over_is_not_waited_for_and_asked_another_time(
    tmp_path: Path,
) -> None:
    """It had the model, and its last question of how the update stands was never answered."""
    server = Server(tmp_path, how=ALONE, only=1)
    transport = server.transport(0)
    plain, gone = transport.ask, list[bool]()

    async def ask(message: Any) -> Any:
        if gone:
            raise Unreachable("the server is not there")
        if isinstance(message, Ask):  # before the commit, every time
            entries = tuple(Standing(key=key, state=Stands.PENDING) for key in message.keys)
            return Standings(entries=entries, later=Window(after_s=0.0, until_s=0.0))
        answer = await plain(message)
        gone.extend([True] if isinstance(answer, Finished) else [])
        return answer

    transport.ask = ask  # type: ignore[method-assign]
    each = client(server, 0, rules=FREE, transport=transport)
    await each.agent.run()
    assert "the server is gone; how the last update stands is asked when this is started again" in each.said
    assert each.agent.state.held
    assert not server.coordinator.all_told
    again = client(server, 0, rules=FREE)
    await again.agent.run()
    assert "the update is counted" in again.said
    assert not again.agent.state.held
    assert server.coordinator.all_told
