"""Masked sums as a user runs them, one process a command: clients are killed at every stage, and so is the server. Here
clients keep something, too, of which the server has the sum."""

from __future__ import annotations

import json
import runpy
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cryptography")

from foedus.net.conferring import NAMES
from foedus.net.owner.folder import OwnerFolder
from foedus.protocol.blob import unpack
from foedus.record.folder import read
from foedus.record.kept import Kept

from .commands import EXAMPLE, Commands, with_changes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # processes that each load a library, on a busy machine

PLAIN = "fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16))"
MASKED = """(lambda withstand: fd.scaffold(fd.local_sgd(lr=0.1, epochs=2, batch_size=16)).with_(
    aggregator=fd.chain(fd.clip(1.0), fd.masked(withstand, bits=20, most=1000, least=3)),
    sides={
        "control": fd.masked(withstand, bits=24, bound=8.0, most=1000, least=3),
        "sizes": fd.masked(withstand, bits=16, bound=2.0**15 - 1, least=3),
    },
))(fd.Withstand(clients=4, corrupt=0.0, dropouts=0.25))"""
# Kills its own process, without any clean-up, when something with a word in it is about to leave.
SUICIDE = """
import os, signal
from foedus.net.agent import Agent
def leaves(self, accepted, what, size, digest):
    if {word!r} in what:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, accepted, what, size, digest)
plain, Agent._leaves = Agent._leaves, leaves
from foedus.cli import main
main()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with with_changes(tmp_path, {PLAIN: MASKED, "rounds=5": "rounds=20"}) as found:
        yield found


def test_clients_and_server_are_killed_at_every_stage(commands: Commands) -> None:
    join = commands.serve("--minimum", "3", "--clients", "4", "--patience", "4", "--window", "3")
    others = [commands.hospital(join, part) for part in range(3)]
    for word in ("public keys", "sealed", "under masks", "off the sum"):
        process = commands.hospital(join, 3, code=SUICIDE.format(word=word))
        commands.until(lambda process=process: process.poll() is not None, "the kill")
        assert process.returncode == -signal.SIGKILL
    last = commands.hospital(join, 3)
    assert commands.server is not None
    commands.server.kill()  # in the middle of a round, whatever it is at
    commands.server.wait(30)
    port = join[1].rpartition(":")[2]
    again = ("serve", EXAMPLE.name, "--minimum", "3", "--clients", "4", "--patience", "4", "--window", "3")
    commands.begin("server", *again, "--port", port, "--quiet")
    for process in (*others, last):
        commands.until(lambda process=process: process.poll() is not None, "the end")
        assert process.returncode == 0
    served = read(next((commands.folder / "foedus-server" / "runs").iterdir()))
    assert [line["round"] for line in served.metrics] == list(range(1, 21))
    assert all(line["trained"] in (0, 3, 4) for line in served.metrics)  # 0: a sum that was lost while it was opened
    assert served.metrics[-1]["trained"] == 4
    for part in range(4):
        check_ledger(OwnerFolder(commands.folder / f"hospital{part}"))
    check_kept(commands.folder)


def check_kept(folder: Path) -> None:
    """SCAFFOLD's law: what the server keeps is the mean of what the clients keep, weighted by numbers of examples."""
    found = [unpack(path.read_bytes()) for path in (folder / "foedus-server" / "blobs").rglob("*") if path.is_file()]
    states = [each for each in found if each.told.get("kind") == "checkpoint"]
    last = max(states, key=lambda each: json.loads(each.told["values"])["round"])
    common, kept, sizes = last.arrays["method.control"], [], []
    for part in range(4):
        (path,) = (folder / f"hospital{part}").glob("servers/*/kept-*.sqlite")
        database = Kept(path)
        (own,) = database.read(range(4)).values()
        database.close()
        kept.append(own["method.control"])
        sizes.append(len(runpy.run_path(str(folder / EXAMPLE.name))["clients"]().train(part)))
    assert np.abs(kept).max() > 1e-2
    np.testing.assert_allclose(common, np.average(kept, axis=0, weights=sizes), atol=5e-5)


def check_ledger(owner: OwnerFolder) -> None:
    """The chain holds; nothing left in the plain; masks were taken off in one attempt of a round at most."""
    opened: dict[int, set[int]] = defaultdict(set)
    masked: dict[tuple[int, int], int] = defaultdict(int)
    for entry in owner.ledger().entries():
        one = entry.departure
        assert one.what in NAMES.values()
        assert "under secure aggregation" in one.protections
        if one.what == NAMES["Shares"]:
            opened[one.round].add(one.attempt)
        if one.what == NAMES["Masked"]:
            masked[one.round, one.attempt] += 1
    assert all(len(attempts) == 1 for attempts in opened.values())
    assert set(masked.values()) <= {1}
    assert len(list(owner.path.glob("servers/*/models/*/model.safetensors"))) == 1
