"""What every store must do, whatever database it is; and every lease on it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from foedus.errors import ConfigurationError, CountedTwice, MissingExtra, StaleEpoch, StorageError
from foedus.net.leases import lead, leave, resign, stand
from foedus.net.store import LEADER, InvitedRow, Lease, RunRow, SeatRow, SqlStore, check_log, open_store
from foedus.net.tables import METADATA

from ..net import databases

KINDS: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: "sqlite://",
    "sqlite": lambda folder: f"sqlite:///{folder}/deep/down/foedus.sqlite",
    "postgres": lambda folder: databases.postgres_url(),
}


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return KINDS[request.param](tmp_path)


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    store = open_store(url)
    yield store
    store.close()


def test_a_transaction_is_whole_or_nothing(store: SqlStore) -> None:
    with pytest.raises(RuntimeError, match="crash"), store.begin() as rows:  # noqa: PT012
        rows.enrol("a", b"key", 1.0)
        rows.put_run(RunRow("run", "id", b"state"))
        rows.note("enrolled", {"name": "a"}, 1.0)
        assert rows.client("a") is not None, "it sees its own writes"
        raise RuntimeError("crash")
    with store.begin() as rows:
        assert (rows.clients(), rows.runs(), rows.notes()) == ([], [], [])


def test_positions_are_given_in_order_and_for_ever(store: SqlStore) -> None:
    with store.begin() as rows:
        assert [rows.enrol(name, name.encode(), 1.5).position for name in "abc"] == [0, 1, 2]
        rows.put_client(rows.clients()[1]._replace(examples=7, revoked_at=3.0))
    with store.begin() as rows:
        found = rows.client("b")
        assert found is not None
        assert found[:6] == (1, "b", b"b", 1.5, 7, 3.0)
        assert rows.client_of(b"b") == found
        assert rows.client_of(b"e") is None
        assert rows.revoked() == ["b"]
        assert rows.enrol("d", b"", 2.0).position == 3
    with pytest.raises(ConfigurationError, match="'a' is enrolled already"), store.begin() as rows:
        rows.enrol("a", b"", 2.0)


def test_invitations_come_back_and_are_counted_down(store: SqlStore) -> None:
    invited = InvitedRow(b"digest", 2.5, 2, "read train", True, "a")
    with store.begin() as rows:
        rows.put_invitation(invited)
        rows.put_invitation(invited._replace(uses=1))
        assert rows.invitation(b"digest") == invited._replace(uses=1)
        assert rows.invitation(b"other") is None


def test_runs_and_seats_come_back_as_they_were_put(store: SqlStore) -> None:
    seats = [SeatRow("r", n, 0, 1, p, bytes([n, p]), "open", b"\0x") for n in (1, 2) for p in (5, 3)]
    with store.begin() as rows:
        rows.put_run(RunRow("r", "id", b"\x00\xff", "c", "s", b"k", 1.0))
        rows.put_seats(seats)
        rows.put_seats([])
    changed = seats[0]._replace(state="counted", about=b"")
    with store.begin() as rows:
        rows.put_run(RunRow("r", "id", b"later", "c2", "", b"", 2.0))
        rows.put_seats([changed, SeatRow("r", 2, 0, 2, 3, b"new", "open")])
    with store.begin() as rows:
        assert rows.run("r") == ("r", "id", b"later", "c2", "", b"", 2.0)
        assert rows.run("other") is None
        assert [s.position for s in rows.seats("r")] == [3, 5, 3, 5, 3]
        assert rows.seat(changed.key) == changed
        assert rows.seat(b"nobody's") is None
        assert {s.attempt for s in rows.seats("r", since=2)} == {1, 2}
        rows.forget_seats("r", before=2)
        assert {s.round for s in rows.seats("r")} == {2}


def test_a_client_is_counted_once_in_a_round(store: SqlStore) -> None:
    with store.begin() as rows:
        rows.count("r", 1, [3, 5])
        rows.count("r", 2, [3])
        rows.count("r", 2, [])
        rows.count("r", 1, [3], part=1)
    with pytest.raises(CountedTwice, match="round 1"), store.begin() as rows:  # noqa: PT012
        rows.put_run(RunRow("r", "id", b""))
        rows.count("r", 1, [4, 5])
    with store.begin() as rows:
        assert (rows.counted("r", 1), rows.counted("r", 2), rows.counted("r", 3)) == ({3, 5}, {3}, set())
        assert rows.run("r") is None, "nothing of it was written"


def test_a_line_of_the_record_is_replaced_by_a_later_one(store: SqlStore) -> None:
    with store.begin() as rows:
        for number in (2, 1):
            rows.put_line("r", "metrics.jsonl", number, f'{{"round": {number}}}')
        rows.put_line("r", "metrics.jsonl", 2, "later")
        rows.put_line("r", "timings.jsonl", 1, "x")
        rows.put_line("other", "metrics.jsonl", 1, "x")
    with store.begin() as rows:
        assert rows.lines("r", "metrics.jsonl") == [(1, '{"round": 1}'), (2, "later")]
        assert rows.lines("r", "metrics.jsonl", after=1) == [(2, "later")]


# --- leases and epochs ----------------------------------------------------------------------------------------


def test_a_lease_goes_to_the_next_when_it_has_run_out(store: SqlStore) -> None:
    first = lead(store, "a", "http://a", 0.0, seconds=6)
    assert first == Lease(LEADER, "a", "http://a", 1, 6.0)
    assert lead(store, "b", "http://b", 5.9) == first
    assert lead(store, "a", "http://a", 5.0, seconds=6) == first._replace(expires_at=11.0), "renewed, same epoch"
    assert lead(store, "b", "http://b", 11.0, seconds=6).epoch == 2
    assert lead(store, "a", "http://a", 12.0).holder == "b"
    assert lead(store, "b", "http://b", 100.0).epoch == 3, "it had run out: others may have written in between"


def test_a_lease_given_back_is_free_at_once(store: SqlStore) -> None:
    mine = lead(store, "a", "http://a", 0.0)
    resign(store, mine._replace(epoch=7), 1.0)
    assert lead(store, "b", "http://b", 1.0).holder == "a", "another epoch's is not given back"
    resign(store, mine, 1.0)
    assert lead(store, "b", "http://b", 1.0).holder == "b"


def test_who_is_there_is_known_until_it_leaves_or_is_silent_for_long(store: SqlStore) -> None:
    assert lead(store, "a", "http://a", 0.0).holder == "a"
    assert stand(store, "a", "http://a", 0.0) == ("http://a",)
    assert stand(store, "b", "http://b", 1.0) == ("http://a", "http://b")
    assert stand(store, "a", "http://other", 2.0) == ("http://b", "http://other"), "it has moved"
    assert stand(store, "b", "http://b", 50.0) == ("http://b", "http://other")
    assert stand(store, "b", "http://b", 62.0) == ("http://b",), "a has been silent for a minute"
    assert stand(store, "a", "http://a", 63.0) == ("http://a", "http://b")
    leave(store, "b")
    assert stand(store, "a", "http://a", 64.0) == ("http://a",)
    with store.begin() as rows:
        assert [lease.name for lease in rows.leases()] == [LEADER, "server a"]


def test_who_was_taken_over_writes_nothing(store: SqlStore) -> None:
    old = lead(store, "a", "http://a", 0.0)
    with store.begin(old.epoch) as rows:
        rows.put_run(RunRow("r", "id", b"old"))
    new = lead(store, "b", "http://b", 60.0)
    with store.begin(new.epoch) as rows:
        rows.put_run(RunRow("r", "id", b"new"))
    with pytest.raises(StaleEpoch, match=r"epoch 1 .* b holds it with epoch 2"), store.begin(old.epoch) as rows:
        rows.put_run(RunRow("r", "id", b"older"))
    with store.begin() as rows:
        found = rows.run("r")
        assert found is not None
        assert found.state == b"new"


def test_without_a_lease_nobody_writes_in_its_name(store: SqlStore) -> None:
    with pytest.raises(StaleEpoch, match="nobody holds it"), store.begin(1):
        pass


@pytest.mark.slow
def test_nobody_takes_over_in_the_middle_of_a_write() -> None:
    """On PostgreSQL, where two processes write at once: the lease's row is held until the write has ended."""
    url = databases.postgres_url()
    ours, theirs = open_store(url), open_store(url)
    epoch = lead(ours, "a", "http://a", 0.0).epoch
    order: list[str] = []

    def take() -> None:
        lead(theirs, "b", "http://b", 60.0)
        order.append("taken")

    with ours.begin(epoch) as rows:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.2)
        rows.put_run(RunRow("r", "id", b""))
        order.append("written")
    thread.join(60)
    assert order == ["written", "taken"]
    ours.close()
    theirs.close()


# --- the audit log --------------------------------------------------------------------------------------------


def test_the_audit_log_shows_any_change(store: SqlStore) -> None:
    with store.begin() as rows:
        for i in range(3):
            rows.note("round", {"number": i, "name": "ü"}, 0.1 * i)
    with store.begin() as rows:
        lines = rows.notes()
        assert [line.told["number"] for line in lines] == [0, 1, 2]
        assert rows.notes(after=2) == lines[2:]
        assert check_log(lines) == lines[-1].digest
        assert check_log(lines[1:], lines[0].digest) == lines[-1].digest
    for spoilt in (
        [lines[0], lines[2]],
        [lines[0]._replace(at=5.0), *lines[1:]],
        [lines[0], lines[1]._replace(told={"number": 9, "name": "ü"}), lines[2]],
    ):
        with pytest.raises(StorageError, match="audit log is damaged"):
            check_log(spoilt)


# --- opening --------------------------------------------------------------------------------------------------


def test_what_was_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    url = KINDS["sqlite"](tmp_path)
    store = open_store(url)
    with store.begin() as rows:
        rows.enrol("a", b"", 1.0)
    store.close()
    store = open_store(url)
    with store.begin() as rows:
        assert [c.name for c in rows.clients()] == ["a"]
    store.close()


def test_migrations_make_the_tables_that_are_used(url: str) -> None:
    store = open_store(url)
    with store._engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), METADATA)
    assert differences == []
    store.close()


def test_places_that_cannot_be_opened_are_told_without_their_password(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"postgresql://me:\*\*\*@127.0.0.1:1/x") as found:
        open_store("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(found.value)
    with pytest.raises(ConfigurationError, match="mysql"):
        open_store("mysql://localhost/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        open_store(f"sqlite:///{tmp_path}/file/x.sqlite")
    (tmp_path / "no.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        open_store(f"sqlite:///{tmp_path}/no.sqlite")


def test_postgresql_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"foedus\[postgres\]"):
        open_store("postgresql://localhost/x")
