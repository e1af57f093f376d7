"""The how-to on data: every snippet runs as it stands, one after another."""

import os
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "data.md"
BLOCK = re.compile(r"(<!-- needs FOEDUS_DATA -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.slow  # loads torch, pandas, scikit-learn and matplotlib
def test_the_snippets_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    for package in ("torch", "pandas", "sklearn", "matplotlib", "narwhals", "pyarrow"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names, ran = {}, 0
    for needs_data, code in BLOCK.findall(PAGE.read_text()):
        if needs_data and not os.environ.get("FOEDUS_DATA"):
            continue
        exec(compile(code, str(PAGE), "exec"), names)
        ran += 1
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"^print\(.*\)\s+# (.*)$", code, re.MULTILINE)
        assert [line for line in promised if line not in printed] == []
    assert ran >= 14
    assert (tmp_path / "partition.png").exists()
