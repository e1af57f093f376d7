"""Encrypted sums as a user runs them, one process a command, over TLS: silos are killed before they send and while they
decrypt, and so is the server, in the middle of it all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenseal")

import foedus as fd
from foedus.net.agent import OPENED
from foedus.net.identity.files import private_folder, write_secret
from foedus.net.owner.folder import OwnerFolder
from foedus.record.folder import read

from .commands import EXAMPLE, Commands, with_changes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # processes that each load a library, on a busy machine

COUNT, ROUNDS = 4, 2
PLAIN = "fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16))"
SEALED = "fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16), aggregator=fd.chain(fd.clip(1.0), fd.encrypted(4)))"
# Kills its own process, without any clean-up, when the ledger is about to say that something leaves.
SUICIDE = """
import os, signal
from foedus.net.agent import Agent
def written(self, about, leaving):
    if {word!r} in about.what:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, about, leaving)
plain, Agent._written = Agent._written, written
from foedus.cli import main
main()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with with_changes(tmp_path, {PLAIN: SEALED, "rounds=5": f"rounds={ROUNDS}"}) as found:
        yield found


def test_silos_and_server_are_killed_and_nothing_is_lost(commands: Commands, tmp_path: Path) -> None:
    key = fd.silo_key()
    for part in range(COUNT):
        write_secret(private_folder(commands.folder / f"hospital{part}") / "silo.key", bytes(key))
    how = ("--minimum", "4", "--patience", "1")
    join = commands.serve(*how[2:])
    first = commands.hospital(join, 0, code=SUICIDE.format(word="update"))
    others = [commands.hospital(join, part, code=SUICIDE.format(word=OPENED)) for part in range(1, COUNT)]
    killed(commands, first)  # trained, and did not send
    others.append(commands.hospital(join, 0, code=SUICIDE.format(word=OPENED)))
    for process in others:  # each is asked in turn, and dies with the answer in its journal
        killed(commands, process)
    assert commands.server is not None
    commands.server.kill()
    commands.server.wait()
    commands.begin("server", "serve", EXAMPLE.name, *how, "--port", join[1].rpartition(":")[2], "--quiet")
    last = [commands.hospital(join, part) for part in range(COUNT)]
    for process in last:
        commands.until(lambda process=process: process.poll() is not None, "the end")
        assert process.returncode == 0
    served = read(next((commands.folder / "foedus-server" / "runs").iterdir()))
    assert [line["trained"] for line in served.metrics] == [COUNT] * ROUNDS
    for name, array in simulated(key, tmp_path / "simulated").items():
        np.testing.assert_array_equal(served.parameters[name], array)
    for part in range(COUNT):
        left = [entry.departure for entry in OwnerFolder(commands.folder / f"hospital{part}").ledger().entries()]
        assert {one.what.removesuffix(", sent again") for one in left} <= {"update", OPENED, "figures of an evaluation"}
        assert all("encrypted, under a key that the silos share" in one.protections for one in left)


def killed(commands: Commands, process: object) -> None:
    commands.until(lambda: process.poll() is not None, "the kill")  # type: ignore[attr-defined]
    assert process.returncode == -signal.SIGKILL  # type: ignore[attr-defined]


def simulated(key: Any, folder: Path) -> dict[str, object]:
    """The same hospitals in one process, which plays all parts."""
    task = fd.Task(fd.logistic(30, 2), metrics=[fd.accuracy])
    rule = fd.chain(fd.clip(1.0), fd.encrypted(COUNT, key=key))
    algorithm = fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16), aggregator=rule)
    clients = fd.data.breast_cancer().partition(fd.data.iid(COUNT), seed=0).map_fitted(fd.data.own_scaling())
    settings = fd.Settings(folder=folder, executor=fd.executors.debug(), progress=False)
    return fd.simulate(task, algorithm, clients, rounds=ROUNDS, settings=settings).parameters  # type: ignore[return-value]
