"""What of a round under way may lie on a disk, encrypted: partial sums under a key that is only in memory, and, in mode
``sealed``, updates under a key of the round that is destroyed at its end.

The key for partial sums lies in a file system that is in memory (``/dev/shm`` on Linux): it outlives the process, so
that a killed server goes on, and not the machine. Where there is none, partial sums are not written at all, and after a
restart everybody is asked to send again. The round's key of ``sealed`` lies in the database, itself encrypted under the
operator's: deleting it makes the updates of the round unreadable, wherever copies of them may be.

AES-256-GCM by ``cryptography``. Not here: when something is written (``coordinator``).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from foedus.errors import CheckpointError, ConfigurationError

MEMORY = Path("/dev/shm")
KEY = 32
NONCE = 12


class Vault:
    """Encrypts and decrypts under one key.

    Example:
        >>> vault = Vault(bytes(32))
        >>> vault.open(vault.seal(b"a sum", b"round 1"), b"round 1")
        b'a sum'
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(key) != KEY:
            raise ConfigurationError(f"a sealing key has {KEY} bytes, and this one {len(key)}")
        self._cipher = AESGCM(key)

    def seal(self, content: bytes, about: bytes) -> bytes:
        """Encrypted; ``about`` has to be given again to open it."""
        nonce = secrets.token_bytes(NONCE)
        return nonce + self._cipher.encrypt(nonce, content, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """What was sealed.

        Raises:
            CheckpointError: by another key, about something else, or damaged.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:NONCE], sealed[NONCE:], about)
        except (InvalidTag, ValueError) as error:
            raise CheckpointError("what was sealed cannot be opened: it is of another key, or damaged") from error


def in_memory(folder: Path, *, memory: Path = MEMORY) -> Vault | None:
    """The vault for a server's partial sums, whose key is never on a disk; ``None`` where there is no such place.

    Args:
        folder: the server's; every folder has a key of its own.
        memory: a file system that is in memory.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    path = memory / f"foedus-sums-{os.getuid() if hasattr(os, 'getuid') else 0}-{name}"
    with suppress(OSError):
        return Vault(_kept(path))
    return None


def of_file(path: Path) -> Vault:
    """The operator's vault; the key is made if there is none.

    Raises:
        ConfigurationError: the file is no key.
    """
    try:
        return Vault(_kept(path))
    except OSError as error:
        raise ConfigurationError(f"the sealing key {path} cannot be read or made: {error}") from error


def _kept(path: Path) -> bytes:
    """The key in a file that only its owner can read; made if there is none."""
    with suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY))
    about = os.lstat(path)
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o077):
        raise PermissionError(f"{path} is not this user's alone")
    return path.read_bytes()
