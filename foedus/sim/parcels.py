"""Values as bytes that another process can read: jobs, orders, outcomes, exceptions.

Pickling is cloudpickle's: classes and functions of the user's script, of a notebook's cells, and of modules
that a fresh process could not import, are written out whole. Arrays lie beside the pickled bytes (pickle
protocol 5, PEP 574) and are not copied to be sent: a job becomes one file of memory that all workers map, and
weights are read from a connection straight into place.

The bytes come from our own processes only, through pipes that no one else can open; nothing here is fit for a
network, where nothing is pickled (docs/design.md).
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import IO, Any, NamedTuple

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from foedus.errors import ConfigurationError, FoedusError, StorageError

__all__ = ["Failure", "Line", "Packed", "mapped", "memory_file", "pack", "receive", "send", "unpack"]

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Line
else:
    from multiprocessing.connection import Connection as Line

_ALIGNMENT = 64  # bytes: the widest that processors load at once
_TAIL = struct.Struct("<Q")


class Packed(NamedTuple):
    """A value as bytes: the pickle, and the arrays that lie beside it."""

    body: bytes
    buffers: list[memoryview]


def pack(value: Any) -> Packed:
    """A value as bytes that a fresh process can read; its arrays are not copied.

    Raises:
        ConfigurationError: it holds something that cannot leave this process; says what.

    Example:
        >>> unpack(*pack({"w": np.arange(3)}))
        {'w': array([0, 1, 2])}
    """
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    try:
        with _Whole(body, protocol=5, buffer_callback=buffers.append) as pickler:
            pickler.dump(value)
    except Exception as error:
        raise ConfigurationError(
            "the task, the algorithm or the clients cannot be sent to another process: "
            f"{type(error).__name__}: {error}. They refer to something that lives in this process only (an "
            "open file, a lock, a connection). Open it inside the function that needs it, or use "
            "executor=foedus.executors.debug()"
        ) from error
    return Packed(body.getvalue(), [b.raw() for b in buffers])


def unpack(body: bytes | memoryview, buffers: Sequence[Any]) -> Any:
    """The value. Its arrays lie where the buffers lie."""
    return pickle.loads(body, buffers=buffers)


class _Whole(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, which writes ``__main__`` out whole; here also what a fresh process could not import."""

    def __enter__(self) -> _Whole:
        self._written_out: list[ModuleType] = []
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._written_out:
            cloudpickle.unregister_pickle_by_value(module)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType):
            module = sys.modules.get(obj.__module__)
            if module is not None and module not in self._written_out and not _importable(module):
                cloudpickle.register_pickle_by_value(module)
                self._written_out.append(module)
        return super().reducer_override(obj)


@lru_cache(maxsize=4096)
def _importable(module: ModuleType) -> bool:
    """Whether a fresh process with our ``sys.path`` that imports the module's name gets this very file."""
    file, name = getattr(module, "__file__", None), module.__name__
    if name == "__main__" or not (file and file.endswith(".py")):
        return True  # cloudpickle sees to the one; the other is part of Python or an extension
    places: Any = None
    origin: str | None = None
    for end in [*(i for i, letter in enumerate(name) if letter == "."), len(name)]:
        finders = (getattr(f, "find_spec", None) for f in sys.meta_path)
        specs = (find(name[:end], places) for find in finders if find is not None)
        spec = next((s for s in specs if s is not None), None)
        if spec is None:
            return False
        places, origin = spec.submodule_search_locations, spec.origin
    return bool(origin == file)


# --- a job as a file of memory ------------------------------------------------------------------------------


def memory_file(value: Any) -> IO[bytes]:
    """A file without a name that holds a value, for other processes to map: it ends with the last that has it
    open, however that one ends.

    Raises:
        ConfigurationError: the value cannot leave this process.
        StorageError: there is no room.
    """
    body, buffers = pack(value)
    sizes = [len(body), *(b.nbytes for b in buffers)]
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
    table = pickle.dumps(list(zip(starts, sizes, strict=False)))
    try:
        file = _unnamed(starts[-1])
        parts: list[bytes | memoryview] = [body, *buffers, table]
        for start, part in zip(starts, parts, strict=True):
            file.seek(start)
            file.write(part)
        file.write(_TAIL.pack(len(table)))
        file.flush()
    except OSError as error:
        raise StorageError(
            f"no room for the {starts[-1] / 1e6:.0f} MB that the worker processes share (the clients' data "
            f"above all): {error}. Free some space in {tempfile.gettempdir()}, or let TMPDIR name a folder "
            "that has it"
        ) from error
    return file


def mapped(file: IO[bytes]) -> Any:
    """The value of a memory file. Its arrays are the file's pages, copied only where they are written to."""
    pages = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    end = len(pages) - _TAIL.size
    (length,) = _TAIL.unpack(pages[end:])
    body, *buffers = (pages[start : start + size] for start, size in pickle.loads(pages[end - length : end]))
    return unpack(body, buffers)


def _unnamed(size: int) -> IO[bytes]:
    """Main memory where there is plenty, else a temporary file."""
    if sys.platform == "linux" and size < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        return os.fdopen(os.memfd_create("foedus"), "w+b")
    return tempfile.TemporaryFile(prefix="foedus-")


# --- values over a connection -------------------------------------------------------------------------------


def send(connection: Line, value: Any) -> None:
    """Send a value; the other end's :func:`receive` gives it."""
    buffers: list[pickle.PickleBuffer] = []
    body = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [b.raw() for b in buffers]
    sizes = np.array([len(raw), *(b.nbytes for b in raw)], "<u8")
    connection.send_bytes(sizes.tobytes() + body)
    for buffer in raw:
        _put(connection, buffer)


def receive(connection: Line) -> Any:
    """The next value; its arrays are the receiver's own.

    Raises:
        EOFError: the other end is gone.
    """
    message = connection.recv_bytes()
    count = int(np.frombuffer(message, "<u8", 1)[0])
    sizes = np.frombuffer(message, "<u8", count, offset=8)
    buffers = [np.empty(int(size), np.uint8) for size in sizes]
    for buffer in buffers:
        _get(connection, buffer)
    return unpack(memoryview(message)[8 + 8 * count :], buffers)


if sys.platform == "win32":

    def _put(connection: Line, buffer: memoryview) -> None:
        connection.send_bytes(buffer)

    def _get(connection: Line, buffer: NDArray[np.uint8]) -> None:
        connection.recv_bytes_into(buffer.data)

else:  # past the connection's own framing, which copies: 9 ms instead of 50 for a sum of 1.7 million entries

    def _put(connection: Line, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[os.write(connection.fileno(), buffer) :]

    def _get(connection: Line, buffer: NDArray[np.uint8]) -> None:
        rest = buffer.data
        while rest:
            got = os.readv(connection.fileno(), [rest])
            if not got:
                raise EOFError
            rest = rest[got:]


# --- exceptions ---------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """An exception on its way to the process that asked, with its cause and the text of its traceback."""

    error: BaseException
    cause: BaseException | None
    trace: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """A failure that is sure to arrive, whatever the exceptions are made of."""
        cause = None if error.__cause__ is None else _sendable(error.__cause__)
        return Failure(_sendable(error), cause, "".join(traceback.format_exception(error)))

    def again(self) -> BaseException:
        """The exception, to be raised here."""
        self.error.add_note(f"It happened in a worker process:\n\n{self.trace}")
        self.error.__cause__ = self.cause
        return self.error


def _sendable(error: BaseException) -> BaseException:
    """The exception itself if it survives the journey, else one that says what it said."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return FoedusError(f"{type(error).__name__}: {error}")
    return error
