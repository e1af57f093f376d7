"""Join tokens: each lets in whom it should, once, and says why not otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus.errors import EnrolmentRefused
from foedus.net.identity.directory import Directory, invitation, token_digest
from foedus.net.store import SqlStore, open_store

A, B = b"a" * 32, b"b" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    opened = open_store(f"sqlite:///{tmp_path}/server.sqlite")
    yield opened
    opened.close()


def test_clients_are_numbered_in_the_order_in_which_they_join(store: SqlStore) -> None:
    directory = Directory(store)
    for position, name in enumerate(("north", "south", "east")):
        token, invited = invitation(now=0.0)
        directory.invite(invited)
        member = directory.enrol(token, name, name.ljust(32).encode(), now=1.0)
        assert (member.position, member.name, member.silo, member.scope) == (position, name, True, "read train")
    assert [m.name for m in directory.members()] == ["north", "south", "east"]


def test_the_same_client_may_ask_again_and_nobody_else(store: SqlStore) -> None:
    """A lost answer costs nothing; a copied token opens nothing, and its owner is told."""
    directory = Directory(store)
    token, invited = invitation(now=0.0)
    directory.invite(invited)
    first = directory.enrol(token, "clinic", A, now=1.0)
    assert directory.enrol(token, "clinic", A, now=1e9) == first
    with pytest.raises(EnrolmentRefused, match=r"used already\. If it was not you"):
        directory.enrol(token, "thief", B, now=2.0)
    with pytest.raises(EnrolmentRefused, match="'clinic' or its key belongs to a member already"):
        directory.enrol(token, "clinic", B, now=2.0)
    with pytest.raises(EnrolmentRefused, match="belongs to a member already"):
        directory.enrol(token, "clinic-two", A, now=2.0)
    assert len(directory.members()) == 1


def test_tokens_expire_and_can_be_for_one_name_or_for_several_clients(store: SqlStore) -> None:
    directory = Directory(store)
    late, invited = invitation(now=0.0, hours=1.0)
    directory.invite(invited)
    with pytest.raises(EnrolmentRefused, match=r"expired 1\.0 hours ago by the server's clock"):
        directory.enrol(late, "clinic", A, now=7200.0)
    named, invited = invitation(now=0.0, name="clinic")
    directory.invite(invited)
    with pytest.raises(EnrolmentRefused, match="is for 'clinic', not for 'other'"):
        directory.enrol(named, "other", A, now=1.0)
    several, invited = invitation(now=0.0, uses=2, silo=False)
    directory.invite(invited)
    assert [directory.enrol(several, n, n.encode() * 32, now=1.0).silo for n in "xy"] == [False, False]
    with pytest.raises(EnrolmentRefused, match="used already"):
        directory.enrol(several, "z", b"z" * 32, now=1.0)
    with pytest.raises(EnrolmentRefused, match="not of this server"):
        directory.enrol("foedus_join_made-up", "z", b"z" * 32, now=1.0)


def test_who_is_revoked_does_not_come_back_under_its_name_or_key(store: SqlStore) -> None:
    directory = Directory(store)
    tokens = []
    for _ in range(3):
        token, invited = invitation(now=0.0)
        directory.invite(invited)
        tokens.append(token)
    directory.enrol(tokens[0], "clinic", A, now=1.0)
    directory.revoke("clinic", now=2.0)
    assert directory.revoked() == {"clinic"}
    for name, key in (("clinic", A), ("clinic", B), ("new", A)):
        with pytest.raises(EnrolmentRefused, match="'clinic' was revoked"):
            directory.enrol(tokens[1], name, key, now=3.0)
    assert directory.enrol(tokens[1], "new", B, now=3.0).position == 1  # positions are never used again
    with pytest.raises(EnrolmentRefused, match="nobody is called 'ghost'"):
        directory.revoke("ghost", now=3.0)


@pytest.mark.parametrize("name", ["", "../etc", "a b", "a" * 64, ".hidden", "naïve", "x\n"])
def test_names_that_could_be_mistaken_for_something_else_are_refused(store: SqlStore, name: str) -> None:
    directory = Directory(store)
    token, invited = invitation(now=0.0)
    directory.invite(invited)
    with pytest.raises(EnrolmentRefused, match="cannot be a name"):
        directory.enrol(token, name, A, now=1.0)
    assert directory.enrol(token, "good", A, now=1.0).position == 0  # the token was not spent


def test_a_stolen_database_holds_no_token(store: SqlStore, tmp_path: Path) -> None:
    directory = Directory(store)
    token, invited = invitation(now=0.0)
    directory.invite(invited)
    directory.enrol(token, "clinic", A, now=1.0)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token_digest(token) in stored
    assert token.removeprefix("foedus_join_").encode() not in stored


@pytest.mark.slow
def test_a_token_that_many_spend_at_once_lets_one_in(store: SqlStore) -> None:
    directory = Directory(store)
    token, invited = invitation(now=0.0)
    directory.invite(invited)
    told: list[str] = []

    def join(number: int) -> None:
        try:
            told.append(directory.enrol(token, f"client-{number}", os.urandom(32), now=1.0).name)
        except EnrolmentRefused as error:
            told.append(str(error)[:36])

    threads = [threading.Thread(target=join, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(text.startswith("client-") for text in told) == 1
    assert told.count("this join token has been used already"[:36]) == 7
    assert len(directory.members()) == 1
