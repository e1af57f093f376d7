"""``foedus audit`` from the command line: a report, kept in the run's folder, and not made twice."""

from pathlib import Path

import pytest

from foedus.cli import run

SOURCE = """
import numpy as np
import foedus as fd

draws = np.random.default_rng(0)
x = draws.random((60, 12)).astype("f4")
y = (x[:, 0] > 0.5).astype(int)
clients = fd.Clients.of({i: (x[i::5][:8], y[i::5][:8]) for i in range(5)}, central_test=(x[40:], y[40:]))
task = fd.Task(fd.logistic(12, 2), metrics=[fd.accuracy])
federation = fd.Federation(task=task, algorithm=fd.fedavg(fd.local_sgd(0.5)), clients=clients, rounds=3)
"""


@pytest.mark.slow
def test_it_reports_and_goes_on(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audited_small.py").write_text(SOURCE)
    words = [
        "audit",
        "audited_small.py",
        "--folder",
        "runs/one",
        "--executor",
        "debug",
        "--canaries",
        "4",
        "--no-progress",
    ]
    assert run(words) == 0
    first = capsys.readouterr().out
    assert "# Privacy audit" in first
    assert "What to switch on" in first
    assert (tmp_path / "runs/one/audit/report.html").exists()
    assert (tmp_path / "runs/one/model.safetensors").exists()
    stamp = (tmp_path / "runs/one/audit/audit.json").stat().st_mtime_ns
    assert run(words) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "runs/one/audit/audit.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_another_effort_does_again_what_depends_on_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audited_again.py").write_text(SOURCE)
    words = ["audit", "audited_again.py", "--folder", "runs/one", "--executor", "debug"]
    assert run([*words, "--canaries", "0"]) == 0
    assert "canaries" not in capsys.readouterr().err
    assert run([*words, "--canaries", "4"]) == 0
    told = capsys.readouterr().err
    assert "membership: done before" in told
    assert "canaries: done" in told
    assert run([*words, "--canaries", "4", "--rounds", "2"]) == 2  # another run than the folder's
