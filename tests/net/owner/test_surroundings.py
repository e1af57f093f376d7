"""Surroundings, from what real operating systems say, and on this one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from foedus.net.owner import surroundings
from foedus.net.owner.surroundings import Surroundings, metered, observe, on_power, said


def supplies(folder: Path, **given: dict[str, str]) -> Path:
    for name, files in given.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_text(content + "\n")
    return folder


MAINS, BATTERY = {"type": "Mains"}, {"type": "Battery"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, True),
        ({"AC": MAINS | {"online": "1"}, "BAT0": BATTERY | {"status": "Charging"}}, True),
        ({"AC": MAINS | {"online": "0"}, "BAT0": BATTERY | {"status": "Discharging"}}, False),
        ({"BAT0": BATTERY | {"status": "Discharging"}}, False),
        ({"BAT0": BATTERY | {"status": "Full"}}, True),
        ({"BAT0": BATTERY | {"status": "Unknown"}}, None),
        ({"BAT0": BATTERY | {"status": "Discharging"}, "usb": {"type": "USB", "online": "1"}}, True),
        ({"mouse": BATTERY | {"status": "Discharging", "scope": "Device"}}, True),
    ],
)
def test_power_by_what_linux_says(tmp_path: Path, given: dict[str, dict[str, str]], found: bool | None) -> None:
    assert on_power(supplies(tmp_path, **given)) is found


def machine(**says: str):
    return lambda command: says.get(command[0])


DEVICES = "GENERAL.STATE:{}\nGENERAL.METERED:{}\n\nGENERAL.STATE:30 (disconnected)\nGENERAL.METERED:yes\n"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ({}, None),
        ({"busctl": "u 1\n"}, True),
        ({"busctl": "u 4\n"}, False),
        ({"busctl": "u 0\n"}, None),
        ({"busctl": "", "nmcli": DEVICES.format("100 (connected)", "no (guessed)")}, False),
        ({"nmcli": DEVICES.format("100 (connected)", "yes")}, True),
        ({"nmcli": DEVICES.format("100 (connected)", "unknown")}, None),
        ({"nmcli": DEVICES.format("20 (unavailable)", "no")}, None),
    ],
)
def test_metered_networks_by_what_network_manager_says(says: dict[str, str], found: bool | None) -> None:
    assert metered(machine(**says)) is found


def test_idle_by_what_logind_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_by_terminals", lambda: 500.0)
    monkeypatch.setattr(surroundings.time, "time", lambda: 1000.0)

    def run(hint: str, since: int, sessions: str | None):
        def say(command: Sequence[str]) -> str | None:
            if command[0] == "loginctl":
                return sessions
            return f"b {hint}" if command[-1] == "IdleHint" else f"t {since}"

        return say

    assert surroundings._idle_linux(run("true", 900_000_000, None)) == 100.0
    assert surroundings._idle_linux(run("false", 0, "1 1000 anna seat0 tty2")) == 0.0
    assert surroundings._idle_linux(run("false", 0, "")) == 500.0
    assert surroundings._idle_linux(machine()) == 500.0


def test_this_machine_can_be_looked_at() -> None:
    found = observe()
    assert isinstance(found, Surroundings)
    assert found.idle_seconds is None or 0 <= found.idle_seconds < math.inf


def test_a_command_that_is_not_there_or_fails_says_nothing() -> None:
    assert said(["foedus-no-such-command"]) is None
    assert said(["false"]) is None
