"""Which tasks may run: source bundles that the owner has seen, approved or denied.

A bundle that comes from a server is filed here, unread by Python's importer: its bytes and where it came from. The
owner looks at it (``foedus tasks review``: its source, or what differs from the one approved before) and decides. Only
the training process imports it, and only after the rules have let it pass (``rules.task``).

Not here: what a bundle is (``net/bundle.py``), whether the server signed it (the agent checks that before it files it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from foedus.errors import ConfigurationError
from foedus.net.bundle import Bundle, differences, read_bundle
from foedus.net.identity.files import private_folder
from foedus.net.locks import in_turn
from foedus.record import files

__all__ = ["Approvals", "Decision", "Filed"]


class Decision(StrEnum):
    """What the owner decided of a task."""

    WAITING = "waiting"
    APPROVED = "approved"
    DENIED = "denied"


@dataclass(frozen=True, kw_only=True)
class Filed:
    """A task that came.

    Attributes:
        digest: SHA-256 of its source bundle, hex.
        target: the object in it, ``module:object``.
        server: which server sent it.
        came, decided: UTC, ISO 8601; ``decided`` is empty while it waits.
        decision: what the owner decided.
        who: who decided.
        listed: UTC: since when it may run by its digest, which somebody wrote into rules.toml or after ``--approve``;
            empty if it never could.
    """

    digest: str
    target: str
    server: str
    came: str
    decision: Decision = Decision.WAITING
    decided: str = ""
    who: str = ""
    listed: str = ""


class Approvals:
    """The tasks of an owner's folder.

    Args:
        folder: the owner's folder; ``approvals.json`` and ``bundles/`` lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._bundles = folder / "approvals.json", folder / "bundles"

    def tasks(self) -> list[Filed]:
        """All that came, the oldest first."""
        return list(self._read().values())

    def file(self, content: bytes, digest: bytes, *, target: str, server: str, when: float) -> Filed:
        """File a bundle that came; what was decided of it before still holds.

        Raises:
            BundleRefused: it is no bundle, or not the one that was announced.
        """
        bundle = read_bundle(content, digest)
        private_folder(self._bundles)
        path = self.path(bundle.digest.hex())
        if not path.exists() or path.read_bytes() != bundle.content:
            files.replace(path, bundle.content)
        with in_turn(self._file.with_suffix(".lock")):
            known = self._read()
            found = known.get(bundle.digest.hex())
            if found is None:
                found = Filed(digest=bundle.digest.hex(), target=target, server=server, came=_told(when))
                self._write({**known, found.digest: found})
        return found

    def note_listed(self, digest: bytes, *, when: float) -> None:
        """Note that a task runs by its digest, the first time that it does: nobody has decided here, and it runs."""
        with in_turn(self._file.with_suffix(".lock")):
            known = self._read()
            found = known.get(digest.hex())
            if found is not None and not found.listed:
                self._write({**known, found.digest: replace(found, listed=_told(when))})

    def path(self, digest: str) -> Path:
        """Where the bytes of a bundle lie."""
        return self._bundles / f"{digest}.bundle"

    def approved(self, digest: bytes) -> bool:
        """Whether the owner approved a bundle by hand."""
        found = self._read().get(digest.hex())
        return found is not None and found.decision is Decision.APPROVED

    def denied(self, digest: bytes) -> bool:
        """Whether the owner denied it."""
        found = self._read().get(digest.hex())
        return found is not None and found.decision is Decision.DENIED

    def find(self, prefix: str) -> Filed:
        """The one task whose digest begins so.

        Raises:
            ConfigurationError: there is none, or more than one.
        """
        found = [task for task in self.tasks() if task.digest.startswith(prefix.lower())]
        if len(found) != 1 or not prefix:
            known = ", ".join(task.digest[:16] for task in self.tasks())
            there = f"there is: {known}" if known else "no task has come yet"
            many = "no task's digest begins" if not found else "several tasks' digests begin"
            raise ConfigurationError(f"{many} with {prefix!r}; {there}")
        return found[0]

    def decide(self, prefix: str, decision: Decision, *, who: str, when: float) -> Filed:
        """Approve or deny a task; the latest decision holds.

        Args:
            prefix: the beginning of its digest.
            decision: what is decided.
            who: who decides.
            when: seconds since 1970.
        """
        with in_turn(self._file.with_suffix(".lock")):
            task = replace(self.find(prefix), decision=decision, decided=_told(when), who=who)
            self._write({**self._read(), task.digest: task})
        return task

    def bundle(self, task: Filed) -> Bundle:
        """The source of a task, checked against its digest."""
        return read_bundle(self.path(task.digest).read_bytes(), bytes.fromhex(task.digest))

    def before(self, task: Filed) -> Filed | None:
        """The task that was approved last before this one, of the same server and object."""
        alike = [
            t
            for t in self.tasks()
            if t.decision is Decision.APPROVED and (t.server, t.target) == (task.server, task.target)
        ]
        others = [t for t in alike if t.digest != task.digest]
        return max(others, key=lambda t: t.decided) if others else None

    def review(self, task: Filed) -> str:
        """What an owner reads: what differs from the task approved before, or all of the source if there is none."""
        before = self.before(task)
        return differences(None if before is None else self.bundle(before), self.bundle(task))

    def _read(self) -> dict[str, Filed]:
        if not self._file.exists():
            return {}
        try:
            told = json.loads(self._file.read_text("utf-8"))
            tasks = [Filed(**{**each, "decision": Decision(each["decision"])}) for each in told]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{self._file} is damaged ({error}). Delete it: every task then waits for approval again"
            ) from None
        return {task.digest: task for task in tasks}

    def _write(self, tasks: Mapping[str, Filed]) -> None:
        told = json.dumps([asdict(task) for task in tasks.values()], indent=1)
        files.replace(self._file, told.encode())


def _told(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
