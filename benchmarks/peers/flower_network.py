"""Rounds by Flower's SuperLink and SuperNodes, each a process with those that it starts, over loopback.

    python benchmarks/peers/flower_network.py NODES ROUNDS ENTRIES

prints a line of JSON: seconds from one commit to the next, bytes of memory of a node at rest and at most in a round,
and of the SuperLink. Run by our own Python, since Flower's environment has no psutil; started by ``network.py``. Its
clients send back what they are sent (``flower_echo``). There is no TLS and nobody proves who it is, which is to
Flower's advantage.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
BIN = HERE / ".venv-flower" / "bin"
PATIENCE = 900.0


def environment(folder: Path) -> dict[str, str]:
    own = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "PATH": f"{BIN}:{os.environ['PATH']}"}


@contextmanager
def running(folder: Path, name: str, *words: str) -> Iterator[psutil.Process]:
    """A command, ended together with whatever it has started."""
    with (folder / "log").open("ab") as log:
        process = psutil.Popen([str(BIN / name), *words], env=environment(folder), stdout=log, stderr=log)
    try:
        yield process
    finally:
        tree = family(process)
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=15)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and those that it has started."""
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def memory(process: psutil.Process) -> int:
    """Bytes of a process and of those that it has started."""
    found = 0
    for each in family(process):
        with suppress(psutil.NoSuchProcess):
            found += each.memory_info().rss
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} took over {PATIENCE:.0f} s")
        time.sleep(0.25)


def measured(folder: Path, nodes: int, rounds: int, entries: int) -> dict[str, object]:
    port, ports, times = free_port(), [free_port() for _ in range(nodes)], folder / "times"
    times.touch()
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    told = f'nodes={nodes} rounds={rounds} entries={entries} times="{times}"'
    with ExitStack() as stack:
        link = running(folder, "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                       "--port", str(port))  # fmt: skip
        server = stack.enter_context(link)
        wait(lambda: listens(port), "the SuperLink's start")
        super_node = ("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port")
        first, *_ = [stack.enter_context(running(folder, *super_node, str(own))) for own in ports]
        wait(lambda: all(listens(own) for own in ports), "the SuperNodes' start")
        time.sleep(2.0)
        rest, peak, most = memory(first), 0, 0
        command = [str(BIN / "flwr"), "run", str(HERE / "flower_echo"), "here", "--run-config", told]
        subprocess.run(command, env=environment(folder), check=True, capture_output=True)

        def over() -> bool:
            nonlocal peak, most
            peak, most = max(peak, memory(first)), max(most, memory(server))
            return len(times.read_text().splitlines()) > rounds

        wait(over, f"{rounds} rounds of {nodes} nodes")
    at = [float(line.split()[1]) for line in times.read_text().splitlines()][1:]  # the first is before any round
    periods = [b - a for a, b in itertools.pairwise(at)]
    return {"commit to commit": periods, "node at rest": rest, "node at most": peak, "link at most": most}


def main() -> None:
    nodes, rounds, entries = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="flower-network-") as folder:
        print(json.dumps(measured(Path(folder), nodes, rounds, entries)))


if __name__ == "__main__":
    main()
