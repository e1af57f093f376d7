"""What keeps failing is told once and shown; what cannot work is refused before a join command is printed."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import foedus as fd
from foedus.errors import ConfigurationError, StorageError
from foedus.net.blobs import tried
from foedus.net.serve import Server
from foedus.net.served import Served
from foedus.net.serving import Serving
from foedus.net.troubles import FILE, Troubles, shown

TASK, ALGORITHM = fd.Task(fd.logistic(2, 2)), fd.fedavg(fd.local_sgd(0.1))
FULL = StorageError("the disk is full")


def test_the_same_failure_is_told_ever_more_rarely(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "foedus.server")
    now = [1000.0]
    troubles = Troubles(lambda: now[0], tmp_path)
    for _ in range(1200):  # eight times a second, for 150 seconds
        troubles.failed("tick failed", FULL)
        now[0] += 0.125
    assert [(r.getMessage(), r.told.get("times")) for r in caplog.records] == [
        ("tick failed", times) for times in (None, 81, 241, 561)
    ]  # fmt: skip
    (found,) = shown(tmp_path)
    assert (found.what, found.why, found.since) == ("tick failed", "StorageError: the disk is full", 1000.0)
    troubles.failed("tick failed", ValueError("another"))
    assert "Traceback" not in caplog.records[0].told.get("trace", "")
    assert "ValueError: another" in caplog.records[-1].told["trace"]
    now[0] += 6.0
    assert troubles.lasting() == []
    assert caplog.records[-1].told["times"] == 1200
    assert not (tmp_path / FILE).exists()


def test_what_a_process_before_left_is_over(tmp_path: Path) -> None:
    Troubles(lambda: 0.0, tmp_path).failed("tick failed", FULL)
    assert shown(tmp_path)
    Troubles(lambda: 0.0, tmp_path)
    assert not shown(tmp_path)


def test_where_there_is_no_log_what_fails_is_said_in_full() -> None:
    code = """
import logging
from foedus.net.logs import say
say("few contributors", level=logging.WARNING, told="2")
say("tick failed", level=logging.ERROR, error="the disk is full", times=7)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == "foedus: tick failed: the disk is full; times: 7\n"


def test_weights_that_are_not_of_the_model_are_refused_at_the_start(tmp_path: Path) -> None:
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "wrong.safetensors")
    served = Served(name="run", task=TASK, algorithm=ALGORITHM, rounds=1, start=str(tmp_path / "wrong.safetensors"))
    with pytest.raises(ConfigurationError, match=r"the weights to start from lack .*; they have: other"):
        Server([served], Serving(folder=tmp_path / "server", port=0))


def test_a_place_where_nothing_can_be_kept_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    served = Served(name="run", task=TASK, algorithm=ALGORITHM, rounds=1)
    with pytest.raises(ConfigurationError, match=r"models cannot be kept in .*: .*Name another place \(--blobs"):
        Server([served], Serving(folder=tmp_path / "server", port=0, blobs=str(tmp_path / "file" / "blobs")))
    assert list(tried(tmp_path / "blobs").digests()) == []


def test_no_rounds_are_nothing_to_serve() -> None:
    with pytest.raises(ConfigurationError, match="rounds must be a whole number of at least 1, not 0"):
        Served(name="run", task=TASK, algorithm=ALGORITHM, rounds=0)


def test_status_shows_what_fails(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from foedus.cli import foedus as command_line

    served = Served(name="run", task=TASK, algorithm=ALGORITHM, rounds=1)
    server = Server([served], Serving(folder=tmp_path, port=0))
    server._watch("storage failed", {"run": "run", "error": "the disk is full"})
    found = CliRunner().invoke(command_line, ["status", str(tmp_path)]).output
    server.close()
    assert "storage failed since" in found
    assert "1 times until" in found
    assert "the disk is full" in found


def test_a_run_has_a_name_that_fits_into_a_message() -> None:
    with pytest.raises(ConfigurationError, match=r"has 1 to 64 characters, and 'nnnn.* has 150"):
        Served(name="n" * 150, task=TASK, algorithm=ALGORITHM, rounds=1)
