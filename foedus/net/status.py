"""What a server's database says about its runs, for whoever looks at it from outside.

Not here: the same over HTTP (``http.py``).
"""

from __future__ import annotations

import json
from typing import Any

from foedus.net.course import EVALUATION
from foedus.net.store import FIRST_DIGEST, check_log, open_store
from foedus.protocol import round as machine
from foedus.protocol.round import At


def runs(url: str) -> list[dict[str, Any]]:
    """A row for every run: where it is, and how much of the round has come."""
    store = open_store(url)
    try:
        with store.begin() as rows:
            found, clients = rows.runs(), len(rows.clients())
            seats = {row.name: rows.seats(row.name) for row in found}
    finally:
        store.close()
    told = []
    for row in found:
        if row.name.endswith(EVALUATION):
            continue
        state = machine.read(row.state, ())
        here = [s.state for s in seats[row.name] if (s.round, s.attempt) == (state.round, state.attempt)]
        told.append({
            "run": row.name, "phase": str(state.phase), "round": state.round, "attempt": state.attempt,
            "seated": len(here), "counted": here.count(str(At.COUNTED)), "declined": here.count(str(At.DECLINED)),
            "clients": clients, "why": state.reason,
        })  # fmt: skip
    return told


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
