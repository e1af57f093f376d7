"""Run folders: lines that count, lines that do not, and folders that are not what they seem."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foedus.errors import CheckpointError, ConfigurationError, StorageError
from foedus.record import RunFolder
from foedus.record.checkpoint import Checkpoint
from foedus.record.files import json_line, tensors
from foedus.record.folder import CHECKPOINT, CONFIGURATION, LOCAL, METRICS, MODEL, TIMINGS, lines, read

EMPTY = Checkpoint({"vector": np.zeros(2, np.float32)}, {"round": 0})


def line(number: int) -> dict[str, Any]:
    return {"round": number, "loss": 1 / number}


def filled(path: Path, *, saved: int, more: int = 0) -> None:
    """A folder of a run that was killed ``more`` rounds after its last checkpoint."""
    folder = RunFolder(path)
    folder.configure({"identity": "x"})
    for number in range(1, saved + more + 1):
        folder.append(METRICS, line(number))
        folder.append(TIMINGS, {"round": number, "seconds": 0.1})
        if number == saved:
            folder.checkpoint(EMPTY)
    folder.close()


@given(st.integers(0, 5), st.integers(0, 5))
def test_lines_after_the_checkpoint_do_not_count(tmp_path_factory: Any, saved: int, more: int) -> None:
    path = tmp_path_factory.mktemp("run")
    filled(path, saved=saved, more=more)
    folder = RunFolder(path)
    found = folder.restore()
    assert (found is None) == (saved == 0)
    folder.append(METRICS, line(saved + 1))
    folder.close()
    assert lines(path / METRICS) == [line(n) for n in range(1, saved + 2)]
    assert len(lines(path / TIMINGS)) == saved


def test_a_folder_that_goes_on_twice_knows_all_its_lines(tmp_path: Path) -> None:
    filled(tmp_path, saved=2, more=1)
    folder = RunFolder(tmp_path)
    folder.restore()
    folder.append(METRICS, line(3))
    folder.checkpoint(EMPTY)
    folder.close()
    again = RunFolder(tmp_path)
    assert again.restore() is not None
    again.close()
    assert [m["round"] for m in read(tmp_path).metrics] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[:-1], "shorter"),
        (lambda text: text.replace(b"0.5", b"0.4"), "differs"),
        (lambda text: b" " + text, "differs"),
        (lambda text: text.replace(b"\n", b"\r\n"), "differs"),
        (lambda text: b"", "shorter"),
    ],
)
def test_lines_that_count_and_were_edited_are_refused_and_left_as_they_are(
    tmp_path: Path, change: Any, told: str
) -> None:
    filled(tmp_path, saved=3)
    edited = change((tmp_path / METRICS).read_bytes())
    (tmp_path / METRICS).write_bytes(edited)
    folder = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=f"{METRICS} .*{told}.*was it edited"):
        folder.restore()
    folder.close()
    assert (tmp_path / METRICS).read_bytes() == edited


def test_lines_that_do_not_count_may_be_damaged(tmp_path: Path) -> None:
    filled(tmp_path, saved=2, more=2)
    text = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(text[:-9] + b"\x00")
    folder = RunFolder(tmp_path)
    assert folder.restore() is not None
    folder.close()
    assert [m["round"] for m in lines(tmp_path / METRICS)] == [1, 2]


def test_lines_without_a_configuration_belong_to_nobody_knows_what(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"round": 1}\n')
    folder = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds metrics\.jsonl but no run\.json"):
        folder.configuration()
    folder.close()


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.configuration() is None
    assert folder.restore() is None
    folder.close()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"identity": "x"', "\xff"])
def test_a_damaged_configuration_is_said_to_be(tmp_path: Path, content: str) -> None:
    (tmp_path / CONFIGURATION).write_bytes(content.encode("latin-1"))
    folder = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"run.json is damaged"):
        folder.configuration()
    folder.close()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("something else")
    with pytest.raises(StorageError, match=r"could not be written"):
        RunFolder(tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    script = "import sys; from pathlib import Path; from foedus.record import RunFolder; RunFolder(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ConfigurationError: another process is writing" in second.stderr
    folder.close()
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


# --- reading ------------------------------------------------------------------------------------------------


def test_a_folder_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.configure({"seed": 3})
    folder.append(METRICS, line(1))
    folder.flush()
    found = read(tmp_path)
    folder.close()
    assert (found.folder, found.configuration, found.metrics, found.timings) == (
        tmp_path,
        {"seed": 3},
        [line(1)],
        [],
    )


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b'{"round": 1}\n{"round": 2')
    assert lines(tmp_path / METRICS) == [{"round": 1}]


@pytest.mark.parametrize("bad", [b"{round: 2}", b"7", b"", b"\xff"])
def test_a_damaged_line_is_named_by_number(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b'{"round": 1}\n' + bad + b'\n{"round": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged in line 2"):
        lines(tmp_path / METRICS)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no run folder: it has no run.json"):
        read(tmp_path)


# --- what is written ----------------------------------------------------------------------------------------


def test_equal_values_are_equal_bytes_and_what_is_no_number_is_null() -> None:
    values = {
        "a": np.float32(0.5),
        "b": [np.int64(3), float("nan"), float("inf")],
        "c": {"d": np.bool_(True)},
        "é": "ü",
    }
    text = json_line(values)
    assert text == json_line(values)
    assert json.loads(text) == {"a": 0.5, "b": [3, None, None], "c": {"d": True}, "é": "ü"}
    assert text.endswith(b"}\n")
    assert text.count(b"\n") == 1


def test_models_and_costs(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = RunFolder(tmp_path, more=[LOCAL])
    folder.save_model({"w": np.arange(6.0).reshape(2, 3).T}, {"round": "3"})
    folder.save_costs([{"client": "a", "bytes_up": 5.0}, {"client": 2, "bytes_up": 0.0}])
    folder.append(LOCAL, {"round": 1})
    folder.close()
    np.testing.assert_array_equal(load_file(tmp_path / MODEL)["w"], np.arange(6.0).reshape(2, 3).T)
    assert lines(tmp_path / "costs.jsonl") == [
        {"client": "a", "bytes_up": 5.0},
        {"client": 2, "bytes_up": 0.0},
    ]
    assert lines(tmp_path / LOCAL) == [{"round": 1}]


kinds = st.sampled_from(["f4", "f8", "i8", "u1", "?"])


@given(
    st.dictionaries(st.text(max_size=3), st.tuples(kinds, st.lists(st.integers(0, 3), max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=6),
)
def test_equal_tensors_are_equal_bytes_and_any_reader_reads_them(shapes: Any, about: dict[str, str]) -> None:
    from safetensors.numpy import load

    shapes.pop("__metadata__", None)
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 9, shape).astype(kind) for name, (kind, shape) in shapes.items()}
    packed = {tensors(arrays, dict(sorted(about.items(), reverse=i % 2 == 1))) for i in range(4)}
    assert len(packed) == 1
    found = load(content := packed.pop())
    assert found.keys() == arrays.keys()
    assert all(found[n].dtype == a.dtype and np.array_equal(found[n], a) for n, a in arrays.items())
    size = int.from_bytes(content[:8], "little")
    assert (size % 8, json.loads(content[8 : 8 + size])["__metadata__"]) == (0, about)


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_folder_that_is_a_file_is_told_to_be_one(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"could not be written: .*file is a file\. Choose another run folder"):
        RunFolder(tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_checkpoint_is_the_last_thing_that_is_renamed(tmp_path: Path) -> None:
    filled(tmp_path, saved=2)
    assert {p.name for p in tmp_path.iterdir()} == {METRICS, TIMINGS, CONFIGURATION, CHECKPOINT}
