"""The training process: warm, walled in, and lost without harm."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import ConfigurationError, MalformedMessage, TrainingError, WorkerDied
from foedus.net import pipe
from foedus.net.sandbox import Limits
from foedus.net.source import own, to_bytes
from foedus.net.training import Training

pytestmark = [pytest.mark.slow, pytest.mark.anyio]  # each starts a process
CHECKS: dict[str, Any] = {"finite": True}
SMALL = Limits(memory_mb=600, seconds=20, file_mb=1)

# What the owner's data file does when it is asked for; tasks' code runs behind the same walls.
CODE = '''
import os, socket, subprocess, sys, time
import numpy as np

def good(): return (np.ones((3, 2), np.float32), [0, 1, 1])
def prints(): print("x" * 200_000); sys.stdin.read(); return good()
def hungry():
    held = []
    while True: held.append(np.ones(1 << 24, np.uint8))
def slow(): time.sleep(60)
def dies(): print("the last words", flush=True); os._exit(3)
def leaves(): sys.exit(4)
def leaves_a_child(): subprocess.Popen(["sleep", "60"], start_new_session=True); dies()
def connects(): socket.create_connection(("127.0.0.1", PORT), 1); return good()
def listens(): s = socket.socket(); s.bind(("127.0.0.1", 0)); return good()
def resolves(): socket.getaddrinfo("example.org", 80); return good()
def calls():
    """Past Python's own sockets, straight to the system."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    made = libc.socket(2, 1, 0)
    if made < 0: raise OSError(ctypes.get_errno(), "socket refused")
    return good()
def child():
    code = "import ctypes; l = ctypes.CDLL(None); raise SystemExit(0 if l.socket(2, 1, 0) < 0 else 9)"
    return (np.full((1, 1), subprocess.run([sys.executable, "-c", code]).returncode, np.float32), [0])
def writes():
    for place in ("OUTSIDE/new", "OUTSIDE/there"):
        try: open(place, "w").close()
        except PermissionError: continue
        return (np.full((1, 1), 9, np.float32), [0])
    open("inside", "w").close(); open("/dev/null", "w").close()
    import os; os.rename("inside", "other"); os.remove("other")
    try: os.remove("OUTSIDE/there")
    except PermissionError: return (np.zeros((1, 1), np.float32), [0])
    return (np.full((1, 1), 9, np.float32), [0])
def fills():
    with open("big", "wb") as file: file.write(b"x" * (4 << 20))
def environment():
    wrong = any("SECRET" in k for k in os.environ) or "OPENBLAS_CORETYPE" not in os.environ
    return (np.array([[float(wrong)]], np.float32), [0])
'''  # fmt: skip


@contextlib.asynccontextmanager
async def process(folder: Path, limits: Limits = SMALL) -> AsyncIterator[Training]:
    training = Training(limits, folder)
    try:
        yield training
    finally:
        await training.close()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


async def read(training: Training, name: str, **more: Any) -> dict[str, Any]:
    said = {"do": "data", "target": f"mine.py:{name}", "checks": CHECKS}
    return (await training.ask(said, **more)).said


async def test_it_says_what_walls_hold_and_stays_warm(folder: Path) -> None:
    async with process(folder) as training:
        walls = await training.start()
        assert "none" in walls.network
        assert "at most 256 open files" in walls.limits or sys.platform == "win32"
        for _ in range(2):
            assert (await read(training, "good"))["examples"] == 3
        assert (await read(training, "prints"))["examples"] == 3  # neither takes the pipe from the agent
        assert training.starts == 1


async def test_data_as_a_value_comes_as_arrays(folder: Path) -> None:
    async with process(folder) as training:
        value = to_bytes(own((np.array([[np.nan], [1.0]]), [0, 1])))
        said = (await training.ask({"do": "data", "checks": CHECKS}, [value])).said
        assert said["examples"] == 2
        assert said["findings"] == [["checks.finite", False, "1 of 2 examples have missing or infinite numbers"]]


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("dies", WorkerDied, r"exit code \d+.*the last words"),  # whoever reaps all children (ray) has the code itself
        ("leaves", TrainingError, "SystemExit: 4"),
        ("nothing", TrainingError, "has no 'nothing'"),
        ("slow", TrainingError, "took more than the 0.5 s"),
    ],
)
async def test_what_is_lost_is_one_request(folder: Path, name: str, error: type[Exception], told: str) -> None:
    async with process(folder) as training:
        await training.start()
        if name == "slow":
            training._limits = Limits(seconds=0.5)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("foedus.net.training.asyncio.timeout", lambda s: asyncio.timeouts.timeout(s - 4.5))
                with pytest.raises(error, match=told):
                    await read(training, name)
            training._limits = SMALL
        else:
            with pytest.raises(error, match=told):
                await read(training, name)
        assert (await read(training, "good"))["examples"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits are the kernel's")
async def test_memory_and_files_are_limited(folder: Path) -> None:
    async with process(folder) as training:
        with pytest.raises((TrainingError, WorkerDied), match=r"MemoryError|more than the 600 MB|Unable to allocate"):
            await read(training, "hungry")
        with pytest.raises((TrainingError, WorkerDied), match=r"File too large|exit code -25"):
            await read(training, "fills")
        assert (await read(training, "good"))["examples"] == 3


async def test_memory_is_watched_from_outside_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foedus.net.training.WATCHED_S", 0.01)
    async with process(folder) as training:
        await training.start()
        training._limits = Limits(memory_mb=1)
        with pytest.raises(WorkerDied, match="more than the 1 MB that are allowed"):
            await read(training, "good")


@pytest.mark.parametrize("name", ["connects", "listens", "resolves"])
async def test_there_is_no_network(folder: Path, name: str) -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    (folder / "mine.py").write_text(CODE.replace("PORT", str(port)))
    async with server, process(folder) as training:
        with pytest.raises(TrainingError, match=r"PermissionError|no network|gaierror"):
            await read(training, name)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only Python's own sockets are refused, and it says so")
async def test_there_is_none_past_python_either_nor_for_children(folder: Path) -> None:
    async with process(folder) as training:
        if not (await training.start()).strict:
            pytest.skip("this kernel permits neither a namespace nor a filter, and the agent says so")
        with pytest.raises(TrainingError, match="socket refused"):
            await read(training, "calls")
        value = (await training.ask({"do": "data", "target": "mine.py:child", "checks": {"highest": 0.5}})).said
        assert value["findings"][-1][1]  # the child was refused as well


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
async def test_it_writes_in_its_own_folder_only(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "there").write_text("as it was")
    (folder / "mine.py").write_text(CODE.replace("OUTSIDE", str(outside)))
    async with process(folder) as training:
        if "may write files" in (await training.start()).limits:
            pytest.skip("this kernel has no Landlock, and the agent says so")
        said = (await training.ask({"do": "data", "target": "mine.py:writes", "checks": {"highest": 0.5}})).said
        assert all(passes for _, passes, _ in said["findings"])
    assert [path.read_text() for path in outside.iterdir()] == ["as it was"]


async def test_the_environment_does_not_travel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "1")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")  # but what decides on the last bit
    async with process(folder) as training:
        said = (await training.ask({"do": "data", "target": "mine.py:environment", "checks": {"highest": 0.5}})).said
        assert all(passes for _, passes, _ in said["findings"])


async def test_a_process_that_is_killed_costs_the_request_only(folder: Path) -> None:
    async with process(folder) as training:
        await training.start()
        asked = asyncio.create_task(read(training, "slow"))
        while training.pid is None or not psutil.Process(training.pid).is_running():
            await asyncio.sleep(0)
        os.kill(training.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await asked
        assert not training.warm
        assert (await read(training, "good"))["examples"] == 3
        assert training.starts == 2


async def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next(folder: Path) -> None:
    async with process(folder) as training:
        await training.start()
        asked = asyncio.create_task(read(training, "slow"))
        for _ in range(10):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await read(training, "good"))["examples"] == 3


async def test_a_child_that_outlives_the_process_keeps_nobody_waiting(folder: Path) -> None:
    """It holds the pipes, for whose end asyncio waits."""
    async with process(folder) as training, asyncio.timeout(15):
        with pytest.raises(WorkerDied):
            await read(training, "leaves_a_child")
        assert (await read(training, "good"))["examples"] == 3


@pytest.mark.parametrize("wrong", [{"memory_mb": 0}, {"nice": 20}, {"seconds": 0}, {"cores": -1}])
def test_limits_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        Limits(**wrong)


@given(st.binary(max_size=200))
def test_no_head_does_worse_than_being_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        said, lengths = pipe.head_of(data)
        assert isinstance(said, dict)
        assert all(n >= 0 for n in lengths)


def test_a_head_that_promises_too_much_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        pipe.length_of((1 << 30).to_bytes(4, "little"))
    with pytest.raises(MalformedMessage):
        pipe.packed({"a": "x" * (1 << 21)})
