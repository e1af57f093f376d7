"""Nothing that came over a network is unpickled: no module that a server or client uses can do it.

Every module of foedus that ``protocol`` and ``net`` import, directly or through others, lazily or not, is read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import foedus

ROOT = Path(foedus.__file__).parent
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}
LOADS = {("torch", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle"), ("np", "fromfile")}


def path_of(module: str) -> Path | None:
    inner = ROOT.joinpath(*module.split(".")[1:])
    return next((p for p in (inner.with_suffix(".py"), inner / "__init__.py") if p.exists()), None)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closure() -> set[Path]:
    found: set[Path] = set()
    waiting = [*ROOT.joinpath("net").rglob("*.py"), *ROOT.joinpath("protocol").rglob("*.py")]
    while waiting:
        path = waiting.pop()
        if path in found or "migrations" in path.parts:
            continue
        found.add(path)
        named = (path_of(name) for name in imported(path) if name.startswith("foedus."))
        waiting += [p for p in named if p is not None]
    return found


READ = sorted(closure())


def test_the_whole_of_what_is_used_is_read() -> None:
    names = {str(path.relative_to(ROOT)) for path in READ}
    assert names >= {"net/bundle.py", "protocol/wire.py", "protocol/blob.py", "core/examples.py"}
    assert not any(name.startswith("sim/") for name in names)


@pytest.mark.parametrize("path", READ, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_can_unpickle(path: Path) -> None:
    names = {name.partition(".")[0] for name in imported(path)}
    assert names & UNSAFE == set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "weights_only"):
                assert isinstance(keyword.value, ast.Constant)
                assert keyword.value.value is (keyword.arg == "weights_only")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in LOADS


def test_only_the_bundle_runs_code_that_came_from_elsewhere() -> None:
    """``exec``, ``eval`` and ``compile`` stand in one place, behind a digest that somebody approved."""
    found = set()
    for path in READ:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("exec", "eval", "compile", "__import__"):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"net/bundle.py"}
