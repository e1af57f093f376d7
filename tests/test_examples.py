"""Every example runs as a user would run it, in a folder of its own, and is no longer than it may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# What the last lines say, if it went as it should.
TOLD = {
    "algorithms": "★ best",
    "first_model": "the first test image shows a 3",
    "frame": "of the way",
    "hospitals_encrypted": "accuracy 0.9",
    "hospitals_network": "accuracy 0.9",
    "jax_model": "(64, 32)",
    "phones": "J on all phones together",
}


def test_there_is_an_expectation_and_a_line_in_the_readme_for_each() -> None:
    assert {path.stem for path in EXAMPLES} == set(TOLD)
    readme = (EXAMPLES[0].parent / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_explained(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""')


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_offline(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"FOEDUS_DATA": str(tmp_path / "nothing"), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert TOLD[path.stem] in done.stdout
