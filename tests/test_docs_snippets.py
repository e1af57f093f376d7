"""Every piece of Python on the pages that teach really runs, page by page, as a reader would paste it.

Pages that speak of ``task``, ``algorithm`` and ``clients`` get them from the prelude; the number of rounds is made
small. docs/howto/data.md has a test of its own (tests/data/test_howto.py).
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ITS_OWN = ROOT / "docs" / "howto" / "data.md"
TEACHING = [
    ROOT / "README.md",
    ROOT / "docs" / "tutorial.md",
    *sorted(
        page
        for page in (ROOT / "docs" / "howto").glob("*.md")
        if page != ITS_OWN and "```python" in page.read_text("utf-8")
    ),  # some, like Kafka's, are commands only
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WHOLE = {"README.md", "tutorial.md"}  # they begin at nothing

PRELUDE = """
import torch
import foedus as fd

make = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
task = fd.Task(make, torch.nn.functional.cross_entropy, metrics=[fd.accuracy])
clients = fd.data.digits().partition(fd.data.iid(30))
algorithm = fd.fedavg(fd.local_sgd(lr=0.1, batch_size=10))
"""


def blocks(page: Path) -> list[str]:
    """The page's Python, each block padded with blank lines so that a traceback says the page's own line."""
    text = page.read_text("utf-8")
    return ["\n" * text[: found.start(1)].count("\n") + found[1] for found in BLOCK.finditer(text)]


def quick(code: str) -> str:
    return re.sub(r"\brounds=\d+", "rounds=2", code)


@pytest.mark.slow  # each page trains some federations
@pytest.mark.parametrize("page", TEACHING, ids=lambda page: page.name)
def test_every_snippet_of_a_page_runs(page, tmp_path, monkeypatch):
    for package in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    if "TensorBoard" in page.read_text("utf-8"):
        for package in ("tensorboard", "mlflow"):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {}
    if page.name not in WHOLE:
        exec(PRELUDE, names)
    assert blocks(page)
    for code in blocks(page):
        exec(compile(quick(code), str(page), "exec"), names)


def test_the_first_own_program_is_short():
    """At most 25 lines in all, and at most 15 of them foedus's."""
    program = blocks(ROOT / "README.md")[0]
    parts = program.split("# --- what foedus adds")
    own, added = ([line for line in part.split("\n") if line.strip()] for part in parts)
    assert len(own) + len(added) <= 25
    assert len(added) <= 15
