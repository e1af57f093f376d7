"""What single examples have spent is written down whole, and never read wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import CheckpointError
from foedus.net.owner.spending import Row, Spending

KINDS = st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.1, 1.0]), st.integers(0, 50))
VISITS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["x 1", "x 2", "y 1"]), KINDS), max_size=12)


@given(visits=VISITS)
def test_visits_add_up_by_data_set_and_run(tmp_path_factory: pytest.TempPathFactory, visits: list[object]) -> None:
    path = tmp_path_factory.mktemp("owner") / "spending.json"
    for data, run, kind in visits:  # type: ignore[misc]
        Spending(path).add(data, run, Row(*kind))
    for data in "ab":
        for run in ("x 1", "x 2", "y 1"):
            found = Spending(path).rows(data, run)
            for rows, here in ((found.here, True), (found.all, False)):
                for z in (0.5, 1.0, 2.0):
                    for rate in (0.1, 1.0):
                        steps = sum(
                            kind[2]
                            for d, r, kind in visits  # type: ignore[misc]
                            if d == data and (r == run or not here) and kind[:2] == (z, rate)
                        )
                        assert sum(row.steps for row in rows if row[:2] == (z, rate)) == steps


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 1}',
        b'{"version": 2, "data": {}}',
        b'{"version": 1, "data": {"a": []}}',
        b'{"version": 1, "data": {"a": {"run": [[1.0, 0.5]]}}}',
        b'{"version": 1, "data": {"a": {"run": [[1.0, 0.5, -1]]}}}',
        b'{"version": 1, "data": {"a": {"run": [[1.0, 1.5, 1]]}}}',
        b'{"version": 1, "data": {"a": {"run": [[1.0, NaN, 1]]}}}',
    ],
)
def test_a_damaged_file_is_never_taken_for_nothing_spent(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spending.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="spending"):
        Spending(path).rows("a", "run")
    with pytest.raises(CheckpointError):
        Spending(path).add("a", "run", Row(1.0, 0.5, 1))
    assert path.read_bytes() == content


def test_rows_are_merged_by_kind(tmp_path: Path) -> None:
    spending = Spending(tmp_path / "spending.json")
    for steps in (3, 4):
        spending.add("heart", "x 1", Row(1.0, 0.5, steps))
    told = json.loads((tmp_path / "spending.json").read_text())
    assert told["data"] == {"heart": {"x 1": [[1.0, 0.5, 7]]}}
