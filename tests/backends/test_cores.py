"""Counting cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foedus.backends.cores import cores


@pytest.mark.parametrize(
    ("told", "wanted"),
    [("100000 100000\n", 1), ("50000 100000", 1), ("max 100000", None), ("", None), ("much", None), ("10 0", None)],
)
def test_a_containers_quota_counts(tmp_path: Path, told: str, wanted: int | None) -> None:
    (tmp_path / "cpu.max").write_text(told)
    free = cores(tmp_path / "nothing")
    assert cores(tmp_path / "cpu.max") == (wanted or free)
    assert 1 <= free <= (os.cpu_count() or 1)


def test_nobody_counts_by_themselves() -> None:
    """The count that knows quotas is the only one."""
    package = Path(__file__).parents[2] / "foedus"
    found = {p.name: p.read_text("utf-8") for p in package.rglob("*.py")}
    assert [n for n, text in found.items() if "cpu_count(" in text] == ["cores.py"]
