"""Source bundles: the same bytes for the same sources, nothing in them that is hidden, nothing run unapproved."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import BundleRefused, ConfigurationError
from foedus.net.bundle import MOST_BYTES, MOST_FILES, Bundle, build, differences, import_bundle, read_bundle, unpack

PLAIN = {"task.py": b"from model import width\nanswer = width + 1\n", "model.py": b"width = 41\n"}


def kept(bundle: Bundle, folder: Path) -> Path:
    path = folder / "bundle"
    path.write_bytes(bundle.content)
    return path


# --- building ---------------------------------------------------------------------------------------------------


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order a disk lists them in, whenever they were written, with whatever lies beside them."""
    digests = set()
    for number in range(3):
        folder = tmp_path / str(number)
        (folder / "pkg").mkdir(parents=True)
        (folder / "__pycache__").mkdir()
        (folder / ".git").mkdir()
        names = ["b.py", "a.py", "pkg/__init__.py", "pkg/c.py", "words.txt"]
        random.Random(number).shuffle(names)
        for name in names:
            (folder / name).write_bytes(f"x = {len(name)}\n".encode())
            os.utime(folder / name, (number, number))
        (folder / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"\x00" * number)
        (folder / ".git" / "hook.py").write_bytes(b"import os\n" * number)
        bundle = build(folder, data=["words.txt"])
        assert list(bundle.files) == ["a.py", "b.py", "pkg/__init__.py", "pkg/c.py", "words.txt"]
        digests.add(bundle.digest)
    assert len(digests) == 1


def test_version_1_is_these_bytes() -> None:
    """Approvals go by the digest: it must never change for the same sources."""
    assert Bundle.of(PLAIN).digest.hex() == DIGEST
    assert read_bundle(Bundle.of(PLAIN).content, bytes.fromhex(DIGEST)).files == PLAIN


DIGEST = "e53725dbda64746ed04de073c189fe50dc3eebd19ca525703c42fa3b7029da41"


@given(  # of letters that spell none of Windows' devices, which are refused
    st.dictionaries(
        st.from_regex(r"[d-k]{1,4}(/[d-k]{1,3})?\.(py|txt)", fullmatch=True), st.just(b"x = 1\n"), min_size=1
    )
)
def test_what_is_packed_is_read(files: dict[str, bytes]) -> None:
    bundle = Bundle.of(files)
    again = read_bundle(bundle.content, bundle.digest)
    assert again == bundle
    assert again.files == files


def test_building_says_what_does_not_belong(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("x = 1\n")
    secret = tmp_path.parent / f"{tmp_path.name}-secret.py"
    secret.write_text("password = 1\n")
    (tmp_path / "link.py").symlink_to(secret)
    with pytest.raises(ConfigurationError, match=r"link\.py is a link or lies outside"):
        build(tmp_path)
    (tmp_path / "link.py").unlink()
    with pytest.raises(ConfigurationError, match="lies outside"):
        build(tmp_path, data=[f"../{secret.name}"])
    with pytest.raises(ConfigurationError, match="is not there"):
        build(tmp_path, data=["words.txt"])
    with pytest.raises(ConfigurationError, match="neither a file nor a folder"):
        build(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no Python source"):
        build(tmp_path / "empty")
    assert build(tmp_path / "task.py").files == {"task.py": b"x = 1\n"}


# --- hostile bundles ----------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "1 to 256 files, not 0"),
    "parent": ({"../task.py": b""}, "cannot be a path"),
    "inner parent": ({"a/../../task.py": b""}, "cannot be a path"),
    "absolute": ({"/etc/task.py": b""}, "cannot be a path"),
    "drive": ({"C:task.py": b""}, "cannot be a path"),
    "backslash": ({"a\\task.py": b""}, "cannot be a path"),
    "empty part": ({"a//task.py": b""}, "cannot be a path"),
    "null": ({"a\0.py": b""}, "cannot be a path"),
    "newline": ({"a\n.py": b""}, "cannot be a path"),
    "hidden": ({".bashrc.py": b""}, "cannot be a path"),
    "a device": ({"NUL.py": b""}, "cannot be a path"),
    "trailing dot": ({"a./b.py": b""}, "cannot be a path"),
    "deep": ({"/".join("abcdefghij") + ".py": b""}, "cannot be a path"),
    "long": ({"a" * 200 + ".py": b""}, "cannot be a path"),
    "capitals": ({"Task.py": b"", "task.py": b""}, "differ in capitals only"),
    "compiled": ({"task.so": b"\x7fELF"}, "never taken"),
    "bytecode": ({"task.pyc": b""}, "never taken"),
    "a pickle": ({"weights.pkl": b""}, "never taken"),
    "a path file": ({"site.pth": b""}, "never taken"),
    "no suffix": ({"run": b"#!/bin/sh"}, "never taken"),
    "no module": ({"my-task.py": b""}, "cannot be imported by that name"),
    "no text": ({"task.py": b"x = '\xff'"}, "not UTF-8"),
    "no Python": ({"task.py": b"x = = 1"}, "is not Python"),
    "null in source": ({"task.py": b"x = 1\0"}, "U\\+0000"),
    "turned around": ({"task.py": "x = 1  # \u202e\u2066 admin".encode()}, "line 1, has the character U\\+202E"),
    "invisible": ({"task.py": "\n\nx\u200b = 1".encode()}, "line 3, has the character U\\+200B"),
    "escape": ({"task.py": b"# \x1b[2J clears the screen"}, "U\\+001B"),
    "another encoding": ({"task.py": b"# coding: utf-7\nx = 1"}, "declares the encoding utf-7"),
    "nested": ({"task.py": b"(" * 100_000}, "is not Python"),
    "large": ({"task.py": b"#" * 600_000}, "has 600000 bytes"),
    "heavy": ({"data.csv": b"1" * MOST_BYTES}, "do not belong in it"),
    "many": ({f"m{n}.py": b"" for n in range(MOST_FILES + 1)}, "1 to 256 files"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_could_harm_a_reader_is_refused_when_built_and_when_read(name: str) -> None:
    files, told = HOSTILE[name]
    with pytest.raises(BundleRefused, match=told):
        Bundle.of(files)
    content = msgpack.packb(["foedus bundle", 1, sorted(files.items())])
    with pytest.raises(BundleRefused):
        read_bundle(content, hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"\xc1",
        msgpack.packb({"files": []}),
        msgpack.packb(["foedus bundle", 1]),
        msgpack.packb(["foedus bundle", 2, [["a.py", b""]]]),
        msgpack.packb(["foedus bundle", 1, [["a.py", "text"]]]),
        msgpack.packb(["foedus bundle", 1, [["a.py"]]]),
        msgpack.packb(["foedus bundle", 1, [[1, b""]]]),
        msgpack.packb(["foedus bundle", 1, [["b.py", b""], ["a.py", b""]]]),  # in another order
        msgpack.packb(["foedus bundle", 1, [["a.py", b""], ["a.py", b""]]]),
        msgpack.packb(["foedus bundle", 1, [["a.py", b""]]]) + b"\x00",
        msgpack.packb(["foedus bundle", 1, [["a.py", b""]]]).replace(b"\xc4\x00", b"\xc5\x00\x00"),  # written longer
        b"\xdd\xff\xff\xff\xff",  # says that four thousand million entries follow
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        bytes(MOST_BYTES + 1),
    ],
)
def test_bytes_that_are_no_bundle_are_refused(told: bytes) -> None:
    with pytest.raises(BundleRefused):
        read_bundle(told, hashlib.sha256(told).digest())


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_found(at: int, flip: int) -> None:
    bundle = Bundle.of(PLAIN)
    content = bytearray(bundle.content)
    content[at % len(content)] ^= flip
    with pytest.raises(BundleRefused, match="changed or cut"):
        read_bundle(bytes(content), bundle.digest)
    with contextlib.suppress(BundleRefused):  # under its own digest it is another bundle, or none
        assert read_bundle(bytes(content), hashlib.sha256(content).digest()).digest != bundle.digest


# --- reading it -----------------------------------------------------------------------------------------------------


def test_differences_show_what_changed_and_cannot_play_with_a_terminal() -> None:
    old = Bundle.of({**PLAIN, "gone.py": b"x = 1\n", "data.npy": b"\x93NUMPY\x00"})
    new = Bundle.of({**PLAIN, "model.py": b"width = 40\n", "words.txt": b"a\x1b[2J\n", "data.npy": b"\x93NUMPY\xff"})
    told = differences(old, new)
    assert "-width = 41\n+width = 40" in told
    assert "+++ nothing" in told
    assert "--- nothing\n+++ words.txt (new)" in told
    assert "\x1b" not in told
    assert "a\\x1b[2J" in told
    assert "[7 bytes of .npy, SHA-256 " in told
    assert "task.py" not in told
    assert differences(new, new) == ""
    assert "+answer = width + 1" in differences(None, new)


def test_unpacking_writes_the_files_and_nothing_else(tmp_path: Path) -> None:
    bundle = Bundle.of({**PLAIN, "pkg/inner.py": b""})
    unpack(bundle, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in tmp_path.rglob("*.py")}
    assert found == dict(bundle.files)
    with pytest.raises(FileExistsError):
        unpack(bundle, tmp_path / "out")


# --- importing it ---------------------------------------------------------------------------------------------------


def test_a_bundle_is_imported_under_a_name_of_its_own(tmp_path: Path) -> None:
    """Two tasks that both have a model.py do not meet, nor do they shadow anybody's."""
    for number in (41, 99):
        bundle = Bundle.of({**PLAIN, "model.py": f"width = {number}\n".encode()})
        assert import_bundle(kept(bundle, tmp_path), bundle.digest, "task:answer") == number + 1
    assert "model" not in sys.modules
    assert "task" not in sys.modules


def test_every_way_of_importing_finds_the_bundles_own(tmp_path: Path) -> None:
    files = {
        "pkg/__init__.py": b"",
        "pkg/inner.py": b"from . import sibling\nfrom .sibling import value\nfrom ..top import base\n",
        "pkg/sibling.py": b"value = 1\n",
        "pkg/deep/leaf.py": b"import json\nfrom pkg.sibling import value as v\nleaf = json.dumps(v)\n",
        "top.py": b"base = 2\nimport pkg.inner\nimport pkg.deep.leaf as l\nfrom pkg import sibling, inner as i\n"
        b"from pkg.sibling import *\nfrom os import path\n"
        b"def late():\n    import pkg.sibling\n    return pkg.sibling.value\n"
        b"found = (pkg.inner.value, l.leaf, sibling.value, i.base, value, late())\n"
        b"class Net:\n    pass\n",
    }
    bundle = Bundle.of(files)
    path = kept(bundle, tmp_path)
    assert import_bundle(path, bundle.digest, "top:found") == (1, "1", 1, 2, 1, 1)
    net = import_bundle(path, bundle.digest, "top:Net")
    assert net is import_bundle(path, bundle.digest, "top:Net")
    assert net.__module__ == f"foedus_task_{bundle.digest.hex()[:24]}.top"
    import inspect

    assert inspect.getsource(net) == "class Net:\n    pass\n"
    with pytest.raises(ConfigurationError, match="No module named"):
        import_bundle(path, bundle.digest, "nothing:found")


def test_data_beside_the_source_can_be_read(tmp_path: Path) -> None:
    source = b"from pathlib import Path\nwords = (Path(__file__).parent / 'words.txt').read_text()\n"
    bundle = Bundle.of({"task.py": source, "words.txt": b"one two"})
    assert import_bundle(kept(bundle, tmp_path), bundle.digest, "task:words") == "one two"


def test_what_is_not_what_was_approved_does_not_run(tmp_path: Path) -> None:
    """Neither another bundle in the file's place, nor a damaged one, nor a target that is an expression."""
    mark = tmp_path / "it-ran"
    bad = Bundle.of({"task.py": f"open({str(mark)!r}, 'w')\nx = 1\n".encode()})
    path = kept(bad, tmp_path)
    with pytest.raises(BundleRefused, match="was expected"):
        import_bundle(path, Bundle.of(PLAIN).digest, "task:x")
    for target in ("task", "task:", "task:x()", "os:system", "task:__import__('os')", "../task:x", "task.x:y;z", ""):
        with pytest.raises((BundleRefused, ConfigurationError)):
            import_bundle(path, Bundle.of(PLAIN).digest, target)
    path.write_bytes(bytes(MOST_BYTES + 1))
    with pytest.raises(BundleRefused, match="is no source bundle"):
        import_bundle(path, bad.digest, "task:x")
    assert not mark.exists()


def test_code_that_fails_is_told_with_its_place(tmp_path: Path) -> None:
    bundle = Bundle.of({"task.py": b"x = 1\n\ny = x / 0\n"})
    with pytest.raises(ConfigurationError, match="ZeroDivisionError: division by zero") as told:
        import_bundle(kept(bundle, tmp_path), bundle.digest, "task:y")
    assert told.value.__cause__ is not None
    import traceback

    shown = "".join(traceback.format_exception(told.value.__cause__))
    assert "task.py" in shown
    assert "y = x / 0" in shown
    fine = Bundle.of({"task.py": b"x = 1\n"})
    with pytest.raises(ConfigurationError, match="has no attribute 'z'"):
        import_bundle(kept(fine, tmp_path), fine.digest, "task:z")


@pytest.mark.slow
def test_reading_and_comparing_imports_nothing(tmp_path: Path) -> None:
    """In a fresh interpreter: build, read, compare, unpack; the module's code would leave a mark."""
    mark = tmp_path / "it-ran"
    source = tmp_path / "task.py"
    source.write_text(f"open({str(mark)!r}, 'w')\n")
    script = f"""
        import sys
        from pathlib import Path
        from foedus.net import bundle
        made = bundle.build(Path({str(source)!r}))
        bundle.differences(None, bundle.read_bundle(made.content, made.digest))
        bundle.unpack(made, Path({str(tmp_path / "out")!r}))
        assert not any("task" in name for name in sys.modules)
    """
    import textwrap

    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
    assert not mark.exists()
