"""What is shown while running: lines in a pipe, bars in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from foedus.sim.progress import Live, announce, progress, steps

from ..report.records import record


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """rich's own way to be told that the output is a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    yield


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    lines = record([0.25] * 100).metrics
    with progress(True, 100, 0) as shown:
        for line in lines:
            shown.advance(line, 0.5)
        shown.say("done")
    told = capsys.readouterr().err.splitlines()
    assert 2 <= len(told) <= 12
    assert "round 100, clients 2/2" in told[-2]
    assert "test accuracy 0.25" in told[-2]
    assert "sent 1 kB" in told[-2]
    assert told[-1] == "foedus: done"


def test_a_terminal_gets_a_bar_and_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch), progress(True, 12, 0) as shown:
        assert isinstance(shown, Live)
        for line in record([0.25] * 12).metrics:
            shown.advance(line, 0.5)
        shown.say("[not markup]")
    told = capsys.readouterr().out
    assert "12/12" in told
    assert "test accuracy" in told
    assert "[not markup]" in told


def test_steps_and_headings_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    announce(True, "Part one")
    announce(False, "unseen")
    with steps(True, 2, "runs") as done:
        done("first")
        done("second")
    with steps(False, 2, "runs") as done:
        done("unseen")
    assert capsys.readouterr().err.splitlines() == ["foedus: Part one", "foedus: first", "foedus: second"]


def test_steps_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch), steps(True, 2, "runs") as done:
        done("lr=[0.1]")
        done("second")
    told = capsys.readouterr().out
    assert "lr=[0.1]" in told
    assert "2/2" in told
