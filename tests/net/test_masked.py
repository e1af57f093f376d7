"""Masked sums between machines: whole agents, whose training takes place in real processes. Who is lost when, and what
is malformed, is in ``test_masking.py``."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography")

from foedus.errors import NoGuarantee
from foedus.net.conferring import NAMES
from foedus.net.owner.peers import identity
from foedus.net.served import Rounds
from foedus.protocol.messages import SECURE, Accepted, CheckIn, Later
from foedus.protocol.secagg.messages import certificate
from foedus.record.kept import Kept
from foedus.secure.primitives import identity_key

from .agents import DATA, Client, Server, Time, client, closing, simulated

pytestmark = pytest.mark.slow

MASKED = (
    "fd.fedavg(fd.local_sgd(0.1, batch_size=4), aggregator=fd.chain(fd.clip(1.0), "
    "fd.masked(fd.Withstand(clients=3, corrupt=0.0, dropouts=0.34), least=2)))"
)
RULES = "[protections]\nleast_others = 1\nsecure_others = 1\n"
EACH = Rounds(minimum=2, clients=3, patience=1e4, deadline=1e6, window=1e4, retry=0.1)
HOW = {"each": EACH}


@dataclass
class Patient(Time):
    """Virtual time that passes slowly: training takes place in real processes meanwhile."""

    most: int = 10**6

    async def rest(self, seconds: float) -> None:
        await super().rest(min(seconds, 0.05))
        await asyncio.sleep(0.001)  # lets the processes have the processor


async def together(server: Server, *clients: Client) -> None:
    """All agents at once, until the run is over."""
    async with closing(*clients):
        await asyncio.gather(*(each.agent.work() for each in clients))


WITHSTAND = "fd.Withstand(clients=3, corrupt=0.0, dropouts=0.34)"
SCAFFOLD = (
    f"(lambda rule, whole: fd.scaffold(fd.local_sgd(0.1, batch_size=4)).with_(aggregator=rule, "
    f"sides={{'control': rule, 'sizes': whole}}))(fd.masked({WITHSTAND}, bits=24, bound=8.0, most=50, least=2), "
    f"fd.masked({WITHSTAND}, bits=16, bound=2.0**15 - 1, least=2))"
)


@pytest.mark.parametrize("algorithm", [MASKED, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_a_masked_round_ends_with_the_bits_of_a_simulated_one(tmp_path: Path, algorithm: str) -> None:
    server = Server(tmp_path, algorithm, HOW, Patient())
    clients = [client(server, i, rules=RULES) for i in range(3)]
    asyncio.run(together(server, *clients))
    run = simulated(server, tmp_path / "simulated")
    state = server.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, run.weights.vector)
    first = [[line["what"] for line in lines(each) if line["round"] == 1] for each in clients]
    turns = [NAMES["Keys"], NAMES["Parcels"], NAMES["Masked"], NAMES["Shares"]]
    assert all(each in (turns, turns[:3]) for each in first), "whose shares are not needed any more tells none"
    assert sum(each == turns for each in first) >= 2
    assert all("under secure aggregation" in line["protections"] for each in clients for line in lines(each))


def lines(who: Client) -> list[dict[str, object]]:
    """What the owner's ledger says that left."""
    path = who.agent.place.owner.path / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Killed(BaseException):
    """What a power cut looks like from inside."""


@pytest.mark.parametrize("word", ["sealed", "under masks", "off the sum"])
def test_what_an_agent_keeps_counts_with_its_update_whenever_it_is_killed(tmp_path: Path, word: str) -> None:
    """SCAFFOLD's law: what the server keeps is the mean of what the clients keep, weighted by numbers of examples."""
    server = Server(tmp_path, SCAFFOLD, HOW, Patient())
    clients = [client(server, i, rules=RULES) for i in range(3)]
    dies_at(clients[1], word)

    async def all_of_them() -> None:
        dead = asyncio.Event()
        for other in (clients[0], clients[2]):  # two would be enough, and nobody be asked what the third is to die at
            holds_back(other, word, dead)
        others = asyncio.gather(clients[0].agent.work(), clients[2].agent.work())
        with pytest.raises(Killed):
            await clients[1].agent.work()
        clients[1].agent.journal.close()
        dead.set()
        again = client(server, 1, training=clients[1].agent.training)
        await again.agent.work()
        await others
        for each in (clients[0], again, clients[2]):
            await each.agent.close()

    asyncio.run(all_of_them())
    state = server.learning.state
    assert state is not None
    assert state.round == 2
    kept = []
    for i in range(3):
        (path,) = (tmp_path / f"owner{i}").glob("servers/*/kept-*.sqlite")
        found = Kept(path)
        kept.append(found.read([i])[i]["method.control"])
        found.close()
    sizes = [len(y) for _, y in DATA.values()]
    assert np.abs(state.method["control"]).max() > 1e-2
    np.testing.assert_allclose(state.method["control"], np.average(kept, axis=0, weights=sizes), atol=1e-4)


def dies_at(who: Client, word: str) -> None:
    """Nothing happens any more once something is about to leave; once."""
    plain = who.agent._leaves

    def leaves(accepted: Accepted, what: str, size: int, digest: bytes) -> None:
        if word in what:
            raise Killed
        plain(accepted, what, size, digest)

    who.agent._leaves = leaves  # type: ignore[method-assign]


def holds_back(who: Client, word: str, until: asyncio.Event) -> None:
    """Nothing is said from when something is about to leave, until something else has happened."""
    leaves, ask, held = who.agent._leaves, who.agent.transport.ask, asyncio.Event()

    def noted(accepted: Accepted, what: str, size: int, digest: bytes) -> None:
        leaves(accepted, what, size, digest)
        if word in what:
            held.set()

    async def asked(message: Any) -> Any:
        if held.is_set():
            await until.wait()
        return await ask(message)

    who.agent._leaves = noted  # type: ignore[method-assign]
    who.agent.transport.ask = asked  # type: ignore[method-assign]


def test_an_owner_who_wants_more_others_declines(tmp_path: Path) -> None:
    server = Server(tmp_path, MASKED, HOW | {"rounds": 1, "each": replace(EACH, attempts=1)}, Patient())
    clients = [client(server, i, rules=RULES.replace("secure_others = 1", "secure_others = 2")) for i in range(3)]
    asyncio.run(together(server, *clients))
    assert any(
        "secure aggregation is with at least 1 others; wanted: with at least 2" in told for told in clients[0].said
    )
    assert server.learning.state is not None
    assert server.learning.state.round == 0


def test_a_plain_run_is_no_run_under_secure_aggregation(tmp_path: Path) -> None:
    server = Server(tmp_path, how={"each": Rounds(minimum=3)})
    (one,) = [client(server, 0, rules=RULES)]
    answer = asyncio.run(asked(server, one))
    assert isinstance(answer, Later)
    assert "does not promise secure-aggregation" in answer.reason


async def asked(server: Server, one: Client) -> object:
    async with closing(one):
        return await server.transport(0).ask(CheckIn(run="run", examples=9, protections=(SECURE,)))


# --- a server that may lie ----------------------------------------------------------------------------------

LYING = MASKED.replace("dropouts=0.34", "dropouts=0.0, malicious=True").replace("least=2", "least=3")
ONCE = HOW | {"rounds": 1, "each": replace(EACH, minimum=3, attempts=1)}


def introduced(server: Server, who: Sequence[int], *, instead: dict[int, bytes] | None = None) -> list[Client]:
    """Three agents, of whom some have written down the keys of all, or of others in their place."""
    clients = [client(server, i, rules=RULES) for i in range(3)]
    folders = [each.agent.place.owner.path for each in clients]
    for folder in folders:
        with contextlib.suppress(NoGuarantee):
            identity(folder)  # makes the key
    keys = {i: identity_key((folder / "peers.key").read_bytes()) for i, folder in enumerate(folders)}
    for i in who:
        (folders[i] / "peers.txt").write_text("\n".join(key.hex() for key in (keys | (instead or {})).values()))
    return clients


def test_owners_who_know_each_other_need_not_believe_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path, LYING, ONCE, Patient())
    clients = introduced(server, range(3))
    asyncio.run(together(server, *clients))
    state = server.learning.state
    assert state is not None
    assert state.round == 1
    run = simulated(server, tmp_path / "simulated", rounds=1)
    np.testing.assert_array_equal(state.weights.vector, run.weights.vector)
    assert NAMES["Vote"] in [line["what"] for line in lines(clients[0])]


def test_a_third_party_may_know_the_owners_in_the_servers_place(tmp_path: Path) -> None:
    server = Server(tmp_path, LYING, ONCE, Patient())
    clients, third = introduced(server, []), bytes(range(32))
    for each in clients:
        folder = each.agent.place.owner.path
        signed = certificate(third, identity_key((folder / "peers.key").read_bytes()))
        (folder / "peers.txt").write_text(f"authority {identity_key(third).hex()}\ncertificate {signed.hex()}\n")
    asyncio.run(together(server, *clients))
    assert server.learning.state is not None
    assert server.learning.state.round == 1
    assert NAMES["Vote"] in [line["what"] for line in lines(clients[2])]


def test_whoever_knows_nobody_sends_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, LYING, ONCE, Patient())
    clients = introduced(server, [0, 1])
    asyncio.run(together(server, *clients))
    assert server.learning.state is not None
    assert server.learning.state.round == 0
    assert any("clients must know each other by keys that it did not issue" in told for told in clients[2].said)
    assert not lines(clients[2])
    assert not any(NAMES["Masked"] == line["what"] for each in clients for line in lines(each))


def test_a_client_that_is_not_the_one_on_the_list_gets_no_shares(tmp_path: Path) -> None:
    server = Server(tmp_path, LYING, ONCE, Patient())
    clients = introduced(server, range(3), instead={2: identity_key(bytes(range(32)))})
    asyncio.run(together(server, *clients))
    assert server.learning.state is not None
    assert server.learning.state.round == 0
    assert not any(NAMES["Masked"] == line["what"] for each in clients for line in lines(each))
