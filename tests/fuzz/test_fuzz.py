"""The decoders hold for some seconds of bytes that are steered by which lines they reach."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("wire", "blob", "update")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_end_in_anything_but_an_error_of_ours(tmp_path: Path, target: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is for Linux on x86-64")
    script = Path(__file__).with_name("decoder.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    how = ["-runs=20000", "-seed=1", "-max_len=4096", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, str(script), target, *how],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    covered = [int(found) for found in re.findall(r"cov: (\d+)", done.stderr)]
    assert covered[-1] > 50, "it does not get past the door"
