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
from foedus.errors import ConfigurationError, StorageError
from foedus.net.backup import backup, restore
from foedus.net.blobs import open_blobs
from foedus.net.identity.authority import Authority
from foedus.net.sealing import of_file
from foedus.net.served import Keeping
from foedus.net.status import audit, runs
from foedus.net.store import open_store
from foedus.protocol.messages import Received

from .federations import Federation
from .test_coordinator import plain_trainee
from .test_learning import OWN


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
