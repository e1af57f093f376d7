"""What only its owner may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from foedus.errors import StorageError
from foedus.net.identity.files import private_file, private_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_folder_that_is_made_on_the_way_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        found = private_file(tmp_path / "hospital" / "servers" / "one" / "agent.sqlite")
    finally:
        os.umask(before)
    assert {mode(path) for path in found.parents if tmp_path in path.parents} == {0o700}
    assert mode(found) == 0o600
    found.write_bytes(b"kept")
    assert private_file(found).read_bytes() == b"kept"


def test_a_file_where_a_folder_is_wanted_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(StorageError, match="taken"):
        private_folder(tmp_path / "taken")
