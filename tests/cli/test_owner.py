"""What an owner types: the ledger and consent."""

from __future__ import annotations

from pathlib import Path

import pytest

from foedus.cli import run
from foedus.net.journal import About, Journal
from foedus.net.owner.folder import OwnerFolder, file_name
from foedus.net.owner.ledger import Departure
from foedus.protocol.session import Held

URL = "https://fl.example.org:8765"


@pytest.fixture
def owner(tmp_path: Path) -> OwnerFolder:
    return OwnerFolder(tmp_path)


def test_a_ledger_is_shown_and_verified(owner: OwnerFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(owner.path)]
    owner.rules()
    assert run(["ledger", "show", *folder]) == 0
    assert "0 in all, 0 bytes" in capsys.readouterr().out
    for i in (1, 2):
        what = Departure(to=URL, what="update", run="heart", round=i, attempt=i, bytes=1234, digest="ab" * 32)
        owner.ledger().write(what, when=0.0)
    assert run(["ledger", "show", *folder, "--last", "1"]) == 0
    shown = capsys.readouterr().out
    assert "heart round 2, attempt 2" in shown
    assert "round 1" not in shown
    assert "2 in all, 2,468 bytes" in shown
    head = owner.ledger().head
    assert run(["ledger", "verify", *folder, "--head", head]) == 0
    assert "2 lines" in capsys.readouterr().out
    assert run(["ledger", "verify", *folder, "--head", "00" * 31 + "01"]) == 1
    (owner.path / "ledger.jsonl").write_bytes((owner.path / "ledger.jsonl").read_bytes().replace(b"1234", b"1235"))
    assert run(["ledger", "verify", *folder]) == 1
    assert "does not follow" in capsys.readouterr().err


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ["ledger", "verify"], ["ledger", "show"], ["tasks", "list"], ["tasks", "approve", "ab" * 8],
        ["consent", "show"], ["consent", "withdraw", URL],
    ],
)  # fmt: skip
def test_a_folder_that_is_mistyped_is_told_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], there: bool
) -> None:
    folder = tmp_path / "mistyped"
    if there:
        folder.mkdir()
    assert run([*words, "--folder", str(folder)]) == 2
    told = capsys.readouterr().err
    assert str(folder) in told.replace("\n", "")
    assert ("is no owner's folder" if there else "is not there") in told
    assert [path for path in tmp_path.rglob("*") if path != folder] == []


def test_consent_is_given_shown_and_withdrawn(owner: OwnerFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(owner.path), "--who", "Dr Weiss"]
    owner.rules()
    assert run(["consent", "show", *folder[:2]]) == 0
    assert "nothing is trained without" in capsys.readouterr().out
    assert run(["consent", "give", URL + "/", *folder, "--data", "heart"]) == 0
    assert "with heart" in capsys.readouterr().out
    assert owner.consents().holds(URL)
    assert run(["consent", "withdraw", URL.upper(), *folder]) == 0
    said = capsys.readouterr().out
    assert "cannot undo" in said
    assert "0 updates" in said
    assert not owner.consents().holds(URL)
    assert run(["consent", "show", *folder[:2]]) == 0
    assert "withdrawn by Dr Weiss" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "left"), [("", 0), ("aa", 1)])
def test_a_withdrawal_deletes_what_waits(owner: OwnerFolder, task: str, left: int) -> None:
    folder = owner.server(URL)
    folder.mkdir(parents=True)
    journal = Journal(folder / "agent.sqlite")
    secret = b"a change of a model " * 50
    for name in ("aa", "bb"):
        held = Held(key=name.encode() * 8, round=1, digest=b"", size=len(secret))
        journal.hold(held, About(f"run {name}", 1, 0, name, "update"), secret, None)
        (folder / f"kept-{file_name(f'run {name}')}.sqlite").write_bytes(b"kept")
    journal.close()
    owner.consents().give(URL, who="x", when=0.0)
    assert run(["consent", "withdraw", URL, "--who", "x", "--task", task, "--folder", str(owner.path)]) == 0
    journal = Journal(folder / "agent.sqlite")
    assert len(journal.held()) == left
    journal.close()
    assert len(list(folder.glob("kept-*"))) == left
    if not left:
        assert all(secret not in path.read_bytes() for path in folder.iterdir())
