"""What lies beside the database: models, orders, checkpoints, by the digest of their content.

A blob is named by its SHA-256, so that it never changes, may be written twice, and is checked whenever it is read. It
is written aside and renamed, so that a crash leaves a whole one or none. It may lie in a folder, in memory,
or in an object store.

Not here: which blobs clients may fetch (``coordinator``): partial sums lie here, too.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from foedus.errors import CheckpointError, ConfigurationError, FoedusError, MissingExtra, StorageError
from foedus.record import files

DIGITS = frozenset("0123456789abcdef")


class Blobs(Protocol):
    """Bytes by their digest. Laws, held by the conformance suite: what was put is got, byte for byte, or an error says
    why not; putting twice is putting once; what was removed is not there."""

    def put(self, content: bytes) -> str: ...

    def get(self, digest: str) -> bytes: ...

    def has(self, digest: str) -> bool: ...

    def remove(self, digest: str) -> None: ...

    def digests(self) -> Iterator[str]: ...


def name_of(content: bytes | bytearray | memoryview) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def open_blobs(place: str | Path) -> Blobs:
    """Where blobs lie.

    Args:
        place: a folder, ``"memory://"``, or an address that fsspec knows, e.g. ``"s3://bucket/foedus"``.

    Raises:
        MissingExtra: S3 without ``pip install 'foedus[s3]'``.
        ConfigurationError: no such kind of place.

    Example:
        >>> blobs = open_blobs("memory://example")
        >>> blobs.get(blobs.put(b"a model"))
        b'a model'
    """
    if isinstance(place, Path) or "://" not in place:
        return FolderBlobs(Path(place))
    return RemoteBlobs(str(place))


def tried(place: str | Path) -> Blobs:
    """:func:`open_blobs`, once a few bytes have been put there, got and removed: before anybody is told that there is a
    server.

    Raises:
        ConfigurationError: it does not work, and why.
    """
    blobs = open_blobs(place)
    content = b"whether anything can be kept here: " + secrets.token_bytes(16)
    try:
        digest = blobs.put(content)
        blobs.get(digest)
        blobs.remove(digest)
    except (StorageError, CheckpointError) as error:
        why = error.__cause__ or error
        told = why.strerror if isinstance(why, OSError) and why.strerror else f"{type(why).__name__}: {why}"
        raise ConfigurationError(
            f"models cannot be kept in {place}: {told}. Name another place (--blobs, or Serving(blobs=...)), or see "
            "to it that this one can be written"
        ) from error
    return blobs


class FolderBlobs:
    """Blobs in a folder, synced to disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, content: bytes) -> str:
        digest = name_of(content)
        path = self._path(digest)
        if not path.exists():
            with files.storage(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            files.replace(path, content)
        return digest

    def get(self, digest: str) -> bytes:
        try:
            content = self._path(digest).read_bytes()
        except OSError as error:
            raise _missing(digest, str(self._folder)) from error
        return _checked(content, digest, str(self._folder))

    def has(self, digest: str) -> bool:
        return self._path(digest).exists()

    def remove(self, digest: str) -> None:
        with files.storage(self._path(digest)):
            self._path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        for path in sorted(self._folder.glob("??/*")):
            if _is_digest(path.name):
                yield path.name

    def _path(self, digest: str) -> Path:
        return self._folder / _own(digest)[:2] / digest


class RemoteBlobs:
    """Blobs where fsspec reaches: memory, S3, and others."""

    def __init__(self, url: str) -> None:
        self._url, kind = url, url.partition("://")[0]
        try:
            import fsspec

            files: Any = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(error.name or "fsspec", "s3" if kind == "s3" else "net", f"The place {url}") from error
        except ValueError as error:
            raise ConfigurationError(f"{url} is no place that fsspec knows: {error}") from error
        self._files, self._root = files[0], str(files[1]).rstrip("/")

    def put(self, content: bytes) -> str:
        digest = name_of(content)
        path = self._path(digest)
        with self._storage():
            if not self._files.exists(path):
                aside = f"{self._root}/aside-{secrets.token_hex(8)}"
                self._files.pipe_file(aside, content)
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.mv(aside, path)
        return digest

    def get(self, digest: str) -> bytes:
        with self._storage():
            try:
                content: bytes = self._files.cat_file(self._path(digest))
            except FileNotFoundError as error:
                raise _missing(digest, self._url) from error
        return _checked(content, digest, self._url)

    def has(self, digest: str) -> bool:
        with self._storage():
            return bool(self._files.exists(self._path(digest)))

    def remove(self, digest: str) -> None:
        with self._storage(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(digest))

    def digests(self) -> Iterator[str]:
        with self._storage():
            try:
                found = sorted(self._files.find(self._root))
            except FileNotFoundError:
                found = []
        for path in found:
            name = str(path).rpartition("/")[2]
            if _is_digest(name):
                yield name

    def _path(self, digest: str) -> str:
        return f"{self._root}/{_own(digest)[:2]}/{digest}"

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except FoedusError:
            raise
        except Exception as error:  # every kind of place has errors of its own kind
            told = f"{type(error).__name__}: {error}"
            raise StorageError(f"{self._url} could not be read or written: {told}; it is tried again") from error


def _is_digest(name: str) -> bool:
    return len(name) == 64 and DIGITS.issuperset(name)


def _own(digest: str) -> str:
    """A digest, and nothing else: no path can be smuggled in."""
    if not _is_digest(digest):
        raise ConfigurationError(f"a blob is named by 64 hexadecimal digits, not {digest[:80]!r}")
    return digest


def _checked(content: bytes, digest: str, place: str) -> bytes:
    if name_of(content) != digest:
        raise CheckpointError(f"the blob {digest} in {place} is damaged: its content has another digest")
    return content


def _missing(digest: str, place: str) -> CheckpointError:
    return CheckpointError(f"there is no blob {digest} in {place}")
