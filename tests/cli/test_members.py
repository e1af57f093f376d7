"""``foedus members``: the tokens it prints are good, once; who is revoked stays outside."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from foedus.cli import foedus
from foedus.errors import ConfigurationError, EnrolmentRefused
from foedus.net.identity.authority import Authority
from foedus.net.identity.directory import Directory
from foedus.net.store import LEADER, Lease, open_store


def told(*words: str) -> str:
    done = CliRunner().invoke(foedus, ["members", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_invite_show_revoke(tmp_path: Path) -> None:
    authority, store = (
        Authority.kept(tmp_path / "identity", now=time.time()),
        open_store(f"sqlite:///{tmp_path}/foedus.sqlite"),
    )
    folder = ["--folder", str(tmp_path)]
    assert "nobody has joined yet" in told("show", *folder)
    command = told("invite", "--url", "https://fl.example:1", "--name", "north", *folder).split()
    assert command[:5] == ["foedus", "join", "https://fl.example:1", "--pin", authority.pin]
    assert command[5] == "--token"
    assert command[7:] == ["--name", "north", "--data", "MODULE:OBJECT"]
    assert told("invite", *folder).split()[2] == "https://localhost:8765"
    with store.begin() as rows:
        rows.put_lease(Lease(LEADER, "a server", "https://fl.example:9000", 1, time.time()))
    assert told("invite", *folder).split()[2] == "https://fl.example:9000", "where it listened last"
    with pytest.raises(ConfigurationError, match="is not the address of a server"):
        told("invite", "--url", "localhost:18774", *folder)
    device = told("invite", "--device", "--uses", "2", "--population", "phones", *folder).split()[6]
    directory = Directory(store)
    assert directory.enrol(command[6], "north", b"a" * 32, now=time.time()).silo
    with pytest.raises(EnrolmentRefused, match="used already"):
        directory.enrol(command[6], "south", b"b" * 32, now=time.time())
    assert not directory.enrol(device, "phone", b"c" * 32, now=time.time()).silo
    assert "north is revoked" in told("revoke", "north", *folder)
    lines = told("show", *folder).splitlines()
    assert lines[0].startswith("    0  north  (silo, since 20")
    assert lines[0].endswith(", revoked)")
    assert "phone  (device of phones, since 20" in lines[1]
    assert command[6] not in told("show", *folder)
    store.close()


def test_a_folder_of_no_server_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not the folder of a server"):
        CliRunner().invoke(foedus, ["members", "show", "--folder", str(tmp_path)], catch_exceptions=False)
