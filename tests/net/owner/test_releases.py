"""What has left with noise of its own: written down once, for good, and damaged files are told."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from foedus.errors import CheckpointError, OwnerRefuses
from foedus.net.journal import About, Journal
from foedus.net.owner.releases import Release, Releases
from foedus.protocol.session import Held

KIND = '{"event": "LocalGaussian", "noise_multiplier": 4.0}'


def at(round: int, part: int = 0, *, run: str = "study", masked: bool = False) -> Release:
    return Release("heart", run, round, part, KIND, masked)


def test_a_step_has_one_release_and_runs_go_forward_only(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases.json")
    releases.note(at(2), "ab")
    releases.note(at(2), "ab")
    releases.note(at(2, 1), "cd")
    again = Releases(tmp_path / "releases.json")  # another process, another day
    for old in (at(1), at(2), at(2, 1)):
        with pytest.raises(OwnerRefuses, match="noised afresh, the noise could be averaged out"):
            again.check(old)
        with pytest.raises(OwnerRefuses):
            again.note(old, "ef")
    assert again.check(at(2, 2))
    assert again.check(at(1, run="another"))
    assert again.kinds("heart") == {KIND: 2}
    assert again.count("lungs") == 0


def test_under_masks_attempts_of_a_round_are_one(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "releases.json")
    for _ in range(3):
        releases.note(at(1, masked=True), "")
    assert not releases.check(at(1, masked=True))
    assert releases.count("heart") == 1
    with pytest.raises(OwnerRefuses):  # the same round in the open
        releases.check(at(1))
    releases.note(at(2), "ab")
    with pytest.raises(OwnerRefuses):
        releases.check(at(2, masked=True))


def test_many_agents_of_one_owner_write_one_file(tmp_path: Path) -> None:
    def work(number: int) -> None:
        releases = Releases(tmp_path / "releases.json")
        for round in range(1, 6):
            releases.note(at(round, run=str(number)), f"{number}{round}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert Releases(tmp_path / "releases.json").count("heart") == 20


@pytest.mark.parametrize(
    "change",
    [
        lambda told: "no json",
        lambda told: json.dumps(told | {"version": 9}),
        lambda told: json.dumps({"version": 1}),
        lambda told: json.dumps({"version": 1, "data": {"heart": {"study": {}}}}),
        lambda told: json.dumps(told).replace('"round": 1', '"round": "1"'),
        lambda told: json.dumps(told).replace('"round": 1', '"round": -1'),
    ],
)
def test_what_cannot_be_read_lets_nothing_leave(tmp_path: Path, change: object) -> None:
    releases = Releases(tmp_path / "releases.json")
    releases.note(at(1), "ab")
    assert callable(change)
    path = tmp_path / "releases.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=r"releases\.json"):
        releases.check(at(2))
    with pytest.raises(CheckpointError):
        releases.note(at(2), "cd")


# --- the bytes ------------------------------------------------------------------------------------------------


def held(number: int, round: int) -> Held:
    return Held(bytes([number]) * 16, round, 3, bytes(32))


def test_bytes_put_aside_stay_until_the_next_of_their_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "agent.sqlite")
    about = About("study", 1, 0, "abcd task", "update", ("p",), 1, "first")
    journal.hold(held(1, 3), about, b"abc", b"kept")
    assert journal.aside("first") is None
    journal.put_aside(held(1, 3).key)
    assert not journal.held()
    journal.close()
    journal = Journal(tmp_path / "agent.sqlite")
    found = journal.aside("first")
    assert found == (about, b"abc", b"kept", 1.0)
    journal.hold(held(2, 3), about._replace(release="second"), b"def", None)  # another part of the same round
    journal.hold(held(3, 4), about._replace(run="another", release="third"), b"ghi", None)
    assert journal.aside("first") == found
    journal.hold(held(4, 3), about, b"abc", b"kept")  # it is sent again
    assert journal.aside("first") is None
    journal.put_aside(held(4, 3).key)
    journal.hold(held(5, 4), about._replace(release="fifth"), b"jkl", None)
    assert journal.aside("first") is None
    assert set(journal.held()) == {held(n, 3).key for n in (2, 3, 5)}


def test_a_withdrawal_and_a_runs_end_delete_what_was_put_aside(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "agent.sqlite")
    about = About("study", 1, 0, "abcd task", "update", (), 1, "first")

    def put(release: str, run: str, task: str) -> None:
        number = len(release)
        journal.hold(held(number, 3), about._replace(release=release, run=run, task=task), b"abc", None)
        journal.put_aside(held(number, 3).key)

    put("a", "study", "abcd task")
    put("bb", "another", "ef task")
    journal.forget_aside("ef")
    assert (journal.aside("a") is None, journal.aside("bb") is None) == (False, True)
    put("bb", "another", "ef task")
    journal.forget_aside(run="study")
    assert (journal.aside("a") is None, journal.aside("bb") is None) == (True, False)
    journal.forget_aside()
    assert journal.aside("bb") is None


def test_a_journal_of_before_is_read(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "agent.sqlite")
    old.execute(
        "CREATE TABLE held (key BLOB PRIMARY KEY, round INTEGER, size INTEGER, digest BLOB, scale REAL, waits INTEGER, "
        "run TEXT, attempt INTEGER, position INTEGER, task TEXT, what TEXT, protections TEXT, sends INTEGER, "
        "bytes BLOB, kept BLOB)"
    )
    row = (*held(1, 3), "study", 1, 0, "abcd", "update", "", 1, b"abc", None)
    old.execute(f"INSERT INTO held VALUES ({', '.join('?' * len(row))})", row)
    old.commit()
    old.close()
    for _ in range(2):
        journal = Journal(tmp_path / "agent.sqlite")
        assert journal.held() == {held(1, 3).key: held(1, 3)}
        assert journal.about(held(1, 3).key) == About("study", 1, 0, "abcd", "update", (), 1, "")
        journal.close()
