"""The owner's ledger: everything that left this machine, written down before it leaves.

One line of JSON per departure: when, to whom, for which task, how many bytes, their digest, and under which
protections. Every line carries the hash of the one before it, so that a line that is changed, left out or put
elsewhere is found. Lines cut off at the end leave a chain that is whole; so the last hash, the *head*, is kept in a
file beside it, and whoever notes it down elsewhere has a receipt that not even the writer of both files can go back
on.

A line is on the disk before the first byte leaves. A line torn by a power cut stands for nothing that left, and is
dropped at the next start.

Not here: what privacy was spent (``privacy/ledger.py``); what a server counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from foedus.errors import LedgerBroken
from foedus.net.locks import in_turn
from foedus.record.files import replace, storage

__all__ = ["Departure", "Entry", "Ledger"]

NOTHING = "0" * 64  # what comes before the first line


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Something that is about to leave.

    Attributes:
        to: the server's address and pinned key.
        what: in plain words, e.g. ``"update"``, ``"update, sent again"``, ``"figures of an evaluation"``.
        run, round, attempt: of which round.
        task: digest of the source bundle and the object in it.
        bytes: how many.
        digest: SHA-256 of them, hex.
        protections: in plain words, e.g. ``"summed with at least 3 others"``.
    """

    to: str
    what: str
    run: str = ""
    round: int = 0
    attempt: int = 0
    task: str = ""
    bytes: int
    digest: str
    protections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: what left, when, and the hash of the line before."""

    number: int
    when: str
    departure: Departure
    before: str

    @property
    def hash(self) -> str:
        """Of the whole line."""
        return hashlib.sha256(self._told().encode()).hexdigest()

    def line(self) -> bytes:
        """The line as it is written."""
        return (self._told() + "\n").encode()

    def _told(self) -> str:
        told = {"number": self.number, "when": self.when, **asdict(self.departure), "before": self.before}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


class Ledger:
    """The ledger in a file; ``PATH.head`` beside it holds how many lines there are, and the last one's hash.

    Args:
        path: of the file, e.g. ``ledger.jsonl``; made when something leaves for the first time.

    Raises:
        LedgerBroken: a line was changed, moved or cut off.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger.jsonl")
        >>> entry = ledger.write(Departure(to="https://a", what="update", bytes=12, digest="00"), when=0.0)
        >>> entry.when, ledger.bytes, ledger.verify() == entry.hash
        ('1970-01-01T00:00:00Z', 12, True)
    """

    def __init__(self, path: Path) -> None:
        self._path, self._head_path = path, path.with_name(path.name + ".head")
        self.count, self.bytes, self.head = 0, 0, NOTHING
        with self._in_turn():
            self._mend()
            self._read_all()

    def write(self, departure: Departure, *, when: float) -> Entry:
        """Write down what is about to leave; it is on the disk when this returns.

        Args:
            departure: what leaves.
            when: seconds since 1970.
        """
        told = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._in_turn():
            if self._remembered() != (self.count, self.head):  # another agent of this owner has written since
                self._read_all()
            entry = Entry(self.count + 1, told, departure, self.head)
            with storage(self._path), open(self._path, "ab") as file:
                file.write(entry.line())
                file.flush()
                os.fsync(file.fileno())
            self.count, self.bytes, self.head = entry.number, self.bytes + departure.bytes, entry.hash
            self._remember()
        return entry

    def entries(self) -> Iterator[Entry]:
        """All lines in their order, each checked against the one before."""
        before = NOTHING
        for number, line in enumerate(self._lines(), 1):
            entry = self._read(number, line)
            if entry.number != number or entry.before != before:
                raise LedgerBroken(
                    f"line {number} of {self._path} does not follow the line before it: something was changed, moved "
                    "or taken out there. Compare it with a copy; what stands before that line is as it was written"
                )
            before = entry.hash
            yield entry

    def verify(self, head: str | None = None) -> str:
        """Check every line, and that none was cut off; the head.

        Args:
            head: a head that was noted down earlier: it must still be in the chain.
        """
        hashes = [entry.hash for entry in self.entries()]
        self._check_remembered(hashes)
        if head is not None and head not in (NOTHING, *hashes):
            raise LedgerBroken(
                f"the head {head} that was noted down is not in {self._path}: the ledger was cut, or written anew, "
                "since"
            )
        return hashes[-1] if hashes else NOTHING

    def _read_all(self) -> None:
        self.count, self.bytes, self.head = 0, 0, NOTHING
        for entry in self.entries():
            self.count, self.bytes, self.head = entry.number, self.bytes + entry.departure.bytes, entry.hash
        self._check_remembered()

    def _in_turn(self) -> AbstractContextManager[None]:
        """One agent after another: several of one owner write to one ledger."""
        return in_turn(self._path.with_name(self._path.name + ".lock"))

    def _lines(self) -> list[bytes]:
        return self._path.read_bytes().splitlines() if self._path.exists() else []

    def _read(self, number: int, line: bytes) -> Entry:
        try:
            told: dict[str, Any] = json.loads(line)
            names = {field.name for field in fields(Departure)}
            given: dict[str, Any] = {n: tuple(told[n]) if n == "protections" else told[n] for n in names}
            departure = Departure(**given)
            entry = Entry(told["number"], told["when"], departure, told["before"])
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerBroken(
                f"line {number} of {self._path} cannot be read ({type(error).__name__}: {error}): it was changed"
            ) from None
        if entry.line().rstrip(b"\n") != line:  # the same values written otherwise are a change, too
            raise LedgerBroken(f"line {number} of {self._path} is not as it was written: it was changed")
        return entry

    def _mend(self) -> None:
        """Drop a last line that a power cut tore: nothing left under it."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with storage(self._path), open(self._path, "r+b") as file:
                file.truncate(whole)

    def _remember(self) -> None:
        replace(self._head_path, f"{self.count} {self.head}\n".encode())

    def _check_remembered(self, hashes: list[str] | None = None) -> None:
        """Refuse a ledger that is shorter than it was; one line more was written just before a power cut."""
        known = [entry.hash for entry in self.entries()] if hashes is None else hashes
        if not self._head_path.exists() and len(known) > 1:
            raise LedgerBroken(f"{self._head_path} is missing: it says how long {self._path} was. Restore it")
        count, head = self._remembered()
        if count < 0 or count > len(known) or (count and known[count - 1] != head):
            raise LedgerBroken(
                f"{self._path} has {len(known)} lines, and {self._head_path} remembers {count}, with another last one: "
                "lines were cut off or written anew"
            )
        if len(known) > count + 1:
            raise LedgerBroken(f"{self._path} has {len(known) - count} lines that {self._head_path} knows nothing of")
        if len(known) == count + 1:
            self._remember()

    def _remembered(self) -> tuple[int, str]:
        """How many lines there were, and the last one's hash; −1 if that cannot be read."""
        if not self._head_path.exists():
            return 0, NOTHING
        count, _, head = self._head_path.read_text("utf-8", errors="replace").strip().partition(" ")
        return (int(count) if count.isdecimal() and count.isascii() else -1), head
