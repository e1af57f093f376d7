"""The example store: what is logged is offered in order; what is old or too much is forgotten, on the disk, too."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foedus as fd
from foedus.errors import ConfigurationError, DataError, StorageError


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@given(
    logged=st.lists(
        st.tuples(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), st.none() | st.integers(0, 4))
    )
)
def test_what_is_logged_with_an_outcome_is_offered_in_order(tmp_path_factory, logged) -> None:
    store = fd.ExampleStore(tmp_path_factory.mktemp("store") / "s.sqlite")
    for context, outcome in logged:
        store.log(context, outcome)
    known = [(c, o) for c, o in logged if o is not None]
    assert len(store) == len(logged)
    if not known:
        with pytest.raises(DataError, match="no example with an outcome"):
            store.examples()
        return
    examples = store.examples()
    np.testing.assert_array_equal(examples.inputs[0], np.array([c for c, _ in known], np.float32))
    np.testing.assert_array_equal(examples.targets, [o for _, o in known])


def test_an_outcome_may_come_later_and_contexts_may_have_several_inputs(tmp_path: Path) -> None:
    store = fd.ExampleStore(tmp_path / "s.sqlite")
    first = store.log({"b": [1, 2], "a": 0.5})
    store.log({"a": 0.25, "b": [3, 4]}, [1.0, 0.0])
    assert len(store.examples()) == 1
    store.outcome(first, [0.0, 1.0])
    examples = store.examples()
    assert repr(examples) == "Examples(2: float32, int64[2] -> float32[2])"
    np.testing.assert_array_equal(examples.targets, [[0, 1], [1, 0]])


def test_the_latest_are_kept_and_old_ones_expire(tmp_path: Path) -> None:
    clock = Clock()
    store = fd.ExampleStore(tmp_path / "s.sqlite", expire_days=2, most=5, clock=clock)
    for i in range(9):
        store.log([float(i)], i)
    assert store.examples().targets.tolist() == [4, 5, 6, 7, 8]
    clock.now += 86400
    store.log([9.0], 9)
    clock.now += 86401
    assert store.examples().targets.tolist() == [9]
    store.outcome(1, 7)  # forgotten: stays so
    assert len(store) == 1
    store.clear()
    assert len(store) == 0


def test_bytes_are_limited_too(tmp_path: Path) -> None:
    store = fd.ExampleStore(tmp_path / "s.sqlite", most_bytes=20_000)
    for i in range(30):
        store.log(np.full(500, i, np.float32), i)
    assert 8 <= len(store) <= 9
    assert store.examples().targets[-1] == 29


def test_what_is_forgotten_is_gone_from_the_disk(tmp_path: Path) -> None:
    clock, secret = Clock(), np.frombuffer(b"the patient's number is 1234", np.uint8)
    store = fd.ExampleStore(tmp_path / "s.sqlite", expire_days=1, clock=clock)
    store.log(secret, 1)
    assert secret.tobytes() in (tmp_path / "s.sqlite").read_bytes()
    clock.now += 90_000
    assert len(store) == 0
    assert all(secret.tobytes() not in path.read_bytes() for path in tmp_path.iterdir())


def test_examples_are_of_one_kind(tmp_path: Path) -> None:
    store = fd.ExampleStore(tmp_path / "s.sqlite")
    store.log([1.0, 2.0], 1)
    with pytest.raises(DataError, match=r"this context is x \[3\], and those in .* are x \[2\]"):
        store.log([1.0, 2.0, 3.0], 1)
    with pytest.raises(DataError, match="this outcome is"):
        store.log([1.0, 2.0], [1, 2])
    with pytest.raises(DataError, match="not numbers"):
        store.log(["a"], 1)
    with pytest.raises(DataError, match="no array"):
        store.log([[1.0], [1.0, 2.0]], 1)
    with pytest.raises(ConfigurationError, match="needs a context"):
        store.log({}, 1)
    assert len(store) == 1


@pytest.mark.parametrize("wrong", [{"expire_days": 0}, {"most": 0}, {"most_bytes": -1}])
def test_settings_that_keep_nothing_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        fd.ExampleStore(tmp_path / "s.sqlite", **wrong)  # type: ignore[arg-type]


def test_another_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"something else entirely " * 100)
    with pytest.raises(DataError, match="no example store"):
        len(fd.ExampleStore(tmp_path / "s.sqlite"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        len(fd.ExampleStore(tmp_path / "folder"))


def _log(path: Path) -> None:
    store = fd.ExampleStore(path)
    for i in range(20):
        store.log([float(i)], i)


@pytest.mark.slow  # starts processes
def test_several_processes_may_log(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    processes = [multiprocessing.get_context("spawn").Process(target=_log, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(fd.ExampleStore(path)) == 40
