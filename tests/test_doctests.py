"""The examples in docstrings run, module by module, and say what they print."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import foedus

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
HEAVY = (
    "foedus.audit",
    "foedus.core.task",
    "foedus.backends",
    "foedus.sim",
    "foedus.report",
    "foedus.cli",
    "foedus.demo",
    "foedus.data.bundled",
    "foedus.data.frames",
    "foedus.data.own",
)  # they import frameworks

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(foedus.__path__, "foedus.")
    if "template" not in name and "__main__" not in name
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith(HEAVY) else n for n in MODULES]
)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    told: list[str] = []
    for example in found:
        runner.run(example, out=told.append)
    assert runner.failures == 0, "".join(told)


def test_there_are_examples() -> None:
    """Every value and verb of an algorithm has one."""
    modules = [
        importlib.import_module(f"foedus.core.{m}")
        for m in ("aggregate", "client", "compose", "select", "server", "stage")
    ]
    finder = doctest.DocTestFinder(exclude_empty=True)
    with_example = {t.name.rpartition(".")[2] for m in modules for t in finder.find(m) if t.examples}
    assert with_example >= {
        "mean", "chain", "clip", "proximal", "local_sgd", "local_training", "fedavg", "fedsgd", "uniform",
        "available", "Aggregator", "ServerOptimiser",
    }  # fmt: skip
