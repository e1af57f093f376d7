"""Who a request comes from, once it has been let in.

A message never says who sent it: the transport finds out and says so beside it. A client is known by a *name*, which
people read, and a *position*, a whole number counted from 0 in order of enrolment and fixed for ever, from which its
counted randomness comes, exactly as in simulation.

Not here: how it is found out (``access.py``).
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import NamedTuple

from foedus.errors import EnrolmentRefused, NotAllowed

__all__ = ["OPERATE", "TRAIN", "Caller", "Scope", "checked_name", "read", "token_digest", "written"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Scope(StrEnum):
    """What somebody may do."""

    TRAIN = "train"  # check in, fetch, upload
    READ = "read"  # see runs and their figures
    OPERATE = "operate"  # start and stop runs, invite, revoke


TRAIN = frozenset({Scope.TRAIN, Scope.READ})  # a client's
OPERATE = frozenset({Scope.OPERATE, Scope.READ})  # whoever runs the server


def written(scope: frozenset[Scope]) -> str:
    """A scope as it stands in a database or a ticket.

    >>> written(TRAIN)
    'read train'
    """
    return " ".join(sorted(scope))


def read(text: str) -> frozenset[Scope]:
    """A scope that was written; words of a later version count for nothing.

    >>> read("train fly") == {Scope.TRAIN}
    True
    """
    return frozenset(Scope(word) for word in text.split() if word in Scope.__members__.values())


class Caller(NamedTuple):
    """Who asks, and what they may.

    Example:
        >>> Caller(3, "clinic", frozenset({Scope.TRAIN})).may(Scope.TRAIN)
        >>> Caller(3, "clinic", frozenset({Scope.TRAIN})).may(Scope.OPERATE)
        Traceback (most recent call last):
        foedus.errors.NotAllowed: 'clinic' may train, and this needs operate. Ask whoever runs the server

    Attributes:
        position: counted from 0 in order of enrolment; −1 for operators, who do not train.
        name: unique on the server.
        scope: what it may do.
    """

    position: int
    name: str
    scope: frozenset[Scope]

    def may(self, scope: Scope) -> None:
        """Raise `NotAllowed` unless the caller has this scope."""
        if scope not in self.scope:
            has = written(self.scope) or "nothing"
            raise NotAllowed(f"{self.name!r} may {has}, and this needs {scope}. Ask whoever runs the server")


def checked_name(name: str) -> str:
    """A name that is safe in files, logs and certificates.

    >>> checked_name("st-mary.north")
    'st-mary.north'
    """
    if not _NAME.fullmatch(name):
        raise EnrolmentRefused(
            f"{name[:80]!r} cannot be a name: 1 to 63 of A–Z, a–z, 0–9, '.', '_' and '-', beginning with a letter or a "
            "digit, e.g. clinic-north"
        )
    return name


def token_digest(token: str) -> bytes:
    """What stands for a join token. It has 192 random bits, so that a plain hash cannot be searched."""
    return hashlib.sha256(b"foedus join token\x00" + token.strip().encode()).digest()
