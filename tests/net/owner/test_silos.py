"""Owners agree on a key by files: in any order, however often the command is run, whatever was done to the files."""

from __future__ import annotations

import itertools
import json
import stat
from pathlib import Path

import pytest

pytest.importorskip("tenseal")
pytest.importorskip("cryptography")

from foedus.cli import run
from foedus.errors import ConfigurationError, FoedusError, ForgedMessage
from foedus.net.owner.folder import OwnerFolder
from foedus.net.owner.peers import own_secret
from foedus.net.owner.silos import Agreement, agree, roster_of
from foedus.secure.homomorphic import SiloKey
from foedus.secure.primitives import identity_key

NAMES = ("Basel", "Bern", "Zug")


class Owners:
    """Three owners, who know each other's identities."""

    def __init__(self, folder: Path) -> None:
        self.shared = folder / "shared"
        self.folders = {name: OwnerFolder(folder / name) for name in NAMES}
        self.roster = {name: identity_key(own_secret(each.path)) for name, each in self.folders.items()}

    def step(self, name: str, session: str = "trial 7") -> Agreement:
        return agree(self.folders[name], self.shared, name=name, roster=self.roster, session=session)

    def until_done(self) -> None:
        for _ in range(4):
            if not any([self.step(name).awaited for name in NAMES]):  # noqa: C419
                return
        raise AssertionError("they do not come to an end")

    def keys(self) -> set[bytes]:
        return {each.silo_key.read_bytes() for each in self.folders.values()}


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids=lambda order: "-".join(order))
def test_all_end_with_one_key_in_whatever_order_they_run_it(tmp_path: Path, order: tuple[str, ...]) -> None:
    owners = Owners(tmp_path)
    for _ in range(4):
        found = [owners.step(name) for name in order]
    assert len({each.id for each in found}) == 1
    assert found[0].id
    (key,) = owners.keys()
    assert SiloKey(key).id == found[0].id
    for each in owners.folders.values():
        assert stat.S_IMODE(each.silo_key.stat().st_mode) == 0o600
        assert not list(each.path.glob("silo-*")), "what was needed meanwhile is gone"


def test_files_that_were_lost_are_put_back_by_whoever_wrote_them(tmp_path: Path) -> None:
    """Zug has the key, and Basel and Bern have not read its receipt yet, when the shared folder is emptied."""
    owners = Owners(tmp_path)
    for name in (*NAMES, "Basel", "Bern"):
        owners.step(name)
    done = owners.step("Zug")
    assert done.id
    assert not owners.folders["Bern"].silo_key.exists()
    for path in owners.shared.iterdir():
        path.unlink()
    assert owners.step("Zug") == done, "it does not begin anew"
    owners.until_done()
    assert len(owners.keys()) == 1
    (owners.shared / "Bern.receipt").unlink()
    assert owners.step("Bern") == done
    assert (owners.shared / "Bern.receipt").exists()


@pytest.mark.parametrize(
    ("file", "told"),
    [("Bern.offer", "the offer of 'Bern'"), ("Zug.wrapped", "the wrapped key for 'Zug'"),
     ("Bern.receipt", "the receipt of 'Bern'")],
)  # fmt: skip
def test_what_was_not_signed_by_whom_it_says_is_named(tmp_path: Path, file: str, told: str) -> None:
    owners = Owners(tmp_path)
    for name in (*NAMES, "Basel", "Bern"):
        owners.step(name)
    path = owners.shared / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"signature": "00" * 64}))
    with pytest.raises(ForgedMessage, match=told) as caught:
        owners.step("Zug")
    assert str(owners.shared) in str(caught.value)


def test_it_says_who_is_awaited_and_nobody_has_a_key_before_all_have_the_same(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    assert owners.step("Basel").awaited == "the offers of Bern, Zug"
    assert owners.step("Bern").awaited == "the offers of Zug"
    assert owners.step("Zug").awaited == "the key, which Basel makes"
    assert owners.step("Basel").awaited == "the receipts of Bern, Zug"
    assert owners.step("Bern").awaited == "the receipts of Zug"
    assert not any(each.silo_key.exists() for each in owners.folders.values())
    assert owners.step("Zug").id
    assert owners.step("Zug").id, "once more is no harm"


def test_nothing_that_is_passed_on_holds_the_key(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    owners.until_done()
    (key,) = owners.keys()
    secret = key[-4096:-4000]
    assert (
        sorted(path.suffix for path in owners.shared.iterdir()) == [".offer"] * 3 + [".receipt"] * 3 + [".wrapped"] * 2
    )
    assert not any(secret in path.read_bytes() or secret.hex() in path.read_text() for path in owners.shared.iterdir())


@pytest.mark.parametrize("file", ["Bern.offer", "Zug.wrapped", "Bern.receipt"])
def test_what_was_changed_on_its_way_is_refused(tmp_path: Path, file: str) -> None:
    owners = Owners(tmp_path)
    for name in (*NAMES, "Basel", "Bern"):
        owners.step(name)
    path = owners.shared / file
    told = json.loads(path.read_text())
    for field in sorted(set(told) - {"silo", "maker"}):
        changed = bytearray.fromhex(told[field])
        changed[len(changed) // 2] ^= 1
        path.write_text(json.dumps(told | {field: bytes(changed).hex()}))
        with pytest.raises(FoedusError):
            owners.step("Zug")
        assert not owners.folders["Zug"].silo_key.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"silo": 3}', b"\xff" * 9, b"[" * 99_999, b"1" * (1 << 21)])
def test_what_is_no_offer_is_told(tmp_path: Path, content: bytes) -> None:
    owners = Owners(tmp_path)
    owners.step("Basel")
    (owners.shared / "Bern.offer").write_bytes(content)
    with pytest.raises(ConfigurationError, match="is no offer of a silo's"):
        owners.step("Basel")


def test_offers_of_another_session_are_refused(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    owners.step("Bern", session="trial 6")
    owners.step("Zug")
    with pytest.raises(ForgedMessage):
        owners.step("Basel")


def test_another_key_is_not_written_over(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    owners.until_done()
    before = owners.keys()
    for path in owners.shared.iterdir():
        path.unlink()
    for name in (*NAMES, "Basel", "Bern"):
        owners.step(name, session="trial 8")
    with pytest.raises(ConfigurationError, match="another lies at"):
        owners.step("Zug", session="trial 8")
    assert owners.keys() == before


@pytest.mark.parametrize(
    "line", ["Basel", "Basel 12", "../Basel " + "ab" * 32, "Basel " + "ab" * 32 + "\nBasel " + "cd" * 32]
)
def test_a_bad_line_of_the_roster_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "roster.txt"
    path.write_text("# by telephone\n" + line)
    with pytest.raises(ConfigurationError, match=r"line [23]: a line is a silo's name"):
        roster_of(path)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for name in NAMES:
        assert run(["silos", "identity", "--folder", str(tmp_path / name)]) == 0
        lines.append(f"{name} {capsys.readouterr().out.strip()}")
    roster = tmp_path / "roster.txt"
    roster.write_text("\n".join(lines))
    how = ["--roster", str(roster), "--session", "trial 7"]
    codes = [
        run(["silos", "agree", str(tmp_path / "shared"), "--name", name, *how, "--folder", str(tmp_path / name)])
        for name in NAMES * 4
    ]
    assert codes[0] == 1
    assert codes[-3:] == [0, 0, 0]
    assert "all have the same key" in capsys.readouterr().out
    assert run(["silos", "agree", str(tmp_path), "--name", "Genf", *how]) == 2
    assert "'Genf' is not in the roster" in capsys.readouterr().err
