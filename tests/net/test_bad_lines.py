"""Agents behind a line that delays, loses, cuts, stalls, damages, throttles: nothing is lost, the bits are the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.net.identity import visits
from foedus.net.served import Rounds
from foedus.record.folder import read

from .joins import each
from .lines import Line, Weather
from .lines import opened as line
from .test_serve import serving
from .trainees import Trainee

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SIZE = 4000
SOURCE = f"""
import foedus as fd

class federation:
    task = fd.Task(fd.logistic({SIZE}, 2))
    algorithm = fd.fedavg(fd.local_sgd(0.1, batch_size=4))
"""
RNG = np.random.default_rng(0)
DATA = {i: (RNG.normal(size=(6 + i, SIZE)).astype(np.float32), RNG.integers(0, 2, 6 + i)) for i in range(3)}
TASK = fd.Task(fd.logistic(SIZE, 2))
FEDAVG = fd.fedavg(fd.local_sgd(0.1, batch_size=4))

# What the line does, and for how many seconds without a byte a client waits there.
WEATHER = {
    "far away, a fifth lost": (Weather(delay_s=0.1, loss=0.2), 60.0),
    "narrow": (Weather(delay_s=0.02, rate=200e3), 60.0),
    "cuts": (Weather(reset=0.02), 60.0),
    "damages": (Weather(damage=0.02), 60.0),
    "stalls": (Weather(stall=0.01), 1.0),
}


@pytest.mark.parametrize("name", WEATHER)
def test_nothing_is_lost_and_the_bits_are_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weather, patience = WEATHER[name]
    monkeypatch.setattr(visits, "PATIENCE", patience)
    monkeypatch.setattr(visits, "AT_DOOR", patience)
    source = tmp_path / "task.py"
    source.write_text(SOURCE)
    trainee = Trainee(TASK, FEDAVG, fd.Clients.of(DATA), seed=2)
    how = {
        "rounds": 2,
        "each": Rounds(minimum=3, clients=3, window=120.0, deadline=120.0),
        "source": source,
        "target": "task:federation",
    }
    begun = time.monotonic()
    with serving(tmp_path / "server", trainee, **how) as server, line(bad := Line(server.port, weather, seed=5)):
        digest = server.address().tasks[0]

        def join(part: int) -> fd.Joined:
            settings = fd.Joining(
                folder=tmp_path / f"owner{part}", pin=server.authority.pin, token=server.invite(), consent="x",
                approve=[digest], tell=lambda _: None,
            )  # fmt: skip
            end = time.monotonic() + 100
            while part and not list(tmp_path.glob(f"owner{part - 1}/servers/*/identity/joined.json")):
                assert time.monotonic() < end, f"{part - 1} does not join"
                time.sleep(0.02)  # positions are given in the order of joining
            while True:  # until it has joined; then the agent itself does not give up
                try:
                    return fd.join(f"https://localhost:{bad.port}", data=DATA[part], settings=settings)
                except fd.errors.Unreachable:
                    assert time.monotonic() < end, f"{part} does not join"

        joined = each(join, list(DATA), seconds=150.0)
    print(f"\n{name}: {time.monotonic() - begun:.1f} s, {dict(bad.seen)}, {[one.sessions for one in joined]}")
    for what, share in zip(("lost", "reset", "stalled", "damaged"), weather.shares, strict=True):
        assert (bad.seen[what] > 0) == (share > 0), "the line was as bad as it was to be"
    settings = fd.Settings(folder=tmp_path / "run", executor=fd.executors.debug(), progress=False)
    wanted = fd.simulate(TASK, FEDAVG, fd.Clients.of(DATA), rounds=2, seed=2, settings=settings)
    found = read(tmp_path / "server" / "runs" / "run")
    for parameter, array in wanted.parameters.items():
        np.testing.assert_array_equal(found.parameters[parameter], array)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_where_the_kernel_itself_loses_a_fifth_and_is_200_ms_away() -> None:
    """The same in a network namespace whose packets are lost and late below TCP: ``netem``."""
    emulated = "ip link set lo up && tc qdisc add dev lo root netem delay 100ms loss 20%"
    if any(shutil.which(name) is None for name in ("unshare", "ip", "tc")):
        pytest.skip("needs unshare, ip and tc (util-linux, iproute2)")
    tried = subprocess.run(["unshare", "-n", "sh", "-c", emulated], capture_output=True, text=True, timeout=20)
    if tried.returncode:
        pytest.skip(f"no network namespace with netem may be made here: {tried.stderr.strip()[:200]}")
    again = f"{__file__}::{test_nothing_is_lost_and_the_bits_are_the_same.__name__}[narrow]"
    inside = f'{emulated} && exec "$0" -m pytest -q -n 0 -p no:cacheprovider "$1"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", inside, sys.executable, again],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=190,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
