"""foedus in a real notebook kernel: an event loop runs there already, and models are classes of a cell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the dev extra (nbclient, ipykernel)")
nbformat = pytest.importorskip("nbformat")

pytestmark = pytest.mark.slow

SETUP = """
import asyncio
import numpy as np, torch
import foedus as fd

assert asyncio.get_running_loop().is_running()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

def loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)

draw = np.random.default_rng(0)
clients = fd.Clients.of({i: (draw.normal(size=(9, 4)), draw.integers(0, 3, 9)) for i in range(4)})
clients = clients.with_test((draw.normal(size=(9, 4)), draw.integers(0, 3, 9)))
task = fd.Task(Net, loss, metrics=[fd.accuracy])
algorithm = fd.fedavg(fd.local_sgd(lr=0.1, batch_size=4))
"""

CELL = """
run = fd.simulate(task, algorithm, clients, rounds=2,
                  settings=fd.Settings(executor=fd.executors.{name}(), folder="runs/{name}"))
print(sorted(run.final), isinstance(run.model, Net))
"""


@pytest.mark.parametrize("name", ["auto", "processes", "compiled", "vectorised"])
def test_a_cell_with_its_own_model_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    assert os.environ["PYDEVD_DISABLE_FILE_VALIDATION"]
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, CELL.format(name=name))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()
    printed = "".join(o.get("text", "") for o in done.cells[1].outputs if o.output_type == "stream")
    assert "['accuracy', 'loss'] True" in printed
    assert (tmp_path / "runs" / name / "metrics.jsonl").read_bytes().count(b"\n") == 2
