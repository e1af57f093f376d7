"""The package's names, and that it is a verb as well."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import foedus as fd
from foedus import audit

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "audit.md"


@pytest.mark.parametrize("name", audit.__all__)
def test_every_name_is_there_documented_and_has_an_example(name):
    value = getattr(audit, name)
    assert ">>> " in value.__doc__
    assert name in REFERENCE.read_text("utf-8")


def test_type_checkers_see_the_names_that_are_there():
    block = next(n for n in ast.parse(Path(audit.__file__).read_text("utf-8")).body if isinstance(n, ast.If))
    seen = {a.asname: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    assert seen == {name: f"foedus.audit.{home}" for name, home in audit._HOMES.items()}
    assert list(audit._HOMES) == sorted(audit._HOMES)


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        audit.nonsense  # noqa: B018


@pytest.mark.slow
def test_the_package_loads_no_framework_and_can_be_called():
    script = "import json, sys; from foedus import audit; print(json.dumps([callable(audit), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [True, False]
    assert fd.audit is audit
