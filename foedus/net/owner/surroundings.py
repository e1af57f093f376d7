"""What the machine's surroundings are: is it idle, on power, on a network that is paid for by volume?

Found out by the operating system's own means: power supplies under ``/sys``, NetworkManager over D-Bus or ``nmcli``,
logind, terminals; on other systems by ``psutil``, ``ioreg`` and Windows' own functions. ``None`` is "cannot be found
out"; a rule that asks for it then does not pass. Another way of finding out is any function that gives
:class:`Surroundings`.

Not here: what follows from it (``rules.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Surroundings", "observe"]

Run = Callable[[Sequence[str]], "str | None"]  # a command → what it says; None if it is not there or fails

_METERED = {"1": True, "2": False, "3": True, "4": False}  # NetworkManager's NMMetered; 3 and 4 are its guesses
_MANAGER = "org.freedesktop.NetworkManager"
_LOGIN = "org.freedesktop.login1"


class Surroundings(NamedTuple):
    """What was found out; ``None`` for what was not.

    Attributes:
        idle_seconds: for how long nobody has used the machine.
        on_power: whether it is plugged in; a machine without a battery is.
        metered: whether the network is paid for by volume.
    """

    idle_seconds: float | None = None
    on_power: bool | None = None
    metered: bool | None = None


def observe() -> Surroundings:
    """The surroundings now, by the operating system's own means."""
    return Surroundings(idle_seconds(), on_power(), metered())


def said(command: Sequence[str]) -> str | None:
    """What a command of the operating system prints; ``None`` if it is not there, fails, or takes over 5 s."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


# --- power --------------------------------------------------------------------------------------------------


def on_power(folder: Path = Path("/sys/class/power_supply")) -> bool | None:
    """Whether the machine is plugged in."""
    if folder.is_dir():
        return _supplied(folder)
    import psutil

    battery = getattr(psutil, "sensors_battery", lambda: None)()
    plugged: bool | None = True if battery is None else battery.power_plugged
    return plugged


def _supplied(folder: Path) -> bool | None:
    """By Linux's power supplies: one that is online, or no battery of the machine itself at all."""
    batteries: list[str] = []
    for supply in sorted(folder.iterdir()):
        kind, online = _line(supply / "type"), _line(supply / "online")
        if kind in ("Mains", "USB", "Wireless", "UPS") and online == "1":
            return True
        if kind == "Battery" and _line(supply / "scope") != "Device":  # a mouse's battery is not the machine's
            batteries.append(_line(supply / "status"))
    if not batteries:
        return True
    if any(status in ("Charging", "Full", "Not charging") for status in batteries):
        return True
    return False if any(status == "Discharging" for status in batteries) else None


def _line(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


# --- network ------------------------------------------------------------------------------------------------


def metered(run: Run = said) -> bool | None:
    """Whether the network in use is paid for by volume, as NetworkManager knows or guesses."""
    told = run(["busctl", "get-property", _MANAGER, f"/{_MANAGER.replace('.', '/')}", _MANAGER, "Metered"])
    if told is not None and (found := _METERED.get(told.split()[-1] if told.split() else "")) is not None:
        return found
    told = run(["nmcli", "-t", "-f", "GENERAL.STATE,GENERAL.METERED", "device", "show"])
    return None if told is None else _of_devices(told)


def _of_devices(told: str) -> bool | None:
    """Of what nmcli says of each device: metered if any that is connected is; known only if all are."""
    states = re.findall(r"^GENERAL\.STATE:(\d+)", told, re.MULTILINE)
    answers = re.findall(r"^GENERAL\.METERED:(\w+)", told, re.MULTILINE)
    used = [answer for state, answer in zip(states, answers, strict=False) if state == "100"]
    if any(answer == "yes" for answer in used):
        return True
    return False if used and all(answer == "no" for answer in used) else None


# --- use ----------------------------------------------------------------------------------------------------


def idle_seconds(run: Run = said) -> float | None:
    """For how long nobody has used the machine."""
    if sys.platform == "win32":
        return _idle_windows()
    if sys.platform == "darwin":
        told = run(["ioreg", "-c", "IOHIDSystem", "-d", "4"]) or ""
        found = re.search(r'"HIDIdleTime" = (\d+)', told)
        return None if found is None else int(found[1]) / 1e9
    return _idle_linux(run)


def _idle_linux(run: Run) -> float | None:
    """By logind, for sessions with a screen, and by the terminals that people write in; the most recent use counts."""
    found = [idle for idle in (_by_logind(run), _by_terminals()) if idle is not None]
    return min(found) if found else None


def _by_logind(run: Run) -> float | None:
    """``None`` without logind; infinity where it has no session at all."""
    path = f"/{_LOGIN.replace('.', '/')}"
    told = run(["busctl", "get-property", _LOGIN, path, f"{_LOGIN}.Manager", "IdleHint"])
    if told is None:
        return None
    if "true" not in told:
        sessions = run(["loginctl", "list-sessions", "--no-legend"])
        return 0.0 if sessions is None or "seat" in sessions else None
    since = run(["busctl", "get-property", _LOGIN, path, f"{_LOGIN}.Manager", "IdleSinceHint"]) or ""
    digits = since.split()[-1] if since.split() else ""
    return max(0.0, time.time() - int(digits) / 1e6) if digits.isdigit() and int(digits) else None


def _by_terminals() -> float | None:
    """Since somebody wrote in a terminal; where nobody is logged in, since the machine was started."""
    import psutil

    moments: list[float] = [psutil.boot_time()]
    for user in psutil.users():
        if user.terminal:
            with contextlib.suppress(OSError):
                moments.append(os.stat(f"/dev/{user.terminal}").st_atime)
    return max(0.0, time.time() - max(moments))


def _idle_windows() -> float | None:  # pragma: no cover
    import ctypes

    class LastInput(ctypes.Structure):
        _fields_ = (("size", ctypes.c_uint), ("moment", ctypes.c_uint))

    windows = getattr(ctypes, "windll", None)
    last = LastInput(ctypes.sizeof(LastInput), 0)
    if windows is None or not windows.user32.GetLastInputInfo(ctypes.byref(last)):
        return None
    return float((windows.kernel32.GetTickCount() - last.moment) % 2**32) / 1000
