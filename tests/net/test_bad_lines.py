"""Agents behind a line that delays, loses, cuts, stalls, damages, throttles: nothing is lost, the bits are the same."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import foedus as fd
from foedus.net.identity import visits
from foedus.net.served import Rounds
from foedus.record.folder import read

from . import ether
from .commands import with_changes
from .joins import each
from .lines import Line, Weather
from .lines import opened as line
from .test_serve import serving
from .trainees import Trainee

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SIZE, WIDTH = 4000, 3000
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


# What is served over the wire below: an update of 24 KB, so that it takes many packets.
WIDE = f"""rng = np.random.default_rng(0)
    shapes = enumerate([(20 + part, {WIDTH}) for part in range(3)])
    return fd.Clients.of({{i: (rng.normal(size=s).astype("f4"), rng.integers(0, 2, s[0])) for i, s in shapes}})
"""
CHANGES = {
    "import foedus as fd\n": "import numpy as np\n\nimport foedus as fd\n",
    "hospitals = fd.data.breast_cancer().partition(fd.data.iid(4), seed=0)\n"
    "    return hospitals.map_fitted(fd.data.own_scaling())\n": WIDE,
    "fd.logistic(30, 2)": f"fd.logistic({WIDTH}, 2)",
    "rounds=5": "rounds=2",
}


def test_where_the_kernel_itself_loses_a_fifth_and_is_200_ms_away(tmp_path: Path) -> None:
    """The commands in two network namespaces, and between them packets that are lost below TCP and TLS."""
    begun = time.monotonic()
    try:
        with ether.opened(delay_s=0.1, loss=0.2, seed=5) as wire, with_changes(tmp_path, CHANGES) as commands:
            commands.at = lambda name: wire.near if name == "server" else wire.far
            join = commands.serve("--minimum", "3", "--host", ether.NEAR, "--reached-as", ether.NEAR)
            hospitals = [commands.hospital(join, part) for part in range(3)]
            joined = time.monotonic() - begun
            for process in hospitals:
                commands.until(lambda process=process: process.poll() is not None, "the end")
                assert process.returncode == 0
            seen = wire.seen()
            wanted = commands.simulated().parameters
    except ether.NotPermitted as error:
        pytest.skip(f"a wire that loses packets can be made neither way here: {error}")
    print(f"\n{time.monotonic() - begun:.1f} s, {joined:.1f} of it until all had joined; {seen}")
    assert 0.1 < seen["lost"] / seen["packets"] < 0.3
    served = read(next((tmp_path / "foedus-server" / "runs").iterdir()))
    assert [line["trained"] for line in served.metrics] == [3, 3]
    for name, array in wanted.items():
        np.testing.assert_array_equal(served.parameters[name], array)
