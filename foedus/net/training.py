"""The training process, seen from the agent: started once, asked many times, ended when it takes too much.

The agent itself loads neither a framework nor any code of a task. It keeps a process beside it that does
(``trainee.py``), behind walls (``sandbox.py``). The process stays warm, so that a framework is imported once and not
every round. If it dies, or takes more time or memory than its owner allows, the round is lost, and nothing else: the
next request starts another.

Not here: which code it is given (``owner/approvals.py``), what is sent (``agent.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foedus.backends.cores import cores
from foedus.errors import MalformedMessage, StorageError, TrainingError, WorkerDied
from foedus.net.pipe import Frame, head_of, length_of, packed
from foedus.net.sandbox import Limits, Walls

__all__ = ["Training"]

WATCHED_S = 0.5  # how often memory is looked at
START_S = 120.0  # until the process has put up its walls, at most
END_S = 10.0  # until the system has ended a process that was killed; it may hang in a file system that does not answer
KEPT = 16_384  # characters of what the process last printed
# Of the environment: what Python and the frameworks need. Nothing that names proxies, tokens or passwords.
PASSED = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "SYSTEMROOT",
    "FOEDUS_DATA",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What chooses how arithmetic is done, on which the last bit depends: it has to be as it is where one simulates.
ARITHMETIC = (
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "KMP_",
    "BLIS_",
    "VECLIB_",
    "NPY_",
    "ATEN_",
    "TORCH_",
    "XLA_",
    "JAX_",
    "CUDA_",
)


class Training:
    """The training process.

    Args:
        limits: what it may take.
        folder: an existing folder that is the process's own: its working folder, home and place for temporary files.
    """

    def __init__(self, limits: Limits, folder: Path) -> None:
        self._limits, self._folder = limits, folder
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._asked = asyncio.Lock()
        self._printed = ""
        self.walls: Walls | None = None
        self.starts = 0

    @property
    def warm(self) -> bool:
        """Whether there is a process now."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """The process's id, if there is one."""
        return self._process.pid if self._process is not None and self.warm else None

    async def start(self) -> Walls:
        """Start the process if there is none; what holds in it."""
        if not self.warm or self.walls is None:
            await self.close()
            self._process = await self._spawned()
            self.starts += 1
            self._listening = asyncio.create_task(self._listen(self._process))
            said = (await self._exchanged({"limits": asdict(self._limits)}, (), START_S)).said
            self.walls = Walls(str(said["network"]), bool(said["strict"]), tuple(map(str, said["limits"])))
        return self.walls

    async def ask(self, said: dict[str, Any], blobs: Sequence[bytes] = (), *, seconds: float | None = None) -> Frame:
        """Ask for something, and wait for the answer.

        Raises:
            TrainingError: what was asked for failed, or took too long; the process may go on or not.
            WorkerDied: the process died, or took too much memory.
        """
        async with self._asked:
            await self.start()
            answer = await self._exchanged(said, blobs, seconds or self._limits.seconds)
        if not answer.said.get("ok"):
            raise TrainingError(str(answer.said.get("told", "training failed"))[:4000], round=int(said.get("round", 0)))
        return answer

    async def close(self) -> None:
        """End the process and free its memory; the next request starts another."""
        process, self._process, self.walls = self._process, None, None
        if process is not None:
            _killed(process)
            # Pipes first: asyncio calls a process ended only when its pipes are, too, and a child that got away may
            # hold the other ends for as long as it likes.
            transport = getattr(process, "_transport", None)
            if transport is not None:
                transport.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_S)
        if self._listening is not None:
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None

    async def _spawned(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        passed = [name for name in os.environ if name in PASSED or name.startswith(ARITHMETIC)]
        environment = {name: os.environ[name] for name in passed}
        count = str(self._limits.cores or cores())
        environment |= {name: os.environ.get(name, count) for name in THREADS}
        environment |= {"HOME": str(self._folder), "TMPDIR": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = (sys.executable, "-m", "foedus.net.trainee")
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
                cwd=self._folder,
                start_new_session=True,
            )
        except OSError as error:
            raise StorageError(f"the training process could not be started: {error}") from error

    async def _exchanged(self, said: dict[str, Any], blobs: Sequence[bytes], seconds: float) -> Frame:
        """One request and its answer, watched from outside."""
        process = self._process
        assert process is not None
        try:
            async with asyncio.timeout(seconds + 5), self._watched(process):
                await _write(process, said, blobs)
                return await _read(process)
        except TimeoutError:
            await self.close()
            raise TrainingError(
                f"training took more than the {seconds:g} s that are allowed, and was ended; "
                "Limits(seconds=...) allows more"
            ) from None
        except (MalformedMessage, ConnectionError, asyncio.IncompleteReadError) as error:
            raise await self._died(error) from None
        except asyncio.CancelledError:
            await self.close()  # an answer that nobody reads would be taken for the next one's
            raise

    @contextlib.asynccontextmanager
    async def _watched(self, process: asyncio.subprocess.Process) -> AsyncIterator[None]:
        """End the process when it takes more memory than it may."""
        watching = asyncio.create_task(self._watch(process))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        import psutil

        seen = psutil.Process(process.pid)
        while True:
            with contextlib.suppress(psutil.Error):
                family = [seen, *seen.children(recursive=True)]
                if sum(each.memory_info().rss for each in family) > self._limits.memory_mb << 20:
                    self._printed += f"\n(ended: it took more than the {self._limits.memory_mb} MB that are allowed)"
                    _killed(process)
                    return
            await asyncio.sleep(WATCHED_S)

    async def _died(self, error: BaseException) -> WorkerDied:
        process = self._process
        await self.close()
        code = None if process is None else process.returncode
        told = self._printed.strip()[-2000:] or f"{type(error).__name__}"
        return WorkerDied(
            f"the training process ended by itself (exit code {code}); this round is lost, nothing else. "
            f"It last said: {told}"
        )

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Keep the end of what the process prints."""
        assert process.stderr is not None
        while data := await process.stderr.read(4096):
            self._printed = (self._printed + data.decode("utf-8", "replace"))[-KEPT:]


def _killed(process: asyncio.subprocess.Process) -> None:
    """Kill the process and all that it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


async def _write(process: asyncio.subprocess.Process, said: dict[str, Any], blobs: Sequence[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(packed(said, blobs))
    for blob in blobs:
        process.stdin.write(blob)
        await process.stdin.drain()
    await process.stdin.drain()


async def _read(process: asyncio.subprocess.Process) -> Frame:
    assert process.stdout is not None
    length = length_of(await process.stdout.readexactly(4))
    said, lengths = head_of(await process.stdout.readexactly(length))
    return Frame(said, tuple([await process.stdout.readexactly(n) for n in lengths]))
