"""The threat model names tests, and they are there; a threat without one is a wish."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda text: text)
def test_every_test_that_is_named_is_there(path: str, name: str) -> None:
    assert name in functions(path)


def test_every_threat_has_a_test() -> None:
    """Rows of tables that have a column of tests."""
    rows = [line for line in PAGE.split("\n") if line.startswith("| ") and line.count(" | ") >= 2]
    threats = [row for row in rows if "| tests |" not in row]
    assert len(threats) >= 20
    assert [row for row in threats if "::test_" not in row] == []
