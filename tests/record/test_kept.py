"""What clients keep: only what a checkpoint may go back to is held, and settling costs what the round did."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foedus.record.kept import Kept


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    store = Kept(tmp_path / "kept.sqlite")
    yield store
    store.close()


def rows(folder: Path) -> list[tuple[int, int]]:
    database = sqlite3.connect(folder / "kept.sqlite")
    found = database.execute("SELECT client, round FROM kept ORDER BY client, round").fetchall()
    database.close()
    return found


def write(store: Kept, number: int, *clients: int) -> None:
    store.write(number, {client: {"a": np.array([float(number)])} for client in clients})


def test_each_clients_latest_up_to_the_checkpoint_stays(kept: Kept, tmp_path: Path) -> None:
    write(kept, 1, 0, 1)
    write(kept, 2, 0)
    write(kept, 3, 0, 2)
    kept.settle(2)
    assert rows(tmp_path) == [(0, 2), (0, 3), (1, 1), (2, 3)]
    kept.settle(3)
    assert rows(tmp_path) == [(0, 3), (1, 1), (2, 3)]
    assert {c: a["a"].tolist() for c, a in kept.read(range(4)).items()} == {0: [3.0], 1: [1.0], 2: [3.0]}


def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    killed = Kept(tmp_path / "kept.sqlite")
    write(killed, 1, 0)
    write(killed, 2, 0)
    killed.commit()
    killed.close()
    store = Kept(tmp_path / "kept.sqlite")
    write(store, 3, 0)
    store.settle(3)
    store.close()
    assert rows(tmp_path) == [(0, 3)]


def test_settling_does_not_look_at_clients_that_kept_nothing_new(kept: Kept) -> None:
    write(kept, 1, *range(2000))
    kept.settle(1)
    write(kept, 2, 7)
    assert kept._database is not None
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    kept._database.set_progress_handler(count, 1)  # called at every instruction of the database
    kept.settle(2)
    kept._database.set_progress_handler(None, 0)
    assert 0 < steps < 500
