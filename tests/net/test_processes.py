"""The example as a user runs it: a server and four clients, each a process with one command; some of them killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foedus.net.owner.folder import OwnerFolder
from foedus.record.folder import read

from .commands import Commands

pytestmark = pytest.mark.slow


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    found = Commands(tmp_path)
    with found.stack:
        yield found


def check(commands: Commands, parts: range = range(4)) -> None:
    """The model has the simulated bits; everybody has it, and was counted once in every round."""
    wanted = commands.simulated()
    rounds = len(wanted.metrics)
    served = read(next((commands.folder / "foedus-server" / "runs").iterdir()))
    for name, array in wanted.parameters.items():
        np.testing.assert_array_equal(served.parameters[name], array)
    assert [line["trained"] for line in served.metrics] == [4] * rounds
    for part in parts:
        owner = OwnerFolder(commands.folder / f"hospital{part}")
        assert len(list(owner.path.glob("servers/*/models/*/model.safetensors"))) == 1
        entries = [entry.departure for entry in owner.ledger().entries() if entry.departure.what.startswith("update")]
        by_round = {n: {e.digest for e in entries if e.round == n} for n in range(1, rounds + 1)}
        assert all(len(digests) == 1 for digests in by_round.values()), "the same bytes, whenever they are sent"


# Kills its own process, without any clean-up, before the so-manieth action of the agent.
SUICIDE = """
import itertools, os, signal
from foedus.net.agent import Agent
plain, count = Agent._act, itertools.count()
async def act(self, action):
    if next(count) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return await plain(self, action)
Agent._act = act
from foedus.cli import main
main()
"""


@pytest.mark.timeout(600)  # five processes that each load a library, on however busy a machine
def test_the_example_is_served_and_joined_with_one_command_each_though_one_is_killed(commands: Commands) -> None:
    """One hospital is killed by signal 9 before it trains, before its first byte leaves, and before it submits. (Every
    other step: test_agent.py.)"""
    join = commands.serve()
    others = [commands.hospital(join, part) for part in range(3)]
    for at in (2, 5, 2):  # counted from each start: after the second kill it begins with what it holds
        process = commands.hospital(join, 3, code=SUICIDE.format(at=at))
        commands.until(lambda process=process: process.poll() is not None, "the kill")
        assert process.returncode == -signal.SIGKILL
    last = commands.hospital(join, 3)
    for process in (*others, last):
        commands.until(lambda process=process: process.poll() is not None, "the end")
        assert process.returncode == 0
    check(commands)
