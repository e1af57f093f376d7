"""What a server's database says about its runs, for whoever looks at it from outside.

Not here: the same over HTTP (``http.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from foedus.net.course import DECRYPTION, EVALUATION, Course
from foedus.net.store import FIRST_DIGEST, RunRow, SeatRow, check_log, open_store
from foedus.protocol import round as machine
from foedus.protocol.round import At, State


def runs(url: str) -> list[dict[str, Any]]:
    """A row for every run: where it is, and how much of the round has come."""
    store = open_store(url)
    try:
        with store.begin() as rows:
            clients = len(rows.clients())
            states = {row.name: _state(row, rows.seats(row.name)) for row in rows.runs()}
    finally:
        store.close()
    return [
        _told(name, state, states.get(name + DECRYPTION)) | {"clients": clients, "why": state.reason}
        for name, state in states.items()
        if not name.endswith((EVALUATION, DECRYPTION))
    ]  # fmt: skip


def enrolled(url: str) -> int:
    """How many clients have enrolled."""
    store = open_store(url)
    try:
        with store.begin() as rows:
            return len(rows.clients())
    finally:
        store.close()


def _state(row: RunRow, seats: list[SeatRow]) -> State:
    """A run as it was written, with all the seats of its round."""
    found = machine.read(row.state, ())
    return machine.read(row.state, [Course.seat(seat) for seat in seats if seat.round == found.round])


def _told(name: str, state: State, decryption: State | None) -> dict[str, Any]:
    here = [seat.at for seat in state.seats.values() if seat.attempt == state.attempt]
    declined = Counter(state.declined())
    if decryption is not None and decryption.round == state.round:
        declined.update(decryption.declined())
    return {
        "run": name, "phase": state.told, "round": state.round, "attempt": state.attempt, "seated": len(here),
        "minimum": state.minimum, "counted": here.count(At.COUNTED), "declined": dict(declined.most_common()),
    }  # fmt: skip


def audit(url: str) -> list[str]:
    """The audit log, a line of JSON each.

    Raises:
        StorageError: a line was changed, or one is missing.
    """
    found: list[str] = []
    store, digest = open_store(url), FIRST_DIGEST
    try:
        while True:
            with store.begin() as rows:
                lines = rows.notes(after=len(found))
            if not lines:
                return found
            digest = check_log(lines, digest)
            told = ({"number": n, "at": at, "kind": kind, **dict(what)} for n, at, kind, what, _ in lines)
            found += [json.dumps(line, ensure_ascii=False) for line in told]
    finally:
        store.close()
