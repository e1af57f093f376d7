"""What all tests share: shapes checked while they run, bounded hypothesis, one thread, the data folder."""

from __future__ import annotations

import ast
import builtins
import functools
import operator
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # two cores, two test processes: more threads would only wait

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, print_blob=True, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of data files that FOEDUS_DATA names; a test that needs one and finds none is skipped."""
    named = os.environ.get("FOEDUS_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("needs real data files: FOEDUS_DATA names no folder")
    return Path(named)


# --- shapes -------------------------------------------------------------------------------------------------
#
# Functions whose annotations say shapes, e.g. ``Float[Vector, "parameter"]``, are checked whenever they are called
# (jaxtyping with beartype): another dtype, or two arrays that should share an axis and do not, is an error where
# it crosses the function, not ten calls later. foedus itself does not depend on jaxtyping: its modules import the
# names for type checkers only, and here they are put where annotations look for them. Functions without shapes in
# their annotations stay as they are, so that tests may hand them what a careless user would.

SHAPES = frozenset({"Bool", "Float", "Float64", "Int", "Int32", "Int64", "Shaped", "UInt32", "UInt64"})
PACKAGES = ("foedus.core", "foedus.secure", "foedus.tree", "foedus.sim", "foedus.record")

check = jaxtyping.jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))


class Checked:
    """A function that is checked when called here, and is itself again in another process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._call = check(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> Any:
        inner = "<locals>" in self.__qualname__
        return (operator.itemgetter(0), ((self.__wrapped__,),)) if inner else self.__qualname__


class Decorate(ast.NodeTransformer):
    """Decorates every function with a shape among its annotations."""

    method = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, method=True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        parts = [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation] + [node.returns]
        names = {n.id for part in parts if part for n in ast.walk(part) if isinstance(n, ast.Name)}
        wrapper = "__check__" if self.method else "__checked__"
        self._inside(node, method=False)
        if names & SHAPES:
            node.decorator_list.append(ast.Name(wrapper, ast.Load()))
        return node

    def _inside(self, node: ast.AST, *, method: bool) -> ast.AST:
        before, self.method = self.method, method
        self.generic_visit(node)
        self.method = before
        return node


class Loader(SourceFileLoader):
    """Reads the source anew, so that no cached bytecode is read or written."""

    def get_code(self, fullname: str) -> CodeType:
        tree = Decorate().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class Finder(PathFinder):
    """Finds the modules of ``PACKAGES``."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(PACKAGES):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


for name in SHAPES:
    setattr(builtins, name, getattr(jaxtyping, name))
builtins.__check__, builtins.__checked__ = check, Checked  # type: ignore[attr-defined]
assert "foedus.core" not in sys.modules, "foedus was imported before its shapes could be checked"
sys.meta_path.insert(0, Finder)
