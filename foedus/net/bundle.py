"""Source bundles: the code of a task, as it travels, is read, approved, and only then imported.

A bundle is a list of small files, sorted by path, in MessagePack: no times, no modes, no compression, so that the same
sources give the same bytes everywhere, its SHA-256 is what an owner approves, and nothing can swell when it is
unpacked. It holds Python source and declared data files, nothing that is compiled. What a reader cannot see is
refused: source that is not UTF-8, that does not parse, or that has characters which turn text around (Boucher, Anderson
2021, "Trojan Source"). Paths are plain: no ``..``, nothing absolute, nothing that another
operating system reads as another name.

Building checks what reading checks, so that a server finds out before its clients do. Reading re-encodes and compares:
one content has one digest.

`import_bundle` runs code from the bytes whose digest was approved, never from files on a disk, under a package name
made of the digest; an ``import`` in it finds the bundle's own modules first. Two bundles that both have a ``model.py``
do not meet.

Not here: who approves (``net/owner``), the server's signature over digest and target (``identity/signed.py``), walls
around code that runs (``net/sandbox.py``).
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import hmac
import importlib
import importlib.abc
import re
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

import msgpack

from foedus.errors import BundleRefused, ConfigurationError

__all__ = ["Bundle", "build", "differences", "import_bundle", "read_bundle", "unpack"]

MOST_FILES = 256
MOST_BYTES = 4 * 2**20  # of a whole bundle
LARGEST_SOURCE = 2**19
_LONGEST_PATH = 160
_DEEPEST = 8
_DATA = frozenset({".csv", ".json", ".md", ".npy", ".safetensors", ".toml", ".txt"})
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ELSEWHERE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices, on Windows
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@dataclass(frozen=True)
class Bundle:
    """Files by path, checked.

    Example:
        >>> bundle = Bundle.of({"task.py": b"answer = 42\\n"})
        >>> bundle.digest.hex()[:16], len(bundle.content)
        ('50bae904ba5db9ad', 40)

    Attributes:
        files: content by path, in the order of paths.
        content: the bytes as they travel.
    """

    files: Mapping[str, bytes] = field(repr=False)
    content: bytes = field(repr=False)

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> Bundle:
        """A bundle of files; raises `BundleRefused` where one cannot be in it."""
        _checked(files)
        ordered = {path: bytes(files[path]) for path in sorted(files)}
        return cls(ordered, msgpack.packb(["foedus bundle", 1, list(ordered.items())]))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content: what is approved."""
        return hashlib.sha256(self.content).digest()


def build(source: Path, *, data: Sequence[str] = ()) -> Bundle:
    """A bundle of a file of Python source, or of all of it in a folder.

    Args:
        source: a file (``federation.py``) or a folder. Hidden files and ``__pycache__`` stay out.
        data: files to take along that are no Python source, as paths within the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "model.py").write_text("width = 8")
        ...     _ = Path(folder, "task.py").write_text("from model import width")
        ...     list(build(Path(folder)).files)
        ['model.py', 'task.py']
    """
    if source.is_file():
        folder, found = source.parent, [source]
    elif source.is_dir():
        folder, found = source, [p for p in sorted(source.rglob("*.py")) if _visible(p.relative_to(source))]
    else:
        raise ConfigurationError(f"{source} is neither a file nor a folder of Python source")
    if not found:
        raise ConfigurationError(f"{source} has no Python source (*.py) in it")
    found += [folder / name for name in data]
    return Bundle.of({path.relative_to(folder).as_posix(): _content(path, folder) for path in found})


def read_bundle(content: bytes | memoryview, digest: bytes) -> Bundle:
    """A bundle out of bytes that came from elsewhere.

    Args:
        content: what came.
        digest: SHA-256 that the server signed, or the owner approved.

    Errors: `BundleRefused`.
    """
    if len(content) > MOST_BYTES:
        raise BundleRefused(f"the source bundle has {len(content)} bytes; at most {MOST_BYTES} are read")
    if not hmac.compare_digest(hashlib.sha256(content).digest(), digest):
        raise BundleRefused(
            f"the source bundle has the digest {hashlib.sha256(content).hexdigest()[:16]}…, and {digest.hex()[:16]}… "
            "was expected: it was changed or cut on its way, and nothing of it was used"
        )
    bundle = Bundle.of(dict(_listed(content)))
    if bundle.content != bytes(content):
        raise BundleRefused("the source bundle is not written in the one way that bundles are; nothing of it was used")
    return bundle


def differences(old: Bundle | None, new: Bundle) -> str:
    """What changed from one bundle to the next, as a unified diff; safe to show on a terminal.

    Args:
        old: what was approved before; None for nothing.
        new: what is to be approved.

    Example:
        >>> old, new = (Bundle.of({"task.py": text}) for text in (b"lr = 1\\n", b"lr = 2\\n"))
        >>> print(differences(old, new))
        --- task.py (approved)
        +++ task.py (new)
        @@ -1 +1 @@
        -lr = 1
        +lr = 2
    """
    before = {} if old is None else old.files
    told: list[str] = []
    for path in sorted({*before, *new.files}):
        if before.get(path) != new.files.get(path):
            told += _difference(path, before.get(path), new.files.get(path))
    return "\n".join(told)


def unpack(bundle: Bundle, folder: Path) -> None:
    """Write a bundle's files into a folder that does not exist yet, for reading or for tools.

    Args:
        bundle: checked when it was read.
        folder: made, with mode 0700; raises `FileExistsError` if it is there.
    """
    folder.mkdir(mode=0o700, parents=True)
    for path, content in bundle.files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "xb") as file:
            file.write(content)


def import_bundle(path: Path, digest: bytes, target: str) -> Any:
    """Import an approved bundle and return the object in it. This runs its code: call it behind walls, and only here.

    Args:
        path: the file that holds the bundle's bytes.
        digest: what was approved, as raw bytes; the file is compared with it, whatever it is called.
        target: ``"module:object"``.

    Errors: `BundleRefused` before anything runs; `ConfigurationError` if the code fails or has no such object.
    """
    if not _TARGET.fullmatch(target):
        raise BundleRefused(f"{target!r} names no object in a bundle; it is written module:object")
    if path.stat().st_size > MOST_BYTES:
        raise BundleRefused(f"{path} has more than {MOST_BYTES} bytes and is no source bundle")
    bundle = read_bundle(path.read_bytes(), digest)
    module, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(f"{_installed(bundle)}.{module}")
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigurationError(
            f"{target} could not be imported from the bundle {digest.hex()[:16]}…: {type(error).__name__}: {error}"
        ) from error
    return found


# --- what may be in a bundle ------------------------------------------------------------------------------------------


def _checked(files: Mapping[str, bytes]) -> None:
    if not 0 < len(files) <= MOST_FILES:
        raise BundleRefused(f"a source bundle has 1 to {MOST_FILES} files, not {len(files)}")
    if sum(map(len, files.values())) > MOST_BYTES - 2**16:
        raise BundleRefused(
            f"a source bundle has at most {MOST_BYTES - 2**16} bytes; this one has {sum(map(len, files.values()))}. "
            "Weights and data do not belong in it"
        )
    if len({path.lower() for path in files}) < len(files):
        raise BundleRefused(
            "two paths of the source bundle differ in capitals only, which some disks do not tell apart"
        )
    for path, content in files.items():
        _check_path(path)
        if path.endswith(".py"):
            _check_source(path, content)


def _check_path(path: str) -> None:
    parts = path.split("/")
    plain = all(
        _PART.fullmatch(p) and ".." not in p and not p.endswith(".") and not _ELSEWHERE.fullmatch(p) for p in parts
    )
    if not plain or len(path) > _LONGEST_PATH or len(parts) > _DEEPEST:
        raise BundleRefused(
            f"{path!r} cannot be a path in a source bundle: plain names of letters, digits, '_', '-' and '.', with '/' "
            f"between them, at most {_DEEPEST} deep and {_LONGEST_PATH} characters long"
        )
    suffix = PurePosixPath(path).suffix
    if suffix == ".py":
        names = [*parts[:-1], parts[-1].removesuffix(".py")]
        if not all(name.isidentifier() for name in names):
            raise BundleRefused(f"{path!r} is Python source that cannot be imported by that name; rename it")
    elif suffix not in _DATA:
        raise BundleRefused(
            f"{path!r} is neither Python source nor data that may travel with it ({', '.join(sorted(_DATA))}). "
            "Compiled code and pickles are never taken"
        )


def _check_source(path: str, content: bytes) -> None:
    if len(content) > LARGEST_SOURCE:
        raise BundleRefused(f"{path} has {len(content)} bytes; a file of source has at most {LARGEST_SOURCE}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleRefused(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    hidden = next((c for c in text if unicodedata.category(c) in ("Cf", "Cc") and c not in "\t\n\r\ufeff"), None)
    if hidden is not None:
        line = text[: text.index(hidden)].count("\n") + 1
        raise BundleRefused(
            f"{path}, line {line}, has the character U+{ord(hidden):04X}, which a reader cannot see; write it as "
            "an escape"
        )
    declared = re.search(r"^\s*#.*?coding[:=]\s*([-\w.]+)", "\n".join(text.split("\n")[:2]), re.MULTILINE)
    if declared and declared[1].lower() not in ("utf-8", "utf8"):
        raise BundleRefused(f"{path} declares the encoding {declared[1]}; source in a bundle is UTF-8")
    try:
        ast.parse(content, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BundleRefused(f"{path} is not Python: {error}") from error


def _listed(content: bytes | memoryview) -> list[tuple[str, bytes]]:
    """The files as they are listed, without a look at what they hold."""
    try:
        told = msgpack.unpackb(
            content,
            max_array_len=MOST_FILES,
            max_str_len=64 + _LONGEST_PATH,
            max_map_len=0,
            max_ext_len=0,
            strict_map_key=True,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BundleRefused("the bytes are no source bundle; nothing of them was used") from error
    if not isinstance(told, list) or len(told) != 3 or told[0] != "foedus bundle" or not isinstance(told[2], list):
        raise BundleRefused("the bytes are no source bundle; nothing of them was used")
    if told[1] != 1:
        raise BundleRefused(
            f"the source bundle is of version {told[1]!r}, and this foedus reads version 1; install a newer one"
        )
    listed = [tuple(e) for e in told[2] if isinstance(e, list) and len(e) == 2]
    if len(listed) != len(told[2]) or not all(isinstance(p, str) and isinstance(c, bytes) for p, c in listed):
        raise BundleRefused("the source bundle lists something that is no file; nothing of it was used")
    if len({path for path, _ in listed}) < len(listed):
        raise BundleRefused("the source bundle lists a path twice; nothing of it was used")
    return listed


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _content(path: Path, folder: Path) -> bytes:
    if path.is_symlink() or folder.resolve() not in path.resolve().parents:
        raise ConfigurationError(f"{path} is a link or lies outside {folder}; copy it there")
    if not path.is_file():
        raise ConfigurationError(f"{path} is not there")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigurationError(f"{path} is larger than a whole bundle may be ({MOST_BYTES} bytes)")
    return path.read_bytes()


# --- showing it -------------------------------------------------------------------------------------------------------


def _difference(path: str, old: bytes | None, new: bytes | None) -> list[str]:
    before = f"{path} (approved)" if old is not None else "nothing"
    after = f"{path} (new)" if new is not None else "nothing"
    return list(difflib.unified_diff(_lines(path, old), _lines(path, new), before, after, lineterm=""))


def _lines(path: str, content: bytes | None) -> list[str]:
    if content is None:
        return []
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return [
            f"[{len(content)} bytes of {PurePosixPath(path).suffix}, SHA-256 {hashlib.sha256(content).hexdigest()}]"
        ]
    return [
        "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line) for line in text.splitlines()
    ]


# --- importing it -----------------------------------------------------------------------------------------------------


def _installed(bundle: Bundle) -> str:
    """The name of the package that the bundle's modules are in; from now on they can be imported."""
    root = f"foedus_task_{bundle.digest.hex()[:24]}"
    if root not in sys.modules:
        sys.meta_path.insert(0, _Source(bundle, root))
        importlib.import_module(root)
    return root


class _Source(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules of one bundle, from its bytes."""

    def __init__(self, bundle: Bundle, root: str) -> None:
        self._bundle, self._root = bundle, root
        self._own = {path.split("/")[0].removesuffix(".py") for path in bundle.files if path.endswith(".py")}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._builtins = {**vars(builtins), "__import__": self._imported}

    def find_spec(self, fullname: str, _: object, __: object = None) -> ModuleSpec | None:
        """The module of a name, if it is one of the bundle's."""
        if fullname != self._root and not fullname.startswith(f"{self._root}."):
            return None
        place = self._place(fullname)
        inner = fullname[len(self._root) + 1 :].replace(".", "/")
        if place is None and inner and not any(p.startswith(f"{inner}/") for p in self._bundle.files):
            return None
        package = place is None or place.endswith("__init__.py")
        spec = ModuleSpec(
            fullname, self, origin=None if place is None else str(self._disk() / place), is_package=package
        )
        spec.has_location = place is not None
        return spec

    def get_source(self, fullname: str) -> str:
        """The source of a module; empty for a folder without one."""
        place = self._place(fullname)
        return "" if place is None else self._bundle.files[place].decode("utf-8-sig")

    def get_code(self, fullname: str) -> CodeType:
        """The code of a module, compiled from the approved bytes."""
        place = self._place(fullname)
        name = fullname if place is None else str(self._disk() / place)
        code: CodeType = compile(self.get_source(fullname), name, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        """Run a module; what it imports is looked for in the bundle first."""
        vars(module)["__builtins__"] = self._builtins
        exec(self.get_code(module.__name__), vars(module))

    def _place(self, fullname: str) -> str | None:
        inner = fullname[len(self._root) + 1 :].replace(".", "/")
        places = (f"{inner}.py", f"{inner}/__init__.py") if inner else ("__init__.py",)
        return next((place for place in places if place in self._bundle.files), None)

    def _imported(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """What ``import`` means in the bundle: its own modules by their plain names, and everything else as usual."""
        if level == 0 and name.partition(".")[0] in self._own:
            found = importlib.import_module(f"{self._root}.{name}")
            if not fromlist:
                return importlib.import_module(f"{self._root}.{name.partition('.')[0]}")
            for each in fromlist:
                if each != "*" and not hasattr(found, each) and self._known(f"{self._root}.{name}.{each}"):
                    importlib.import_module(f"{self._root}.{name}.{each}")
            return found
        return builtins.__import__(name, globals, locals, fromlist or (), level)

    def _known(self, fullname: str) -> bool:
        return self.find_spec(fullname, None) is not None

    def _disk(self) -> Path:
        """Where the files lie for code that opens data beside itself, and for tracebacks; gone with the process."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="foedus-task-", ignore_cleanup_errors=True)
            unpack(self._bundle, Path(self._folder.name) / "source")
        return Path(self._folder.name) / "source"
