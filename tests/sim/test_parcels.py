"""Values that cross a process border arrive as they were, and without copies where that was promised."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foedus.errors import ConfigurationError, TrainingError
from foedus.sim import parcels
from foedus.sim.parcels import Failure, mapped, memory_file, pack, receive, send, unpack

ARRAYS = hnp.arrays(
    st.sampled_from(["f4", "i8", "?", "u1", ">f8"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
    fill=None,
)


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(st.lists(ARRAYS, max_size=4))
def test_arrays_arrive_through_memory_as_they_were(arrays: list[Any]) -> None:
    with memory_file({"arrays": arrays, "name": "x"}) as file:
        found = mapped(file)
    assert found["name"] == "x"
    assert all(same(a, b) for a, b in zip(arrays, found["arrays"], strict=True))


@given(st.lists(ARRAYS, max_size=4))
def test_arrays_arrive_over_a_connection_as_they_were(arrays: list[Any]) -> None:
    ours, theirs = Pipe()
    with ours, theirs:
        send(ours, arrays)
        found = receive(theirs)
    assert all(same(a, b) for a, b in zip(arrays, found, strict=True))
    assert all(b.flags.writeable for b in found)


def test_large_arrays_cross_while_the_other_end_reads() -> None:
    big = np.arange(3_000_000)
    ours, theirs = Pipe()
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, [big, big[::-1]]))
        sender.start()
        found = receive(theirs)
        sender.join(60)
    assert np.array_equal(found[0], big)
    assert np.array_equal(found[1], big[::-1])


def test_a_connection_that_ends_within_a_message_is_an_end() -> None:
    ours, theirs = Pipe()
    body = pack([np.zeros(9)]).body
    with theirs:
        ours.send_bytes(np.array([1, 72], "<u8").tobytes() + body)
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


def test_a_mapped_array_is_the_files_memory_until_it_is_written_to() -> None:
    with memory_file(np.arange(100_000)) as file:
        first, second = mapped(file), mapped(file)
    first[0] = 7
    assert second[0] == 0
    assert first.ctypes.data % 64 == 0


def test_a_job_too_large_for_memory_goes_to_the_disk_and_leaves_nothing(tmp_path: Path) -> None:
    with parcels._unnamed(10**15) as file:
        file.write(b"x")
        assert not os.fstat(file.fileno()).st_nlink


def test_what_cannot_leave_the_process_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be sent to another process.*lock"):
        pack(threading.Lock())


# --- modules that a fresh process cannot import --------------------------------------------------------------

CODE = """
import math
LEAVES = 3
def twice(x): return 2 * x * LEAVES
class Tree:
    def height(self): return twice(math.floor(1.5))
"""


@pytest.fixture
def astray(tmp_path: Path) -> Iterator[ModuleType]:
    """A module loaded from a file that is not on sys.path."""
    file = tmp_path / "astray.py"
    file.write_text(CODE)
    spec = importlib.util.spec_from_file_location("astray", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["astray"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["astray"]


def elsewhere(body: bytes) -> str:
    """What a fresh process makes of a pickled function's result."""
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
    done = subprocess.run([sys.executable, "-c", code], input=body, capture_output=True, check=True, timeout=60)
    return done.stdout.decode()


@pytest.mark.slow
def test_a_module_that_a_fresh_process_cannot_import_travels_whole(astray: ModuleType) -> None:
    assert elsewhere(pack(astray.Tree().height).body) == "6\n"


def test_a_class_that_travels_whole_is_the_same_class_when_it_comes_back(astray: ModuleType) -> None:
    assert unpack(*pack(astray.Tree)) is astray.Tree
    assert isinstance(unpack(*pack(astray.Tree())), astray.Tree)


def test_what_can_be_imported_travels_by_name(astray: ModuleType) -> None:
    assert len(pack([Failure, np.linalg.norm, threading.Thread]).body) < 200
    pack(astray.Tree)
    assert "astray" not in cloudpickle.list_registry_pickle_by_value()  # for others that use cloudpickle


# --- exceptions ----------------------------------------------------------------------------------------------


class Stubborn(Exception):
    def __init__(self, first: int, second: int) -> None:  # pickles, and does not come back
        super().__init__(f"{first} and {second}")


def failed(error: Exception, cause: Exception | None = None) -> BaseException:
    """The error as it comes out at the other side."""
    try:
        raise error from cause
    except Exception as caught:
        return unpack(*pack(Failure.of(caught))).again()


def test_an_exception_arrives_with_its_fields_its_cause_and_where_it_was() -> None:
    sent = TrainingError("no", client="north", round=3, step=5, batch=([np.ones(2)], None))
    error = failed(sent, KeyError("why"))
    assert isinstance(error, TrainingError)
    assert (str(error), error.client, error.round, error.step) == ("no", "north", 3, 5)
    assert error.batch[0][0].tolist() == [1, 1]
    assert isinstance(error.__cause__, KeyError)
    assert "in failed" in error.__notes__[0]


def test_an_exception_that_cannot_travel_says_what_it_said() -> None:
    assert str(failed(Stubborn(1, 2))) == "Stubborn: 1 and 2"
    assert str(failed(ValueError("a"), Stubborn(1, 2)).__cause__) == "Stubborn: 1 and 2"
