"""The clock and the scales: the same for every engine, so that the figures can be laid side by side.

- A round is timed from the end of the round before it to its own end; the figure is the median over the rounds
  after the first ones (`skip`), which hold compilation and warming up.
- Start-up runs from the start of the process that a person would start to the end of its first round.
- Memory is the highest sum over the process and all its descendants: `rss_mb` counts pages that processes share
  once for each of them (what `ps` shows), `pss_mb` counts them once.
- User lines are the lines between the marks `user code begins` and `user code ends` that are neither empty nor
  comments: what has to be written for that engine beyond the network, the loss and the data.

Standard library only. Memory needs Linux's /proc; elsewhere it is reported as 0.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from pathlib import Path

PROC = Path("/proc")


def started() -> float:
    """When this measurement was started, in seconds since the epoch: the launcher's word, else /proc's."""
    told = os.environ.get("BENCHMARK_STARTED")
    if told:
        return float(told)
    try:
        since_boot = float((PROC / "uptime").read_text().split()[0])
        ticks = int((PROC / "self/stat").read_text().rsplit(")", 1)[1].split()[19])
    except OSError:
        return time.time()
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


class Rounds:
    """Collects the ends of rounds. `began` marks the moment before round one (for the first round's own length)."""

    def __init__(self) -> None:
        self.start = started()
        self.ends: list[float] = []

    def end(self) -> None:
        self.ends.append(time.time())

    def lengths(self) -> list[float]:
        """Seconds of round two, three, ..."""
        return [later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)]


def steady(lengths: list[float], *, skip: int) -> float:
    """Median of the rounds after the first `skip`, or of all if there are no more than that."""
    return statistics.median(lengths[skip:] or lengths)


class Memory:
    """Watches the memory of a process tree from a thread: `with Memory() as memory: ...; memory.rss_mb`."""

    def __init__(self, root: int | None = None, *, every: float = 0.25) -> None:
        self.root = os.getpid() if root is None else root
        self.every = every
        self.rss_mb = 0.0
        self.pss_mb = 0.0
        self.processes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        turn = 0
        while not self._stop.wait(self.every):
            family = tree(self.root)
            self.processes = max(self.processes, len(family))
            self.rss_mb = max(self.rss_mb, sum(map(_resident, family)) / 2**20)
            if turn % 8 == 4:  # walking a page table costs milliseconds
                self.pss_mb = max(self.pss_mb, sum(map(_proportional, family)) / 2**20)
            turn += 1


def tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    family = [root]
    for pid in family:  # grows while we walk
        for task in _threads(pid):
            try:
                family.extend(int(child) for child in (task / "children").read_text().split())
            except OSError:
                continue
    return family


def _threads(pid: int) -> list[Path]:
    try:
        return list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _proportional(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def user_lines(*scripts: str | Path) -> int:
    """Lines of code between the marks, over all the scripts."""
    count, inside = 0, False
    for line in "\n".join(Path(script).read_text() for script in scripts).splitlines():
        text = line.strip()
        if text.startswith("# user code"):
            inside = "begins" in text
        elif inside and text and not text.startswith("#"):
            count += 1
    return count


def say(**figures: object) -> None:
    """One line of JSON on standard output, numbers rounded to what they are worth."""
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)
