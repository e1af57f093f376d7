"""One server process for ``network.py``: a linear model of a given size, clients enrolled, tickets in a file.

    python benchmarks/network_server.py '{"folder": "...", "size": 199210, "clients": 10, ...}'

It prints one line of JSON once it listens, and ends when the run is over or it is told to. The server is the whole one:
TLS, the door, the coordinator with its database on a disk, the gate, exact sums, the run folder.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import foedus as fd
from foedus.net.identity.callers import TRAIN, Caller
from foedus.net.serve import Server, blocking
from foedus.net.served import Rounds, Served
from foedus.net.serving import Serving


def main() -> None:
    told = json.loads(sys.argv[1])
    began = time.perf_counter()
    server = Server([run(told)], settings(told))
    if told.get("enrol", True):
        enrol(server, told["clients"])
    threading.Thread(target=announce, args=(server, began), daemon=True).start()
    blocking(server)
    server.close()


def run(told: dict[str, Any]) -> Served:
    task = fd.Task(fd.logistic(told["size"] // 10 - 1, 10))
    each = Rounds(minimum=min(3, told["cohort"]), window=600.0, deadline=900.0, clients=told["clients"])
    algorithm = fd.fedavg(fd.local_sgd(0.1))
    cohort = None if told["cohort"] == told["clients"] else told["cohort"]
    return Served(name="run", task=task, algorithm=algorithm, rounds=told["rounds"], cohort=cohort, each=each)


def settings(told: dict[str, Any]) -> Serving:
    return Serving(
        folder=told["folder"],
        port=told.get("port", 0),
        progress=False,
        names=["localhost"],
        insecure_loopback=told.get("plain", False),
        stay=told.get("stay", False),
        farewell=60.0,
        database=told.get("database"),
        uploads=told.get("uploads", 1 << 28),
    )


def enrol(server: Server, count: int) -> None:
    """As many clients as are wanted, with tickets for a day."""
    now = time.time()
    with server.store.begin() as rows:
        for number in range(len(rows.clients()), count):
            client = rows.enrol(f"c{number}", number.to_bytes(32, "big"), now)
            rows.put_client(client._replace(examples=10, silo=False))
    callers = [Caller(number, f"c{number}", TRAIN) for number in range(count)]
    tickets = [server.access.mint(caller, now=now, lifetime_s=86400) for caller in callers]
    path = Path(server.settings.folder) / "tickets.json"
    path.write_text(json.dumps(tickets))
    path.chmod(0o600)


def announce(server: Server, began: float) -> None:
    while not server.uvicorn.started:
        time.sleep(0.005)
    certificate = str(server.authority.folder / "authority.pem")
    told = {"port": server.port, "authority": certificate, "seconds": time.perf_counter() - began}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
