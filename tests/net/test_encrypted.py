"""Encrypted sums between machines: whole agents, whose training takes place in real processes. Who is lost when, who
lies, and what is malformed, is in ``test_unsealing.py``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenseal")

import foedus as fd
from foedus.errors import SecureAggregationFailed
from foedus.net.agent import OPENED
from foedus.net.identity.files import write_secret
from foedus.net.served import Rounds
from foedus.protocol import blob
from foedus.protocol.messages import ENCRYPTED, Accepted, Blob, CheckIn, Kind, Later

from .agents import Client, Server, client, closing, owner, simulated
from .test_masked import Patient, together

pytestmark = pytest.mark.slow

SEALED = "fd.fedavg(fd.local_sgd(0.1, batch_size=4), aggregator=fd.chain(fd.clip(1.0), fd.encrypted(3, most=50)))"
RULES = "[protections]\nleast_others = 2\nencrypted_others = 2\n"
EACH = Rounds(minimum=3, clients=3, patience=1e4, deadline=1e6, window=1e4, retry=0.1)
HOW = {"each": EACH}


def silo(server: Server, position: int, key: bytes | None, **given: object) -> Client:
    """An agent with a key in its owner's folder."""
    folder = owner(server, position, rules=str(given.pop("rules", RULES)))
    if key is not None:
        write_secret(folder.silo_key, key)
    return client(server, position, **given)


def lines(who: Client) -> list[dict[str, object]]:
    path = who.agent.place.owner.path / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keyed(server: Server, key: bytes) -> None:
    """The task as the simulator runs it, which plays all parts."""
    sealed = server.found.algorithm.aggregator.sealed
    assert sealed is not None
    algorithm = replace(server.found.algorithm, aggregator=sealed.keyed(key))
    server.found = type("Found", (), {"task": server.found.task, "algorithm": algorithm})


def test_an_encrypted_run_ends_with_the_bits_of_a_simulated_one(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW, Patient())
    key = bytes(fd.silo_key())
    clients = [silo(server, i, key) for i in range(3)]
    asyncio.run(together(server, *clients))
    keyed(server, key)
    run = simulated(server, tmp_path / "simulated")
    state = server.learning.state
    assert state is not None
    assert state.round == 2
    np.testing.assert_array_equal(state.weights.vector, run.weights.vector)
    left = [line for each in clients for line in lines(each)]
    assert [line["what"] for line in left].count("update") == 6
    assert [line["what"] for line in left].count(OPENED) == 4
    assert all("encrypted, under a key that the silos share" in line["protections"] for line in left)
    secret = secret_part(key)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "silo.key"]:
        assert secret not in path.read_bytes(), f"the key is in {path}"
    assert not any(secret.hex()[:64] in told for each in clients for told in each.said)


def secret_part(key: bytes) -> bytes:
    """Bytes that are in no other context: beyond the parameters, which all have."""
    return key[-4096:-4000]


def test_whoever_has_no_key_says_so_and_sends_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1, "each": replace(EACH, attempts=1)}, Patient())
    clients = [silo(server, i, None) for i in range(3)]
    asyncio.run(together(server, *clients))
    assert any("there is none at" in told and "--silo-key" in told for told in clients[0].said)
    assert not any(lines(each) for each in clients)


def test_a_file_that_is_no_key_is_told(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1, "each": replace(EACH, attempts=1)}, Patient())
    clients = [silo(server, i, b"no key at all") for i in range(3)]
    asyncio.run(together(server, *clients))
    assert any("this is no key of encrypted sums" in told for told in clients[0].said)
    assert not any(lines(each) for each in clients)


def test_another_key_is_refused_in_the_round(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1, "each": replace(EACH, attempts=1)}, Patient())
    key = bytes(fd.silo_key())
    clients = [silo(server, i, key if i < 2 else bytes(fd.silo_key())) for i in range(3)]
    asyncio.run(together(server, *clients))
    assert server.learning.state is not None
    assert server.learning.state.round == 0


def test_a_rule_for_encrypted_sums_lets_nothing_else_pass(tmp_path: Path) -> None:
    server = Server(tmp_path, how={"each": Rounds(minimum=3)})
    one = silo(server, 0, None)

    async def asked() -> object:
        async with closing(one):
            return await server.transport(0).ask(CheckIn(run="run", examples=9, protections=(ENCRYPTED,)))

    answer = asyncio.run(asked())
    assert isinstance(answer, Later)
    assert "does not promise encrypted-sums" in answer.reason


def test_too_few_others_for_an_owner(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1, "each": replace(EACH, attempts=1)}, Patient())
    rules = RULES.replace("encrypted_others = 2", "encrypted_others = 3")
    key = bytes(fd.silo_key())
    clients = [silo(server, i, key, rules=rules) for i in range(3)]
    asyncio.run(together(server, *clients))
    assert any("an encrypted sum is with at least 2 others; wanted: with at least 3" in t for t in clients[0].said)
    assert not any(lines(each) for each in clients)


# --- a server that does not do as told ------------------------------------------------------------------------


def tampered(server: Server, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The server gives another sum to be decrypted."""
    learning = server.learning
    whole = learning.handed

    def handed(gathering: Any) -> bytes:
        given = blob.unpack(whole(gathering))
        return blob.pack(change(dict(given.arrays)), dict(given.told))

    learning.handed = handed  # type: ignore[method-assign]


def stopped(server: Server, clients: list[Client]) -> list[str]:
    """What the agents end with."""

    async def run() -> list[str]:
        async with closing(*clients):
            found = await asyncio.gather(*(each.agent.work() for each in clients), return_exceptions=True)
        return [str(each) for each in found if isinstance(each, SecureAggregationFailed)]

    return asyncio.run(run())


def test_a_client_that_is_shown_a_changed_sum_stops_until_somebody_looks(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1}, Patient())
    tampered(server, lambda arrays: arrays | {"count": arrays["count"] + 1})
    key = bytes(fd.silo_key())
    told = stopped(server, [silo(server, i, key) for i in range(3)])
    assert len(told) >= 2
    assert "3 silos are in the sum, said to be 4" in told[0]
    assert "find out why before it is started again" in told[0]
    assert server.learning.state is not None
    np.testing.assert_array_equal(server.learning.state.weights.vector, server.learning.trainer.initial().vector)


def test_a_client_opens_one_sum_of_a_round_and_no_other(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1}, Patient())
    key = bytes(fd.silo_key())
    clients = [silo(server, i, key) for i in range(3)]
    for each in clients:  # as though another sum of this round had been opened before
        each.agent.journal.note("opened run", (1).to_bytes(8, "big") + bytes(32))
    told = stopped(server, clients)
    assert "another sum of round 1" in told[0]
    assert not any(line["what"] == OPENED for each in clients for line in lines(each))


def test_a_client_opens_no_sum_of_a_round_that_it_is_not_in(tmp_path: Path) -> None:
    server = Server(tmp_path, SEALED, HOW | {"rounds": 1}, Patient())
    one = silo(server, 0, bytes(fd.silo_key()))
    orders = Blob(digest=bytes(32), size=9)
    asked = Accepted(
        run="run", round=1, attempt=1, kind=Kind.DECRYPT, key=bytes(16), orders=orders, position=0, seed=5, closes_s=9.0
    )
    with pytest.raises(SecureAggregationFailed, match="nothing of this client's is in it"):
        asyncio.run(one.agent._fetched_sum(asked, b""))
    asyncio.run(one.agent.close())
