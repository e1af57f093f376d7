"""Joining: what is asked before anything is said to a server, and the command line's flags."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.cli import run
from foedus.errors import ConfigurationError, Unreachable
from foedus.net.identity import visits
from foedus.net.join import _called, _data, _name
from foedus.net.locks import alone
from foedus.net.source import of_bytes

URL = "https://127.0.0.1:9"
DATA = (np.ones((3, 2), np.float32), np.array([0, 1, 1]))


def settings(folder: Path, **given: object) -> fd.Joining:
    return fd.Joining(folder=folder, tell=lambda _: None, **given)  # type: ignore[arg-type]


def test_without_consent_nothing_is_said_and_it_is_not_given_again_in_passing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no consent to train"):
        fd.join(URL, data=DATA, settings=settings(tmp_path))
    with pytest.raises(ConfigurationError, match="takes the token"):
        fd.join(URL + "/", data=DATA, settings=settings(tmp_path, consent="Dr Weiss"))
    consents = settings(tmp_path).owner.consents()
    assert not consents.holds(URL), "nothing has been said to that server yet"
    consents.give(URL, who="Dr Weiss", when=0.0)
    consents.withdraw(URL, who="Dr Weiss", when=0.0)
    with pytest.raises(ConfigurationError, match="was withdrawn"):
        fd.join(URL, data=DATA, settings=settings(tmp_path, consent="Dr Weiss"))
    assert not consents.holds(URL)


def test_consent_names_the_data_as_its_owner_does() -> None:
    assert _called("hospitals.py:clients", fd.Joining(part="0")) == 'the data set "clients", part "0"'
    assert _called(DATA, fd.Joining()) == 'the data set "data"'


def test_one_agent_works_for_one_server_in_one_folder(tmp_path: Path) -> None:
    mine = settings(tmp_path, consent="x")
    with (
        alone(mine.owner.server(URL) / "agent.lock", ""),
        pytest.raises(ConfigurationError, match="another agent works"),
    ):
        fd.join(URL, data=DATA, settings=mine)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"pin": "3f1c"}, "64 hexadecimal"), ({"approve": ["beef"]}, "16 to 64"), ({"approve": ["x" * 16]}, "16 to 64")],
)
def test_what_cannot_be_a_pin_or_a_digest_is_told(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        fd.Joining(**wrong)  # type: ignore[arg-type]


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(fd.Joining(token="secret"))


def test_data_has_a_name_that_rules_can_offer(tmp_path: Path) -> None:
    def heart() -> object:
        return DATA

    assert _data("my.py:examples", settings(tmp_path)).name == "examples"
    assert _data("my.py:clients", settings(tmp_path, part="north")).name == "north"
    assert _data(heart, settings(tmp_path)).name == "heart"
    named = _data(DATA, settings(tmp_path, dataset="ward 3"))
    assert named.name == "ward 3"
    assert named.read is not None
    assert len(of_bytes(named.read()).train(0)) == 3


def test_a_relative_folder_is_where_it_was_when_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings(Path("mine")).owner.path == tmp_path / "mine"


def test_the_command_line_asks_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["join", URL, "--data", "my.py:examples", "--folder", str(tmp_path)]
    assert run(words) == 2
    assert "foedus consent give" in capsys.readouterr().err
    assert run([*words, "--consent", "Dr Weiss", "--memory", "100", "--seconds", "5", "--approve", "ab" * 8]) == 2
    assert "token" in capsys.readouterr().err
    assert run([*words, "--pin", "zz"]) == 2


def test_who_asks_again_after_a_lost_answer_has_the_same_name(tmp_path: Path) -> None:
    names = {_name("ward 7", tmp_path / "a") for _ in range(2)}
    assert len(names) == 1
    assert next(iter(names)).startswith("ward-7-")
    assert _name("ward 7", tmp_path / "b") not in names


@pytest.mark.parametrize(("there", "again"), [(True, 3), (False, 0)])
def test_a_server_that_is_slow_is_asked_again_and_one_that_is_not_there_is_not(
    tmp_path: Path, there: bool, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "AT_DOOR", 0.05)
    told: list[str] = []
    mine = fd.Joining(folder=tmp_path, pin="ab" * 32, token="t", consent="Dr Weiss", tell=told.append)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes a connection, and says nothing
        port = listening.getsockname()[1]
        if not there:
            listening.close()
        with pytest.raises(Unreachable, match=r"cannot be reached \(\w"):
            fd.join(f"https://127.0.0.1:{port}", data=DATA, settings=mine)
    assert len([line for line in told if "asked again" in line]) == again
    assert not mine.owner.consents().records(), "it was for a server that nobody has seen"


@pytest.mark.parametrize("url", ["https://", "https://localhost:99999", "https://[::1", "https://a b:1", "silo"])
def test_what_is_no_address_is_told_before_anything_is_made(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the address of a server; write https://HOST:PORT"):
        fd.join(url, data=DATA, settings=settings(tmp_path / "owner", consent="Dr Weiss"))
    assert not (tmp_path / "owner").exists()
