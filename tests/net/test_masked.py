"""Masked sums between machines, in memory: agents and a coordinator on virtual time, with the real cryptography."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography")

from foedus.net.agent import Agent
from foedus.net.served import Rounds
from foedus.protocol.round import At, Phase

from .agents import Client, Server, client, closing, simulated

pytestmark = pytest.mark.slow

MASKED = (
    "fd.fedavg(fd.local_sgd(0.1, batch_size=4), aggregator=fd.chain(fd.clip(1.0), "
    "fd.masked(fd.Withstand(clients=3, corrupt=0.0, dropouts=0.34), least=2)))"
)
HOW = {"each": Rounds(minimum=2, clients=3, patience=5.0, deadline=100.0, window=50.0, retry=1.0)}


async def together(server: Server, *clients: Client) -> None:
    """All agents at once, until the run is over."""
    async with closing(*clients):
        await asyncio.gather(*(each.agent.work() for each in clients))


def test_a_masked_round_ends_with_the_bits_of_a_simulated_one(tmp_path: Path) -> None:
    server = Server(tmp_path, MASKED, HOW)
    clients = [client(server, i, rules="[protections]\nsecure_aggregation_others = 1\n") for i in range(3)]
    asyncio.run(together(server, *clients))
    run = simulated(server, tmp_path / "simulated")
    state = server.learning.state
    assert state is not None
    np.testing.assert_array_equal(state.weights.vector, run.weights.vector)
