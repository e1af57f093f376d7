"""Checkpoints: what was saved comes back, what was damaged is found out, and a crash leaves the one before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from foedus.errors import CheckpointError, StorageError
from foedus.record import checkpoint
from foedus.record.checkpoint import Checkpoint

arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
    hnp.arrays(
        st.sampled_from(["float32", "float64", "int64", "uint32", "bool"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=4,
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
values = st.dictionaries(st.text(max_size=5), plain, max_size=4)

SAMPLE = Checkpoint(
    {
        "vector": np.linspace(-1, 1, 40, dtype=np.float32),
        "server.m": np.arange(5.0),
        "costs.clients": np.arange(3),
    },
    {"round": 7, "identity": "abc", "lines": {"metrics.jsonl": [312, "d0"]}, "stopped": None},
)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.values == b.values and a.arrays.keys() == b.arrays.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((a.arrays[n], b.arrays[n]) for n in a.arrays)
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_checkpoint_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"of an earlier version")
    path.chmod(0o644)
    checkpoint.save(path, SAMPLE)
    assert path.stat().st_mode & 0o777 == 0o600


@given(arrays, values)
def test_what_was_saved_comes_back(tmp_path_factory: Any, arrays: dict[str, Any], values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("c") / "checkpoint"
    checkpoint.save(path, Checkpoint(arrays, values))
    assert same(checkpoint.load(path), Checkpoint(arrays, values))


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> bytes:
    path = tmp_path_factory.mktemp("c") / "checkpoint"
    checkpoint.save(path, SAMPLE)
    return path.read_bytes()


def survives(content: bytes, folder: Path) -> bool:
    """Whether the content is refused, or gives exactly what was saved (white space in a header may change)."""
    path = folder / "checkpoint"
    path.write_bytes(content)
    try:
        return same(checkpoint.load(path), SAMPLE)
    except CheckpointError as error:
        return "checkpoint" in str(error)


@settings(max_examples=300)
@given(st.data())
def test_flipped_bits_anywhere_are_found_out(written: bytes, tmp_path_factory: Any, data: st.DataObject) -> None:
    damaged = bytearray(written)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(written) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert survives(bytes(damaged), tmp_path_factory.getbasetemp())


@given(st.integers(0, 2000))
def test_a_file_cut_short_is_found_out(written: bytes, tmp_path_factory: Any, length: int) -> None:
    length = min(length, len(written) - 1)
    path = tmp_path_factory.getbasetemp() / "short"
    path.write_bytes(written[:length])
    with pytest.raises(CheckpointError, match=r"short is damaged.*Restore it from a copy, or delete"):
        checkpoint.load(path)


@given(st.binary(max_size=200))
def test_something_else_entirely_is_refused(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "other"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_a_model_file_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3)}, tmp_path / "model")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "model")


def test_a_later_version_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3)}, tmp_path / "c", metadata={"foedus": "2", "values": "{}", "digest": ""})
    with pytest.raises(CheckpointError, match="checkpoint version 2; this foedus reads version 1"):
        checkpoint.load(tmp_path / "c")


def test_a_failure_to_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    checkpoint.save(path, SAMPLE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*free some space"):
        checkpoint.save(path, SAMPLE._replace(values={"round": 8}))
    assert same(checkpoint.load(path), SAMPLE)
    assert os.listdir(tmp_path) == ["checkpoint"], "nothing half-written is left behind"
