"""What is shown while running: lines in a pipe, bars in a terminal, rounds into sinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import foedus as fd
from foedus.sim.progress import Live, announce, into_sinks, progress, steps

from ..report.records import clients, record, settings, task


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.opened: list[Path] = []
        self.rounds: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def open(self, folder: Path, configuration: Mapping[str, Any]) -> Kept:
        self.opened.append(folder)
        self.configuration = configuration
        return self

    def write(self, round: int, figures: Mapping[str, float], *, at: float) -> None:
        self.rounds.append((round, dict(figures)))

    def close(self) -> None:
        self.closed += 1


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """rich's own way to be told that the output is a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    yield


def test_a_live_run_goes_into_its_sinks(tmp_path: Path) -> None:
    kept = Kept()
    run = fd.simulate(
        task(), fd.fedavg(fd.local_sgd(0.1)), clients(), rounds=3, settings=settings(tmp_path, sinks=[kept])
    )
    assert kept.opened == [tmp_path]
    assert kept.closed == 1
    assert kept.configuration["rounds"] == 3
    assert [n for n, _ in kept.rounds] == [1, 2, 3]
    for (_, figures), line in zip(kept.rounds, run.metrics, strict=True):
        assert figures["central/accuracy"] == line["central"]["accuracy"]
        assert figures["timing/seconds"] > 0


def test_sinks_are_closed_when_the_run_fails(tmp_path: Path) -> None:
    kept = Kept()
    with pytest.raises(RuntimeError), progress(False, 3, 0) as bar, into_sinks(bar, [kept], tmp_path, {}):
        raise RuntimeError
    assert kept.closed == 1


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


def test_a_terminal_gets_a_bar_and_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
