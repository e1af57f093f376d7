"""A backup made in the middle of a round, and a server that goes on from it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import foedus as fd
from foedus.cli import foedus as command_line
from foedus.cli import run
from foedus.errors import CheckpointError, ConfigurationError, StorageError
from foedus.net.backup import backup, restore
from foedus.net.blobs import open_blobs
from foedus.net.identity.authority import Authority
from foedus.net.restored import Gap
from foedus.net.sealing import of_file
from foedus.net.served import Keeping
from foedus.net.status import audit, runs
from foedus.net.store import open_store
from foedus.privacy.accounting import rdp
from foedus.privacy.events import Gaussian
from foedus.protocol.messages import Received

from .federations import Federation
from .test_coordinator import plain_trainee
from .test_learning import OWN, task
from .trainees import Trainee


def of_folder(folder: Path, **how: Any) -> Federation:
    return Federation(
        plain_trainee(fd.fedavg(OWN, server=fd.adam(lr=0.1))), store=open_store(f"sqlite:///{folder}/foedus.sqlite"),
        blobs=open_blobs(folder / "blobs"), **how,
    )  # fmt: skip


@pytest.mark.slow
def test_a_server_goes_on_from_a_backup_to_the_same_model(tmp_path: Path) -> None:
    folder, copy, back = (tmp_path / name for name in ("server", "copy", "back"))
    Authority.kept(folder / "identity", now=1.7e9)
    federation = of_folder(folder)
    federation.tick()
    for position in (0, 1, 3, 4):
        federation.visit(position)
    federation.tick()
    federation.visit(0)
    assert backup(folder, copy) == 1
    federation.run()
    url = f"sqlite:///{folder}/foedus.sqlite"
    assert [(row["run"], row["phase"], row["round"]) for row in runs(url)] == [("run", "over", 3)]
    assert len(audit(url)) == 4
    told = CliRunner().invoke(command_line, ["status", str(folder)])
    assert "over" in told.output
    assert f"pin: {Authority.kept(folder / 'identity', now=1.7e9).pin}" in told.output
    federation.store.close()
    restore(copy, back)
    assert Authority.kept(back / "identity", now=1.7e9).pin == Authority.kept(folder / "identity", now=1.7e9).pin
    again = of_folder(back)
    again.restarted(9)  # with other keys
    assert again.learning.step.round == 2
    again.run()
    for found, wanted in zip(again.learning.state.weights, federation.learning.state.weights, strict=True):
        np.testing.assert_array_equal(found, wanted)
    again.store.close()


@pytest.mark.slow
def test_a_backup_has_no_key_of_the_round_and_goes_on_without(tmp_path: Path) -> None:
    folder, copy, back = (tmp_path / name for name in ("server", "copy", "back"))
    Authority.kept(folder / "identity", now=1.7e9)
    sealed = {"how": {"keeping": Keeping.SEALED}, "ground": {"operator": of_file(folder / "identity" / "sealing.key")}}
    federation = of_folder(folder, **sealed)
    federation.tick()
    assert isinstance(federation.visit(0), Received)
    with federation.store.begin() as rows:
        (row,) = rows.runs()
    assert row.key
    assert backup(folder, copy) == 1
    assert row.key not in b"".join(path.read_bytes() for path in copy.rglob("*") if path.is_file())
    federation.store.close()
    restore(copy, back)
    sealed["ground"] = {"operator": of_file(back / "identity" / "sealing.key")}
    again = of_folder(back, **sealed)
    again.held = federation.held
    assert again.standing(0) == "again"
    again.run()
    assert [line["trained"] for line in again.lines()] == [4, 4, 4]
    again.store.close()


@pytest.mark.slow
def test_a_backup_that_fails_half_way_is_none(tmp_path: Path) -> None:
    folder, copy = tmp_path / "server", tmp_path / "copies" / "monday"
    federation = of_folder(folder)
    federation.tick()
    federation.store.close()
    with pytest.raises(StorageError, match="There is no backup"):  # it has no identity
        backup(folder, copy)
    assert list(copy.parent.iterdir()) == []
    Authority.kept(folder / "identity", now=1.7e9)
    assert backup(folder, copy) == 1


# --- what was released after the backup was made ------------------------------------------------------------


CENTRAL = fd.fedavg(OWN, aggregator=fd.privacy.central(clip=1.0, noise_multiplier=2.0, cohort=4))
STREAM = fd.fedavg(
    OWN,
    aggregator=fd.privacy.correlated(fd.privacy.banded(6, separation=1), clip=1.0, noise_multiplier=2.0, cohort=4),
)


def noisy(folder: Path, algorithm: fd.Algorithm) -> Federation:
    trainee = plain_trainee(algorithm)
    trainee = Trainee(task(average_buffers=False), algorithm, trainee.clients, seed=2)
    return Federation(
        trainee, store=open_store(f"sqlite:///{folder}/foedus.sqlite"), blobs=open_blobs(folder / "blobs"),
        how={"rounds": 6, "budget": fd.privacy.Budget(epsilon=100.0, delta=1e-3)},
    )  # fmt: skip


def lost_after_round(last: int, folder: Path, algorithm: fd.Algorithm) -> Path:
    """A server that was backed up after round 1, and lost after a later one; its backup."""
    Authority.kept(folder / "identity", now=1.7e9)
    federation, copy = noisy(folder, algorithm), folder.parent / "copy"
    while federation.learning.step.round <= last:
        federation.tick()
        for position in (0, 1, 3, 4):
            federation.visit(position)
        federation.tick()
        for position in list(federation.held):
            federation.again(position)
        if federation.learning.step.round == 2 and not copy.exists():
            backup(folder, copy)
    federation.store.close()
    return copy


@pytest.mark.slow
def test_rounds_that_a_backup_knows_nothing_of_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    copy = lost_after_round(3, tmp_path / "server", CENTRAL)
    restore(copy, tmp_path / "untold")
    with pytest.raises(CheckpointError, match=r"backup that was made after its round 1\..*--reached run=ROUND"):
        noisy(tmp_path / "untold", CENTRAL)
    assert restore(copy, tmp_path / "back", {"run": 3}) == {"run": Gap(1, 3)}
    again = noisy(tmp_path / "back", CENTRAL)
    assert again.learning.step.round == 4
    again.restarted(3)
    assert again.learning.step.round == 4, "however often it is started"
    again.run()
    assert [line["round"] for line in again.lines()] == [1, 4, 5, 6]
    found = [line["privacy"]["epsilon"] for line in again.lines()]
    wanted = [rdp([(Gaussian(2.0), count)], 1e-3) for count in (1, 4, 5, 6)]
    assert found == pytest.approx(wanted), "three were released before, and three since"
    assert any('"restored"' in line for line in audit(f"sqlite:///{tmp_path}/back/foedus.sqlite"))
    again.restarted(4)
    assert again.learning.over, "what is over needs nothing more"
    again.store.close()


@pytest.mark.slow
def test_noise_that_hangs_together_does_not_go_on_over_rounds_that_are_lost(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    copy = lost_after_round(2, tmp_path / "server", STREAM)
    restore(copy, tmp_path / "back", {"run": 2})
    with pytest.raises(CheckpointError, match="hangs together over rounds"):
        noisy(tmp_path / "back", STREAM)
    restore(copy, tmp_path / "nothing lost", {"run": 1})
    again = noisy(tmp_path / "nothing lost", STREAM)
    assert again.learning.step.round == 2
    again.store.close()


@pytest.mark.slow
def test_masked_rounds_go_on_after_those_that_clients_have_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    from . import test_masking

    def at(folder: Path) -> dict[str, Any]:
        return {"store": open_store(f"sqlite:///{folder}/foedus.sqlite"), "blobs": open_blobs(folder / "blobs")}

    Authority.kept(tmp_path / "server" / "identity", now=1.7e9)
    places = at(tmp_path / "server")
    monkeypatch.setattr(test_masking, "open_store", lambda url: places["store"])
    monkeypatch.setattr(test_masking, "open_blobs", lambda url: places["blobs"])
    world = test_masking.World()
    backup(tmp_path / "server", tmp_path / "copy")
    world.live()
    world.store.close()
    world.rounds = 2
    restore(tmp_path / "copy", tmp_path / "untold")
    vars(world).update(at(tmp_path / "untold"))
    with pytest.raises(CheckpointError, match="was put back"):
        world.restarted()
    world.store.close()
    restore(tmp_path / "copy", tmp_path / "back", {"run": 1})
    vars(world).update(at(tmp_path / "back"))
    world.restarted()
    world.live()
    assert world.counted(1) == []
    assert world.counted(2) == list(range(test_masking.COUNT))
    assert not world.ended, "nobody had to decline"
    world.store.close()


@pytest.mark.slow
def test_without_noise_and_masks_a_backup_goes_on_and_may_leave_rounds_out(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    Authority.kept(folder / "identity", now=1.7e9)
    federation = of_folder(folder)
    federation.tick()
    backup(folder, tmp_path / "copy")
    federation.store.close()
    command = ["restore", str(tmp_path / "copy"), str(tmp_path / "back"), "--reached", "run=2"]
    told = CliRunner().invoke(command_line, command)
    assert "run was at round 0, and goes on after round 2" in told.output
    again = of_folder(tmp_path / "back")
    again.run()
    assert [line["round"] for line in again.lines()] == [3]
    again.store.close()


@pytest.mark.slow
def test_what_is_said_of_a_restored_run_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    copy, back = lost_after_round(1, tmp_path / "server", CENTRAL), tmp_path / "back"
    with pytest.raises(ConfigurationError, match="no run 'other'"):
        restore(copy, back, {"other": 3})
    with pytest.raises(ConfigurationError, match="round 1000000000 since is hardly meant"):
        restore(copy, back, {"run": 10**9})
    with pytest.raises(ConfigurationError, match="round 0 only"):
        restore(copy, back, {"run": 0})
    for said in ("run", "run=", "=3", "run=three", "run=-1"):
        assert run(["restore", str(copy), str(back), "--reached", said]) == 2
        assert "--reached takes a run" in capsys.readouterr().err
    assert not back.exists()
    assert run(["restore", str(copy), str(back)]) == 0
    assert "run was at round 1. If it has noise, masks or encryption" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_backed_up_or_restored_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no server's folder"):
        backup(tmp_path, tmp_path / "copy")
    with pytest.raises(ConfigurationError, match="no backup"):
        restore(tmp_path, tmp_path / "x")
    url = f"sqlite:///{tmp_path}/foedus.sqlite"
    store = open_store(url)
    with store.begin() as rows:
        rows.note("finished", {"run": "a"}, 1.0)
    store.close()
    (tmp_path / "identity").mkdir()
    with pytest.raises(ConfigurationError, match="there already"):
        backup(tmp_path, tmp_path)
    with sqlite3.connect(tmp_path / "foedus.sqlite") as database:
        database.execute('UPDATE audit SET told = \'{"run": "b"}\'')
    database.close()
    with pytest.raises(StorageError, match="audit log is damaged"):
        audit(url)
