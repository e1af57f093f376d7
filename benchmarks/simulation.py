"""How fast foedus is, beside the bare loop and beside its peers, all from one run on this machine.

    python benchmarks/simulation.py                       # everything; the peers must have been installed
    python benchmarks/simulation.py --no-peers            # foedus and the bare loops
    python benchmarks/simulation.py --only W1,W3          # some workloads, and the checks that belong to them
    python benchmarks/simulation.py --quick --no-peers    # few rounds, to see that it works
    python benchmarks/simulation.py --json out.json       # also keep every single measurement
    python benchmarks/peers/install.py                    # installs the peers, once

Every measurement is a process of its own. The measurements of one workload follow each other closely, and
all of it is repeated, so that a ratio compares neighbours in time; a ratio is the median over the repeats.
Before a measurement the run waits until the machine is quiet, and it measures again if other programs took
too much of the machine meanwhile (`--quiet`, `--tries`, `--patience`); what they did take is in the last column.

What is measured, and how: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workloads
from measure import busy

HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]  # one line of JSON from one measurement

ROUNDS = {"W1": 30, "W2": 16, "W3": 200, "W4": 12}
QUICK = {"W1": 6, "W2": 3, "W3": 8, "W4": 4}
PEER_ROUNDS = {
    "flower": {"W1": 12, "W2": 4, "W3": 10, "W4": 2},
    "pfl": {"W1": 24, "W2": 4, "W3": 40, "W4": 8},
    "fedjax": {"W1": 24, "W2": 3, "W3": 40, "W4": 6},
}
PEER_SCRIPTS = {"flower": "flower.py", "pfl": "pfl_research.py", "fedjax": "fedjax_.py"}
MILLION = 1_000_000
FEW = 10_000
LONGEST = 900  # seconds for one measurement


@dataclass(frozen=True)
class Job:
    """One thing to measure."""

    name: str
    workload: str
    script: str
    options: tuple[str, ...] = ()
    python: str = sys.executable
    rounds: int = 0  # 0: as many as usual for the workload
    cold: bool = False  # with an empty compile cache

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.workload


@dataclass
class Book:
    """All that has been measured: figures by (name, workload), in the order of the repeats."""

    figures: dict[tuple[str, str], list[Figures | None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, job: Job, figures: Figures | None) -> None:
        self.figures.setdefault(job.key, []).append(figures)

    def all(self, name: str, workload: str) -> list[Figures]:
        return [f for f in self.figures.get((name, workload), []) if f is not None]

    def middle(self, name: str, workload: str, figure: str) -> float | None:
        """The median of a figure over the repeats."""
        values = [float(f[figure]) for f in self.all(name, workload) if figure in f]
        return statistics.median(values) if values else None

    def highest(self, name: str, workload: str, figure: str) -> float | None:
        values = [float(f[figure]) for f in self.all(name, workload) if figure in f]
        return max(values) if values else None

    def ratios(self, name: str, other: str, workload: str, figure: str = "seconds_per_round") -> list[float]:
        """`name` over `other`, repeat by repeat."""
        pairs = zip(self.figures.get((name, workload), []), self.figures.get((other, workload), []), strict=False)
        return [a[figure] / b[figure] for a, b in pairs if a is not None and b is not None]


@dataclass(frozen=True)
class Target:
    """A wanted figure: at most (or at least) so much, and how to read what was measured from the book."""

    text: str
    workload: str
    wanted: float
    read: Callable[[Book], float | None]
    unit: str = ""
    at_least: bool = False

    def line(self, book: Book) -> str:
        sign = ">=" if self.at_least else "<="
        head = f"  {self.text:<58} wanted {sign} {self.wanted:g}{self.unit}"
        measured = self.read(book)
        if measured is None:
            return f"{head:<82} not measured"
        met = measured >= self.wanted if self.at_least else measured <= self.wanted
        return f"{head:<82} measured {measured:.3g}{self.unit}{'' if met else '   MISSED'}"


def middle(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def ratio(workload: str, wanted: float) -> Target:
    return Target(
        f"{workload}: seconds a round, relative to L",
        workload,
        wanted,
        lambda book: middle(book.ratios("foedus", "L", workload)),
    )


def start_up(workload: str) -> Target:
    return Target(
        f"{workload}: start to end of round one, warm compile cache",
        workload,
        6.0,
        lambda book: book.middle("foedus", workload, "start_to_first_round_s"),
        " s",
    )


def scaling(book: Book) -> float | None:
    """How much of the bare loop's speed-up from one to two processes foedus' executor `processes` reaches."""
    bare, ours = book.ratios("L, 1 process", "L", "W2"), book.ratios("processes, 1", "processes, 2", "W2")
    if not bare or not ours:
        return None
    return statistics.median(ours) / statistics.median(bare)


def off_by(values: list[float]) -> float | None:
    """How far the median ratio is from 1, in percent."""
    return 100 * abs(statistics.median(values) - 1) if values else None


TARGETS = [
    ratio("W1", 0.45),
    ratio("W2", 1.05),
    ratio("W3", 0.25),
    ratio("W4", 0.50),
    Target(
        "W1: a jax task, relative to the bare jit + shard_map loop",
        "W1",
        1.15,
        lambda book: middle(book.ratios("foedus, jax task", "bare jax", "W1")),
    ),
    Target("W1: memory", "W1", 1000, lambda book: book.highest("foedus", "W1", "rss_mb"), " MB"),
    start_up("W1"),
    start_up("W3"),
    Target(
        "W4: a million clients, a round's difference from 10,000",
        "W4",
        10,
        lambda book: off_by(book.ratios("foedus, 1,000,000 clients", "foedus, 10,000 clients", "W4")),
        " %",
    ),
    Target(
        "W4: a million clients, memory",
        "W4",
        1500,
        lambda book: book.highest("foedus, 1,000,000 clients", "W4", "rss_mb"),
        " MB",
    ),
    Target("W2: speed-up by a second process, relative to the bare loop's", "W2", 0.9, scaling, at_least=True),
    Target(
        "W1: Ray on a local two-node cluster, relative to processes",
        "W1",
        1.5,
        lambda book: middle(book.ratios("ray, 2 nodes", "processes, 2", "W1")),
    ),
]


def jobs(workload: str, peers: Iterable[str], *, first: bool) -> list[Job]:
    """What to measure on one workload in one repeat, in this order."""
    ours, bare = "foedus_round.py", "bare.py"
    made = [Job("foedus, cold", workload, ours, cold=True)] if first else []
    made += [
        Job("L", workload, bare),
        Job("foedus", workload, ours),
        Job("L, by hand", workload, bare, ("--by-hand",)),
    ]
    two = Job("processes, 2", workload, ours, ("--executor", "processes", "--processes", "2"))
    if workload == "W1":
        made += [
            Job("bare jax", workload, "bare_jax.py"),
            Job("foedus, jax task", workload, ours, ("--jax",)),
            two,
            Job("ray, 2 nodes", workload, ours, ("--executor", "ray")),
        ]
    if workload == "W2":
        one = ("--executor", "processes", "--processes", "1")
        made += [
            Job("L, 1 process", workload, bare, ("--processes", "1")),
            two,
            Job("processes, 1", workload, ours, one),
        ]
    if workload == "W4":
        made += [
            Job(f"foedus, {count:,} clients", workload, ours, ("--clients", str(count))) for count in (FEW, MILLION)
        ]
    if first:
        made += [peer_job(peer, workload) for peer in peers]
    return made


def peer_job(peer: str, workload: str) -> Job:
    python = HERE / "peers" / f".venv-{peer}" / "bin" / "python"
    script = f"peers/{PEER_SCRIPTS[peer]}"
    return Job(peer, workload, script, python=str(python), rounds=PEER_ROUNDS[peer][workload])


@dataclass(frozen=True)
class Laboratory:
    """How measurements are carried out."""

    quick: bool
    quiet: float
    tries: int
    patience: float
    cache: Path

    def measure(self, job: Job) -> Figures | str:
        """The figures of the least disturbed try, or what went wrong."""
        best: Figures | None = None
        for _ in range(self.tries):
            self._wait()
            found = self._once(job)
            if isinstance(found, str):
                return found
            if best is None or found["elsewhere"] < best["elsewhere"]:
                best = found
            if best["elsewhere"] <= self.quiet:
                break
        assert best is not None
        return best

    def _wait(self) -> None:
        """Until others leave the machine alone, or patience ends."""
        until = time.monotonic() + self.patience
        while True:
            before, began = busy(), time.monotonic()
            time.sleep(0.5)
            share = (busy() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
            if share <= self.quiet or time.monotonic() > until:
                return

    def _once(self, job: Job) -> Figures | str:
        if not Path(job.python).exists():
            return "not installed; run benchmarks/peers/install.py"
        count = (QUICK if self.quick else ROUNDS)[job.workload]
        count = min(job.rounds or count, count) if self.quick else job.rounds or count
        command = [job.python, str(HERE / job.script), job.workload, *job.options]
        command += ["--rounds", str(count), "--skip", str(max(1, min(3, count // 3)))]
        with tempfile.TemporaryDirectory(prefix="foedus-cold-") as empty:
            environment = self._environment(empty if job.cold else str(self.cache))
            return _run(command, environment)

    def _environment(self, cache: str) -> dict[str, str]:
        paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "XDG_CACHE_HOME": cache,
            "BENCHMARK_STARTED": str(time.time()),
            "PYTHONWARNINGS": "ignore",
            "RAY_worker_niceness": "0",  # Ray would let its workers stand back behind everything else
        }


def _run(command: list[str], environment: dict[str, str]) -> Figures | str:
    """The figures that the command prints, or the last that it said."""
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            out, err = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.communicate()
            return f"took more than {LONGEST / 60:.0f} minutes"
    for line in reversed(out.splitlines()):
        if line.startswith('{"peer"'):
            found: Figures = json.loads(line)
            return found
    return (err.strip().splitlines() or out.strip().splitlines() or ["no output"])[-1][:300]


# --- what is printed


def table(book: Book, workload: str) -> str:
    """All that was measured on one workload."""
    chosen = workloads.WORKLOADS[workload]
    heads = (
        "s/round",
        "fastest",
        "CPU s",
        "to L",
        "lowest-highest",
        "start s",
        "RSS MB",
        "PSS MB",
        "lines",
        "others",
    )
    lines = [
        f"{workload}: {chosen.network.lower()}, {chosen.clients:,} clients of {chosen.examples}, "
        f"{chosen.cohort:,} a round ({chosen.steps:,} steps)",
        f"  {'':<28}" + "".join(f"{head:>{_width(head)}}" for head in heads),
    ]
    for name, where in book.figures:
        if where == workload and name != "foedus, cold":
            lines.append(f"  {name:<28}" + _row(book, name, workload, heads))
    cold = book.middle("foedus, cold", workload, "start_to_first_round_s")
    if cold is not None:
        lines.append(f"  foedus, start to end of round one with an empty compile cache: {cold:.1f} s")
    executors = sorted({f["executor"] for f in book.all("foedus", workload)})
    if executors:
        lines.append(f"  auto chose: {', '.join(executors)}")
    return "\n".join(lines)


def _width(head: str) -> int:
    return max(9, len(head) + 2)


def _row(book: Book, name: str, workload: str, heads: tuple[str, ...]) -> str:
    found = book.all(name, workload)
    if not found:
        return "    failed (see below)"
    against_l = book.ratios(name, "L", workload)
    span = f"{min(against_l):.2f}-{max(against_l):.2f}" if len(against_l) > 1 else ""
    cells = [
        f"{book.middle(name, workload, 'seconds_per_round'):.4f}",
        f"{min(f['fastest_round'] for f in found):.4f}",
        f"{book.middle(name, workload, 'cpu_seconds_per_round'):.4f}",
        f"{statistics.median(against_l):.2f}" if against_l else "",
        span,
        f"{book.middle(name, workload, 'start_to_first_round_s'):.1f}",
        f"{book.highest(name, workload, 'rss_mb'):.0f}",
        f"{book.highest(name, workload, 'pss_mb'):.0f}",
        str(found[0].get("user_lines", "")),
        f"{100 * statistics.median(f['elsewhere'] for f in found):.0f} %",
    ]
    return "".join(f"{cell:>{_width(head)}}" for head, cell in zip(heads, cells, strict=True))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="W1,W2,W3,W4", help="workloads, e.g. W1,W3")
    parser.add_argument("--repeats", type=int, default=3, help="how often all is repeated (default 3)")
    parser.add_argument("--no-peers", action="store_true", help="without Flower, pfl and FedJAX")
    parser.add_argument("--peers", default="flower,pfl,fedjax", help="which peers, e.g. pfl,fedjax")
    parser.add_argument("--quick", action="store_true", help="few rounds; not for quoting")
    parser.add_argument("--quiet", type=float, default=0.05, help="share of the cores others may take")
    parser.add_argument("--tries", type=int, default=2, help="how often a disturbed measurement is made")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    asked = parser.parse_args()
    asked.only, asked.peers = asked.only.split(","), [] if asked.no_peers else asked.peers.split(",")
    unknown = [name for name in asked.only if name not in workloads.WORKLOADS]
    unknown += [name for name in asked.peers if name not in PEER_SCRIPTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join([*workloads.WORKLOADS, *PEER_SCRIPTS])}")
    return asked


def measure_all(asked: argparse.Namespace, laboratory: Laboratory) -> Book:
    book = Book()
    for repeat in range(asked.repeats):
        for workload in asked.only:
            for job in jobs(workload, asked.peers, first=repeat == 0):
                print(f"  repeat {repeat + 1}, {workload}, {job.name} ... ", end="", file=sys.stderr, flush=True)
                found = laboratory.measure(job)
                if isinstance(found, str):
                    print("failed", file=sys.stderr)
                    book.failures.append(f"{workload}, {job.name}: {found}")
                    book.add(job, None)
                else:
                    print(f"{found['seconds_per_round']:.4f} s a round", file=sys.stderr)
                    book.add(job, found)
    return book


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory(prefix="foedus-cache-") as cache:
        laboratory = Laboratory(asked.quick, asked.quiet, asked.tries, asked.patience, Path(cache))
        book = measure_all(asked, laboratory)
    data = "MNIST" if (Path(os.environ.get("FOEDUS_DATA", "")) / "mnist").exists() else "random data"
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {data}")
    known = {f"{f['peer']} {f['version']}" for all_ in book.figures.values() for f in all_ if f}
    print(", ".join(sorted(known)))
    for workload in asked.only:
        print("\n" + table(book, workload))
    print("\nTargets" + (" (quick run: not for quoting)" if asked.quick else ""))
    for target in TARGETS:
        if target.workload in asked.only:
            print(target.line(book))
    for failure in book.failures:
        print(f"failed: {failure}")
    if asked.json:
        kept = [
            {"name": name, "workload": workload, "figures": figures}
            for (name, workload), figures in book.figures.items()
        ]
        asked.json.write_text(json.dumps({"measurements": kept, "failures": book.failures}, indent=1))


if __name__ == "__main__":
    main()
