"""A live progress bar and table in a terminal or notebook; a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from foedus.record.export import Sink, Stream, figures
from foedus.report.tables import bytes_shown

LATEST = 8  # rows of the live table


class Progress(Protocol):
    """What the engine tells about its progress."""

    def advance(self, line: dict[str, Any], seconds: float) -> None:
        """A round is done; ``line`` is its line of metrics.jsonl."""

    def say(self, text: str) -> None:
        """One line to the user."""


class Silent:
    """No output."""

    def advance(self, line: dict[str, Any], seconds: float) -> None: ...

    def say(self, text: str) -> None: ...


class Lines:
    """For logs and pipes: a line whenever another tenth of the rounds is done, at most one a second."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._shown, self._at = rounds, 0, 0.0

    def advance(self, line: dict[str, Any], seconds: float) -> None:
        number, now = line["round"], time.monotonic()
        if number < self._rounds and (number - self._shown < self._rounds / 10 or now - self._at < 1):
            return
        self._shown, self._at = number, now
        figures = ", ".join(f"{name} {value}" for name, value in _row(line, seconds).items() if value)
        self.say(f"{figures} (of {self._rounds})")

    def say(self, text: str) -> None:
        print(f"foedus: {text}", file=sys.stderr, flush=True)


class Live:
    """For people: rich's progress bar above a table of the latest evaluated rounds."""

    def __init__(self, rounds: int, done: int) -> None:
        from rich.live import Live as RichLive

        self._bar = _bar()
        self._task = self._bar.add_task("rounds", total=rounds, completed=done)
        self._rows: list[dict[str, str]] = []
        self.live = RichLive(self._bar, refresh_per_second=8, transient=False)
        self._drawn = 0.0

    def advance(self, line: dict[str, Any], seconds: float) -> None:
        self._bar.update(self._task, completed=line["round"])
        self._rows = [*self._rows, _row(line, seconds)][-LATEST:]
        if time.monotonic() - self._drawn > 0.1 or self._bar.finished:
            self.live.update(self._screen())
            self._drawn = time.monotonic()

    def _screen(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in self._rows[-1]:
            table.add_column(name, justify="right")
        for row in self._rows:
            table.add_row(*(row.get(name, "") for name in self._rows[-1]))
        return Group(self._bar, table)

    def say(self, text: str) -> None:
        self.live.console.print(text, style="cyan", markup=False, highlight=False)


def _bar() -> Any:
    from rich import progress as rich

    done = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    return rich.Progress(*done, rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn())


def _row(line: dict[str, Any], seconds: float) -> dict[str, str]:
    row = {"round": str(line["round"]), "clients": f"{line['trained']}/{line['cohort']}"}
    figures = {"train loss": line["train_loss"]}
    figures |= {f"test {k}": v for k, v in line.get("central", {}).items()}
    clients = line.get("clients", {})
    figures |= {f"worst decile {k}": v.get("worst_decile") for k, v in clients.items() if k != "loss"}
    row |= {name: "" if value is None else f"{value:.4g}" for name, value in figures.items()}
    row["sent"] = bytes_shown(line["bytes_up"])
    if "simulated" in line:
        row["simulated"] = f"{line['simulated']['elapsed_seconds']:.0f} s"
    if line.get("refused"):
        row["refused"] = str(len(line["refused"]))
    row["s"] = f"{seconds:.2f}"
    return row


@contextmanager
def progress(wanted: bool, rounds: int, done: int) -> Iterator[Progress]:
    """The progress display that suits where the output goes."""
    if not wanted:
        yield Silent()
        return
    from rich.console import Console

    if not (Console().is_terminal or Console().is_jupyter):
        yield Lines(rounds)
        return
    shown = Live(rounds, done)
    with shown.live:
        yield shown


@contextmanager
def steps(wanted: bool, total: int, name: str) -> Iterator[Callable[[str], None]]:
    """A bar over a few large steps, such as whole runs; the function given tells that one is done, and how."""
    from rich.console import Console

    if not wanted:
        yield lambda text: None
    elif Console().is_terminal or Console().is_jupyter:
        with _bar() as bar:
            task = bar.add_task(name, total=total)

            def tell(text: str) -> None:
                bar.console.print(text, markup=False, highlight=False)
                bar.advance(task)

            yield tell
    else:
        yield lambda text: print(f"foedus: {text}", file=sys.stderr, flush=True)


def announce(wanted: bool, text: str) -> None:
    """A heading above what follows."""
    from rich.console import Console

    if wanted and (Console().is_terminal or Console().is_jupyter):
        Console().print(f"\n{text}", style="bold", markup=False, highlight=False)
    elif wanted:
        print(f"foedus: {text}", file=sys.stderr, flush=True)


@contextmanager
def into_sinks(
    shown: Progress, sinks: Sequence[Sink], folder: Path, configuration: Mapping[str, Any]
) -> Iterator[Progress]:
    """The same display, with every round also written into the sinks.

    A sink that cannot be opened is an error, before anything is computed. One that fails later is warned of, and
    gets no more: the run goes on, since all that it is to show is in the run folder.
    """
    with ExitStack() as closing:
        feeds = []
        for sink in sinks:
            feeds.append(feed := _Feed(sink, folder, configuration))
            closing.callback(feed.close)
        yield _Tee(shown, feeds) if feeds else shown


class _Feed:
    """One sink, until it fails."""

    def __init__(self, sink: Sink, folder: Path, configuration: Mapping[str, Any]) -> None:
        self._sink, self._folder = sink, folder
        self._stream: Stream | None = sink.open(folder, configuration)

    def write(self, round: int, numbers: Mapping[str, float]) -> None:
        if self._stream is not None:
            with self._guarded(f"in round {round}"):
                self._stream.write(round, numbers, at=time.time())

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with self._guarded("at its end"):
                stream.close()

    @contextmanager
    def _guarded(self, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            warnings.warn(
                f"{self._sink!r} failed {when} ({type(error).__name__}: {error}) and gets no more of this run, which "
                f"goes on. Everything is in {self._folder}; `foedus export` writes it into a sink at any time",
                stacklevel=2,
            )
            stream, self._stream = self._stream, None
            if stream is not None:
                with suppress(Exception):
                    stream.close()


class _Tee:
    def __init__(self, shown: Progress, feeds: Sequence[_Feed]) -> None:
        self._shown, self._feeds = shown, feeds

    def advance(self, line: dict[str, Any], seconds: float) -> None:
        numbers = figures(line, {"seconds": seconds})
        for feed in self._feeds:
            feed.write(line["round"], numbers)
        self._shown.advance(line, seconds)

    def say(self, text: str) -> None:
        self._shown.say(text)
