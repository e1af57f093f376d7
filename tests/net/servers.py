"""A server in a process of its own, that a test can kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE = """
import json, resource, sys
from pathlib import Path
import foedus as fd
from foedus.net import logs
from foedus.net.serve import Server, blocking
from foedus.net.served import Keeping, Rounds, Served
from foedus.net.serving import Serving
told = json.loads(sys.argv[1])
if told["bytes"]:
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (told["bytes"], told["bytes"]))
logs.to_stream(open(told["log"], "a"))
task = fd.Task(fd.logistic(5, 3, dtype="float64"))
algorithm = fd.fedavg(fd.local_sgd(lr=0.1, epochs=1, batch_size=4), server=fd.adam(lr=0.01))
served = Served(name="run", task=task, algorithm=algorithm, rounds=told["rounds"], seed=2, each=Rounds(clients=4),
                keeping=Keeping(told["keeping"]))
server = Server([served], Serving(folder=told["folder"], port=told["port"], insecure_loopback=True, progress=False,
                                  database=told["database"], blobs=told["blobs"], farewell=5.0))
Path(told["token"]).exists() or Path(told["token"]).write_text(server.authority.pin + " " + server.invite())
blocking(server)
server.close()
"""


class Process:
    """``python -c`` with a server in it."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self.told = {
            "folder": str(folder), "port": 0, "database": None, "blobs": None, "rounds": 3, "bytes": 0,
            "log": str(folder) + ".log", "token": str(folder) + ".token", "keeping": "ephemeral",
        } | how  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.told['port']}"

    def start(self) -> Process:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen([sys.executable, "-c", CODE, json.dumps(self.told)], env=environment)
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def events(self, name: str) -> list[dict[str, Any]]:
        path = Path(self.told["log"])
        lines = path.read_text().splitlines() if path.exists() else []
        return [told for told in map(json.loads, lines) if told["event"] == name]


def until(true: Callable[[], Any], *, seconds: float = 60.0) -> float:
    """Wait for something; how long it took."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, "it does not happen"
        time.sleep(0.01)
    return time.monotonic() - begin
