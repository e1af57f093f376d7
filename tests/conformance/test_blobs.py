"""What every place for blobs must do: a folder, memory, an object store."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import CheckpointError, ConfigurationError, StorageError
from foedus.net.blobs import Blobs, FolderBlobs, name_of, open_blobs

from ..net.databases import s3


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blobs]:
    if request.param == "s3":
        with s3() as url:
            yield open_blobs(url)
    else:
        yield open_blobs(tmp_path / "blobs" if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def test_what_was_put_is_got(blobs: Blobs) -> None:
    assert list(blobs.digests()) == []
    contents = [b"", b"a", os.urandom(1 << 20)]
    names = [blobs.put(content) for content in contents]
    assert names == [hashlib.sha256(content).hexdigest() for content in contents]
    assert [blobs.get(name) for name in names] == contents
    assert sorted(blobs.digests()) == sorted(names), "and nothing is left beside them"
    assert blobs.put(contents[1]) == names[1]
    assert sorted(blobs.digests()) == sorted(names), "putting twice is putting once"


def test_what_was_removed_is_not_there(blobs: Blobs) -> None:
    name = blobs.put(b"x")
    assert blobs.has(name)
    blobs.remove(name)
    blobs.remove(name)
    assert not blobs.has(name)
    with pytest.raises(CheckpointError, match=f"no blob {name}"):
        blobs.get(name)
    assert blobs.put(b"x") == name
    assert blobs.get(name) == b"x"


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "A" * 64, "g" * 64, "a" * 63 + "/"])
def test_only_digests_name_blobs(tmp_path: Path, name: str) -> None:
    for place in (open_blobs(tmp_path), open_blobs("memory://names")):
        for act in (place.get, place.has, place.remove):
            with pytest.raises(ConfigurationError, match="64 hexadecimal digits"):
                act(name)


@given(at=st.integers(0, 999), bit=st.integers(0, 7))
def test_a_damaged_blob_is_not_given(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    place = open_blobs(folder)
    name = place.put(bytes(1000))
    path = folder / name[:2] / name
    spoilt = bytearray(path.read_bytes())
    spoilt[at] ^= 1 << bit
    path.write_bytes(spoilt)
    with pytest.raises(CheckpointError, match="damaged"):
        place.get(name)


def test_a_crash_while_writing_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderBlobs(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        place.put(b"a model")
    assert list(place.digests()) == []
    assert not place.has(name_of(b"a model"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_places_that_are_none_are_named() -> None:
    with pytest.raises(ConfigurationError, match="nonsense://"):
        open_blobs("nonsense://x")
