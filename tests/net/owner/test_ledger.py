"""The ledger: what is written stands, and whatever is changed, moved, cut or torn is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import LedgerBroken
from foedus.net.owner.ledger import NOTHING, Departure, Ledger


def departure(i: int) -> Departure:
    return Departure(
        to="https://a.example",
        what="update",
        run="heart",
        round=i,
        bytes=10 * i,
        digest=f"{i:064x}",
        protections=("none",),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for i in range(1, 6):
        ledger.write(departure(i), when=1_700_000_000.0 + i)
    return path


def test_what_was_written_is_read_by_whoever_opens_it_again(path: Path) -> None:
    again = Ledger(path)
    assert (again.count, again.bytes) == (5, 150)
    assert [entry.departure for entry in again.entries()] == [departure(i) for i in range(1, 6)]
    assert next(iter(again.entries())).when == "2023-11-14T22:13:21Z"
    assert again.verify(again.head) == again.head
    again.write(departure(6), when=0.0)
    assert Ledger(path).count == 6


def test_a_line_is_on_the_disk_before_anything_leaves(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).write(departure(1), when=0.0)
    assert json.loads(path.read_bytes())["digest"] == departure(1).digest


@given(data=st.data())
def test_any_change_of_a_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    for i in range(1, 4):
        ledger.write(departure(i), when=0.0)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 2))  # the last byte ends the last line: without it, it is torn
    other = data.draw(st.integers(0, 255).filter(lambda b: b != content[at]))
    content[at] = other
    path.write_bytes(bytes(content))
    with pytest.raises(LedgerBroken):
        Ledger(path)


@pytest.mark.parametrize("keep", [[0, 1, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4]])
def test_lines_taken_out_moved_or_doubled_are_found(path: Path, keep: list[int]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in keep))
    with pytest.raises(LedgerBroken, match="does not follow"):
        Ledger(path)


def test_lines_cut_off_at_the_end_are_found_by_the_head_that_is_remembered(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    with pytest.raises(LedgerBroken, match="cut off"):
        Ledger(path)


def test_a_head_that_was_noted_down_elsewhere_finds_what_both_files_hide(path: Path, tmp_path: Path) -> None:
    noted = Ledger(path).head
    for file in (path, path.with_name("ledger.jsonl.head")):
        file.unlink()
    anew = Ledger(path)
    for i in range(1, 5):
        anew.write(departure(i), when=1_700_000_000.0 + i)
    assert Ledger(path).verify() == anew.head
    with pytest.raises(LedgerBroken, match="noted down"):
        anew.verify(noted)
    assert anew.verify(NOTHING) == anew.head


def test_a_head_that_is_gone_or_nonsense_is_told(path: Path) -> None:
    head = path.with_name("ledger.jsonl.head")
    head.write_text("five " + "0" * 64)
    with pytest.raises(LedgerBroken):
        Ledger(path)
    head.unlink()
    with pytest.raises(LedgerBroken, match="missing"):
        Ledger(path)


@pytest.mark.parametrize("torn", [1, 40, -1])
def test_a_line_torn_by_a_power_cut_is_dropped(path: Path, torn: int) -> None:
    line = path.read_bytes().splitlines(keepends=True)[-1]
    with open(path, "ab") as file:
        file.write(line[:torn])
    ledger = Ledger(path)
    assert ledger.count == 5
    ledger.write(departure(6), when=0.0)
    assert Ledger(path).verify() == ledger.head


def test_a_power_cut_between_the_line_and_its_head_is_mended(path: Path) -> None:
    head = path.with_name("ledger.jsonl.head")
    before = head.read_bytes()
    Ledger(path).write(departure(6), when=0.0)
    head.write_bytes(before)
    assert Ledger(path).count == 6
    assert head.read_bytes() != before
    Ledger(path).write(departure(7), when=0.0)
    Ledger(path).write(departure(8), when=0.0)
    head.write_bytes(before)
    with pytest.raises(LedgerBroken, match="knows nothing of"):
        Ledger(path)
