"""The example's commands as processes: a server and its clients, to be killed by whoever tests."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import foedus as fd

EXAMPLE = Path(__file__).parents[2] / "examples" / "hospitals_network.py"


class Commands:
    """Processes in a folder, ended with it."""

    def __init__(self, folder: Path, change: Callable[[str], str] = lambda source: source) -> None:
        self.folder, self.stack = folder, ExitStack()
        (folder / EXAMPLE.name).write_text(change(EXAMPLE.read_text("utf-8")), "utf-8")
        self.server: subprocess.Popen[bytes] | None = None
        self.at: Callable[[str], Sequence[str]] = lambda name: ()  # words before a command: where it runs
        nothing = str(folder / "nothing")
        self.environment = os.environ | {"FOEDUS_DATA": nothing, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}

    def begin(
        self, name: str, *words: str, code: str = "from foedus.cli import main; main()"
    ) -> subprocess.Popen[bytes]:
        """Start a command; what it says goes to a file of its name."""
        told = self.stack.enter_context((self.folder / f"{name}.out").open("ab"))
        command = [*self.at(name), sys.executable, "-c", code, *words]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=told, stderr=subprocess.STDOUT
        )
        self.stack.callback(process.wait, 30)
        self.stack.callback(process.kill)
        return process

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def until(self, holds: Callable[[], Any], what: str, *, seconds: float = 120) -> Any:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := holds():
                return found
            time.sleep(0.05)
        said = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.out"))
        raise AssertionError(f"{what} took over {seconds} s\n{said}")

    def serve(self, *more: str) -> list[str]:
        """Start the server; the words of the join command."""
        self.server = self.begin("server", "serve", EXAMPLE.name, "--minimum", "4", "--port", "0", "--quiet", *more)
        pattern = r"foedus join (\S+) (--pin \S+ --token \S+)[^\n]*\n\nthe task they are asked to approve: (\w+)"
        found = self.until(lambda: re.search(pattern, self.said("server")), "the server's start")
        return ["join", found[1], *found[2].split(), "--approve", found[3]]

    def simulated(self) -> fd.Record:
        """What would have been, had it all happened in one process."""
        found = runpy.run_path(str(self.folder / EXAMPLE.name))
        federation = found["federation"]
        settings = fd.Settings(folder=self.folder / "run", executor=fd.executors.debug(), progress=False)
        return fd.simulate(
            federation.task, federation.algorithm, found["clients"](), rounds=federation.rounds, settings=settings
        )

    def hospital(self, join: list[str], part: int, **how: Any) -> subprocess.Popen[bytes]:
        """Start a client."""
        mine = ["--data", f"{EXAMPLE.name}:clients", "--part", str(part), "--folder", f"hospital{part}"]
        process = self.begin(f"hospital{part}", *join, *mine, "--consent", "Dr Weiss", **how)
        # Positions are counted in the order of enrolment; in the simulation, in that of the data.
        joined = f"hospital{part}/servers/*/identity/joined.json"
        self.until(lambda: list(self.folder.glob(joined)), f"joining of hospital {part}")
        return process


@contextmanager
def with_changes(folder: Path, changes: Mapping[str, str]) -> Iterator[Commands]:
    """The example with some of its texts replaced, each of which is in it."""

    def changed(source: str) -> str:
        for before, after in changes.items():
            assert before in source
            source = source.replace(before, after)
        return source

    found = Commands(folder, changed)
    with found.stack:
        yield found
