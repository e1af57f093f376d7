"""The doctor: what works is what ran, and an executor that crashes or hangs is a finding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from foedus.cli import doctor, run
from foedus.sim.executors import BY_NAME
from foedus.sim.probe import devices, probe


def test_a_missing_package_comes_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", ("fancy", "something"))
    row = next(r for r in doctor.installed() if r[""] == "no-such-package")
    assert row == {"": "no-such-package", "version": "-", "for": "something: pip install 'foedus[fancy]'"}
    assert next(r for r in doctor.installed() if r[""] == "python")["version"].startswith("3.")


@pytest.mark.slow
def test_a_probe_compares_with_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from foedus.sim import probe as module

    assert probe("debug").works
    real = module._tiny
    monkeypatch.setattr(module, "_tiny", lambda name: real("debug") * (1.01 if name == "vectorised" else 1.0))
    found = probe("vectorised")
    assert not found.works
    assert "differ" in found.told


def test_an_unknown_executor_is_a_finding() -> None:
    found = probe("warp")
    assert not found.works
    assert "no executor is named 'warp'" in found.told


SCRIPT = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "crash":
        os._exit(3)
    if name == "hang":
        time.sleep(60)
    print(json.dumps({"name": name, "works": True, "told": "", "missing": None}), flush=True)
"""


@pytest.mark.slow
def test_a_crash_or_a_hang_is_blamed_on_who_did_it_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(doctor, "PROBE", (sys.executable, str(tmp_path / "script.py")))
    monkeypatch.setattr(doctor, "SECONDS", 5.0)
    found = {f.name: f for f in doctor.examine(["one", "crash", "two", "hang", "three"])}
    assert [f.works for f in found.values()] == [True, False, True, False, True]
    assert "exit code 3" in found["crash"].told
    assert "5 s" in found["hang"].told


@pytest.mark.slow
def test_the_whole_examination(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is installed here, so every executor must work."""
    code = run(["doctor"])
    told = capsys.readouterr().out
    assert code == 0, told
    for name in set(BY_NAME) - {"auto"}:
        rest = told.partition("Executors")[2]
        assert next(line for line in rest.splitlines() if line.split()[:1] == [name]).split()[1] == "works", told
    assert "another: set FOEDUS_DATA" in told


@pytest.mark.slow
def test_devices_are_those_that_the_frameworks_see() -> None:
    found = devices()
    assert found["torch"][0] == "cpu"
    assert all(isinstance(name, str) for names in found.values() for name in names)
    assert json.loads(json.dumps(found)) == found
