"""How a server's runs stand, as seen from outside: why clients declined, and that a sum is being opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import foedus as fd
from foedus.cli import foedus as command_line
from foedus.cli.status import DECLINED
from foedus.net.served import Rounds
from foedus.net.status import runs
from foedus.net.store import open_store
from foedus.protocol.messages import REASONS, Accepted, Decline, Later
from foedus.protocol.round import Phase, State

from .federations import Federation
from .test_coordinator import plain_trainee
from .test_learning import OWN

EACH = Rounds(minimum=2, clients=4, window=20.0, deadline=100.0, retry=1.0)


def told(folder: Path, *words: str) -> str:
    found = CliRunner().invoke(command_line, ["status", str(folder), *words])
    assert found.exit_code == 0
    return found.output


def declines(federation: Federation, position: int, reason: str) -> None:
    found = federation.check_in(position)
    assert isinstance(found, Accepted)
    federation.ask(position, Decline(key=found.key, reason=reason))


def test_every_reason_has_its_sentence() -> None:
    assert set(DECLINED) == {*REASONS, "other"}


def test_a_phase_in_which_a_sum_is_opened_is_called_so() -> None:
    opening = [Phase.SELECTING, Phase.TRAINING, Phase.AGGREGATING]
    assert [phase for phase in Phase if State(phase, opening=True).told == "opening"] == opening
    assert [State(phase).told for phase in Phase] == [str(phase) for phase in Phase]


def test_why_clients_declined_is_counted_by_reason(tmp_path: Path) -> None:
    """The last word of each in this round, whatever the attempt; a word that nobody knows is not shown."""
    url = f"sqlite:///{tmp_path}/foedus.sqlite"
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"each": EACH}, store=open_store(url))
    federation.tick()
    for position, reason in ((0, "training"), (1, "rules"), (3, "see evil.example"), (4, "rules")):
        declines(federation, position, reason)
    assert runs(url)[0]["declined"] == {"rules": 2, "training": 1, "other": 1}
    assert federation.coordinator.runs()[0]["declined"] == {"rules": 2, "training": 1, "other": 1}
    federation.tick(21.0)  # too few are left: the attempt has failed
    federation.tick(2.0)
    assert runs(url)[0]["attempt"] == 2
    federation.visit(0)
    declines(federation, 1, "signature")
    assert runs(url)[0]["declined"] == {"other": 1, "signature": 1, "rules": 1}
    lines = told(tmp_path)
    assert "run: 1 declined (rules): their owners' rules say no" in " ".join(lines.split())
    assert "evil" not in lines
    (found,) = json.loads(told(tmp_path, "--json"))
    assert found["declined"]["signature"] == 1
    federation.restarted(9)
    assert federation.coordinator.runs()[0]["declined"] == {"other": 1, "signature": 1, "rules": 1}
    federation.store.close()


def test_an_encrypted_sum_that_is_being_opened(tmp_path: Path) -> None:
    pytest.importorskip("tenseal")
    from .test_unsealing import Silos, trainee

    url = f"sqlite:///{tmp_path}/foedus.sqlite"
    silos = Silos(trainee(), store=open_store(url))
    silos.until("opening")
    found = silos.ask_in(0)
    silos.ask(0, Decline(key=found.key, reason="secure-aggregation"))
    (row,) = runs(url)
    assert (row["run"], row["phase"], row["seated"]) == ("run", "opening", 4)
    assert row["declined"] == {"secure-aggregation": 1}
    assert "opening" in told(tmp_path)
    silos.run()
    assert [row["phase"] for row in runs(url)] == ["over"]
    silos.store.close()


def test_what_is_needed_and_why_the_attempt_before_failed_stay_while_the_next_is_under_way(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/foedus.sqlite"
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"each": EACH}, store=open_store(url))
    federation.tick()
    declines(federation, 0, "approval")
    federation.tick(21.0)
    federation.tick(2.0)
    (row,) = runs(url)
    assert (row["phase"], row["attempt"], row["minimum"]) == ("selecting", 2, 2)
    assert row["why"] == "0 clients came, and 2 are needed"
    assert "1 declined (approval): their owners have yet to approve the task" in " ".join(told(tmp_path).split())
    federation.run()
    assert {row["why"] for row in runs(url)} == {"3 rounds are done"}
    federation.store.close()


def test_before_the_first_round_it_is_told_who_is_missing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/foedus.sqlite"
    federation = Federation(plain_trainee(fd.fedavg(OWN)), how={"each": Rounds(clients=9)}, store=open_store(url))
    federation.tick()
    found = federation.check_in(0)
    assert isinstance(found, Later)
    assert found.reason == "a round begins once 9 clients can take part, and 4 can"
    assert "no round has begun yet; clients that have enrolled: 5" in told(tmp_path)
    federation.store.close()
