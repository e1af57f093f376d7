"""What clients keep lies on disk: a million clients with SCAFFOLD cost the memory of a cohort, and survive kills."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from foedus.record.folder import KEPT, METRICS, MODEL
from foedus.record.kept import Kept

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory as Linux tells it"),
]

ROUNDS, COHORT = 40, 24
PARAMETERS = 4002  # 16 kB: 16 GB, if every client's lay in memory

SCRIPT = f"""
    import sys
    from pathlib import Path
    import numpy as np
    import foedus as fd
    from foedus.core.select import Population

    folder, count = Path(sys.argv[1]), int(sys.argv[2])

    def told(output, target):  # one line to whoever watches, in the middle of every round
        print("round", flush=True)
        return (output.argmax(1) == target).astype(float)

    def examples(client):
        rng = np.random.default_rng(client)
        return rng.normal(size=(6, 2000)).astype("float32"), rng.integers(2, size=6)

    def some(population, seed, number):  # half of them from a few, who therefore come again
        known = fd.uniform({COHORT // 2}).sample(Population(60, None), seed, number)
        return np.union1d(known, fd.uniform({COHORT // 2}).sample(population, seed, number))

    fd.simulate(
        fd.Task(fd.logistic(2000, 2), metrics=[fd.accuracy._replace(value=told)]),
        fd.scaffold(fd.local_sgd(lr=0.05, steps=2, batch_size=3)),
        fd.Clients.generated(examples, count, central_test=examples(2**40)),
        rounds={ROUNDS},
        cohort=fd.uniform({COHORT})._replace(sample=some, label="some()"),
        settings=fd.Settings(
            folder=folder, checkpoint_seconds=0.01, progress=False, executor=fd.executors.debug()
        ),
    )
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print("peak", line.split()[1])
"""


def started(folder: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak(process: subprocess.Popen[str]) -> int:
    """Of its memory, in bytes."""
    out, errors = process.communicate(timeout=200)
    assert not errors
    return int(out.splitlines()[-1].removeprefix("peak")) * 1024


def kept(folder: Path) -> dict[int, bytes]:
    store = Kept(folder / KEPT)
    found = {client: arrays["method.control"].tobytes() for client, arrays in store.read(range(60)).items()}
    store.close()
    return found


def test_a_million_clients_cost_what_a_cohort_costs(tmp_path: Path) -> None:
    few, many = (peak(started(tmp_path / str(count), count)) for count in (100, 1_000_000))
    cohort = 8 * COHORT * PARAMETERS * 4  # as received, as shifted, as kept, as sent, ...
    assert many - few < cohort + 80e6  # 40 bytes a client of costs, and the drawing of a cohort
    on_disk = (tmp_path / "1000000" / KEPT).stat().st_size
    assert on_disk < 1.5 * ROUNDS * COHORT * PARAMETERS * 4
    assert len(kept(tmp_path / "1000000")) == 60


def test_and_survive_kills(tmp_path: Path) -> None:
    rng, killed = np.random.default_rng(3), 0
    for _ in range(4):
        process = started(tmp_path / "killed", 1_000_000)
        assert process.stdout is not None
        for _ in range(int(rng.integers(2, 10))):
            process.stdout.readline()
        for _ in range(int(rng.integers(0, 300_000))):  # some milliseconds: anywhere within a round
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=200)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    for name in ("killed", "whole"):
        peak(started(tmp_path / name, 1_000_000))
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    for file in (METRICS, MODEL):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
