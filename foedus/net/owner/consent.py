"""Consent, recorded in plain words, and its withdrawal.

Consent says who agreed to what, when, and in which words, so that somebody who reads it in five years knows what was
agreed to. It is for one server, or for one task there. The records are added to and never changed; the latest one that
fits decides. Without consent nothing is trained and nothing leaves.

What a withdrawal undoes is said when it is made: it stops what comes, and it cannot take back what is in a model
already.

Not here: what the machine's owner allows in general (``rules.py``).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from foedus.errors import ConfigurationError
from foedus.record.files import storage

__all__ = ["EVERY_TASK", "WITHDRAWAL", "Consent", "Consents", "plain", "words"]

EVERY_TASK = ""


def plain(address: str) -> str:
    """A server's address as it is compared: people write it with a slash at its end, or in capitals.

    Example:
        >>> plain("HTTPS://Fl.Example.org:8765/")
        'https://fl.example.org:8765'
    """
    scheme, _, rest = address.strip().rstrip("/").partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower()}{slash}{path}" if rest else scheme.lower()


WITHDRAWAL = """\
What withdrawing undoes:
  - from now on nothing is trained here for this server, and nothing more is sent to it;
  - updates that wait on this machine to be sent, or to be sent again, are deleted;
  - what this machine kept between rounds for this server's runs is deleted.
What it cannot undo:
  - updates that were sent before are part of sums and models already: nobody can take one out of a sum, and a model
    that was published stays with whoever has it. To have a model trained anew without your data, ask whoever runs the
    server: the ledger says which rounds you were in (foedus ledger show).
"""


@dataclass(frozen=True, kw_only=True)
class Consent:
    """One record: given or withdrawn.

    Attributes:
        server: the server's address.
        task: a bundle's digest, or ``""`` for every task of that server.
        given: or withdrawn.
        who: who decided, as they call themselves.
        words: what they agreed to.
        when: UTC, ISO 8601.
    """

    server: str
    task: str = EVERY_TASK
    given: bool
    who: str
    words: str
    when: str


def words(server: str, *, data: str = "the data offered", task: str = EVERY_TASK) -> str:
    """What is agreed to, in plain words.

    Args:
        server: its address.
        data: what the data set is called.
        task: a bundle's digest, or ``""`` for every task.

    Example:
        >>> print(words("https://a.example", data="heart").splitlines()[0])
        I agree that models of https://a.example are trained on this machine with heart.
    """
    which = "for every task that my rules allow" if task == EVERY_TASK else f"for the task {task} only"
    return (
        f"I agree that models of {server} are trained on this machine with {data}.\n"
        f"This holds {which}, within the rules in rules.toml.\n"
        "The data itself stays here. What leaves is the change that training makes to a model, the number of examples, "
        "and the training's loss; each time it is written to the ledger before it leaves.\n"
        "I can withdraw at any time with `foedus consent withdraw`; what that cannot undo is said there."
    )


class Consents:
    """The records in a file.

    Example:
        >>> import tempfile
        >>> consents = Consents(Path(tempfile.mkdtemp()) / "consent.jsonl")
        >>> consents.holds("https://a")
        False
        >>> _ = consents.give("https://a", who="Dr Weiss", when=0.0)
        >>> consents.holds("https://a"), consents.holds("https://b")
        (True, False)
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def records(self) -> list[Consent]:
        """All of them, the latest last."""
        if not self._path.exists():
            return []
        found = []
        for number, line in enumerate(self._path.read_text("utf-8").splitlines(), 1):
            try:
                found.append(Consent(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigurationError(
                    f"line {number} of {self._path} is no record of consent ({error}). Correct it, or delete the "
                    "file and give consent anew: foedus consent give"
                ) from None
        return found

    def holds(self, server: str, task: str = EVERY_TASK) -> bool:
        """Whether there is consent for a task of a server: the latest record that fits decides."""
        fitting = [c for c in self.records() if c.server == server and c.task in (EVERY_TASK, task)]
        return bool(fitting) and fitting[-1].given

    def give(
        self, server: str, *, who: str, when: float, task: str = EVERY_TASK, data: str = "the data offered"
    ) -> Consent:
        """Record consent.

        Args:
            server: its address.
            who: who agrees.
            when: seconds since 1970.
            task: a bundle's digest, or ``""`` for every task of the server.
            data: what the data set is called.
        """
        return self._added(server, task, who, (True, words(server, data=data, task=task)), when)

    def withdraw(self, server: str, *, who: str, when: float, task: str = EVERY_TASK) -> Consent:
        """Record a withdrawal; the agent obeys it before its next step."""
        return self._added(server, task, who, (False, WITHDRAWAL), when)

    def _added(self, server: str, task: str, who: str, said: tuple[bool, str], when: float) -> Consent:
        if not who.strip():
            raise ConfigurationError("who consents? Write a name: foedus consent give --who 'Dr Weiss'")
        told = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        record = Consent(server=server, task=task, given=said[0], who=who, words=said[1], when=told)
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with storage(self._path), open(self._path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return record
