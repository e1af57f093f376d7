"""The clock and the scales: the same for every engine, so that the figures can be laid side by side.

- A round is timed from the end of the round before it to its own end; the figure is the median over the
  rounds after the first ones (`skip`), which hold compilation and warming up.
- Start-up runs from the start of the process that a person would start to the end of its first round.
- Each median stands beside the fastest round, beside the CPU seconds of all the engine's processes, and beside
  the share of the machine that other programs used meanwhile (`elsewhere`), since few machines are quiet.
- Memory is the highest sum over the process and all its descendants: `rss_mb` counts pages that processes
  share once for each of them (what `ps` shows), `pss_mb` counts them once.
- User lines are the lines between the marks `user code begins` and `user code ends` that are neither empty
  nor comments: what has to be written for that engine beyond the network, the loss and the data.

Standard library only. Memory needs Linux's /proc; elsewhere it is reported as 0.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from bisect import bisect
from itertools import pairwise
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
    """Collects the ends of rounds."""

    def __init__(self) -> None:
        self.start = started()
        self.ends: list[float] = []

    def end(self) -> None:
        self.ends.append(time.time())

    def kept(self, skip: int) -> list[float]:
        """The ends between which rounds count: all after the first `skip`, or the last if there are no more."""
        return self.ends[skip - 1 :] if len(self.ends) > skip else self.ends[-2:]


class Watch:
    """Looks at a process tree four times a second, from a thread: `with Watch() as watch: ...`.

    `rss_mb`, `pss_mb` and `processes` are the highest seen. `share` says what this tree and what all other
    programs took of the machine's cores: when the latter is large, so is the noise of the figures.
    """

    def __init__(self, root: int | None = None) -> None:
        self.root = os.getpid() if root is None else root
        self.rss_mb = 0.0
        self.pss_mb = 0.0
        self.processes = 0
        self._used: dict[int, float] = {}  # CPU seconds of each process, also of those that have ended
        self._looks: list[tuple[float, float, float]] = []  # time, CPU seconds of the machine, of the tree
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def share(self, begin: float, end: float) -> tuple[float, float]:
        """CPU seconds of the tree between two moments, and others' share of all cores."""
        if len(self._looks) < 2:
            return 0.0, 0.0
        (machine, ours), (machine_end, ours_end) = self._at(begin), self._at(end)
        others = (machine_end - machine) - (ours_end - ours)
        return ours_end - ours, max(0.0, others / (end - begin) / (os.cpu_count() or 1))

    def _at(self, moment: float) -> tuple[float, float]:
        """CPU seconds of the machine and of the tree at a moment, interpolated between two looks."""
        after = min(max(1, bisect(self._looks, (moment,))), len(self._looks) - 1)
        (t0, *before), (t1, *later) = self._looks[after - 1], self._looks[after]
        weight = (moment - t0) / (t1 - t0)
        machine, ours = (a + weight * (b - a) for a, b in zip(before, later, strict=True))
        return machine, ours

    def _watch(self) -> None:
        turn = 0
        while not self._stop.wait(0.25):
            family = tree(self.root)
            self.processes = max(self.processes, len(family))
            self.rss_mb = max(self.rss_mb, sum(map(_resident, family)) / 2**20)
            self._used.update({pid: used for pid in family if (used := _used(pid))})
            self._looks.append((time.time(), busy(), sum(self._used.values())))
            if turn % 8 == 4:  # walking a page table costs milliseconds
                self.pss_mb = max(self.pss_mb, sum(map(_proportional, family)) / 2**20)
            turn += 1


def busy() -> float:
    """CPU seconds that the whole machine has spent since it started, stolen ones included."""
    try:
        ticks = [int(text) for text in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait


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


def _used(pid: int) -> float:
    try:
        fields = (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def report(rounds: Rounds, watch: Watch, *, skip: int, **names: object) -> None:
    """One line of JSON on standard output, numbers rounded to what they are worth."""
    kept = rounds.kept(skip)
    lengths = [later - earlier for earlier, later in pairwise(kept)]
    used, elsewhere = watch.share(kept[0], kept[-1])
    figures = names | {
        "seconds_per_round": statistics.median(lengths),
        "fastest_round": min(lengths),
        "cpu_seconds_per_round": used / len(lengths),
        "rounds_measured": len(lengths),
        "start_to_first_round_s": rounds.ends[0] - rounds.start,
        "rss_mb": watch.rss_mb,
        "pss_mb": watch.pss_mb,
        "processes": watch.processes,
        "elsewhere": elsewhere,
    }
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)
