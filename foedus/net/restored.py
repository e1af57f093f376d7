"""What a run that was put back from a backup does not know: rounds that took place after the backup was made.

Their models were shown, whatever the backup says. Made again with fresh noise, they would be released twice and counted
once; and clients that have answered a masked or encrypted round answer no other of it. So whoever restores says how far
each run had come; its next round is the one after that, and the budget pays for those between. Written beside the run,
as a line of a file of its own, and heeded whenever a server loads it (``coordinator/recovery.py``).

Not here: copying (``backup.py``).
"""

from __future__ import annotations

import json
from typing import NamedTuple

from foedus.net.store import Transaction

FILE = "restored"


class Gap(NamedTuple):
    """From the last round that a backup knows to the last that had begun.

    Attributes:
        round: the backup's last committed round.
        reached: the last that had begun, at the least; ``None`` if nobody has said.
    """

    round: int
    reached: int | None


def put_gap(rows: Transaction, run: str, gap: Gap) -> None:
    """Write down that a run was put back."""
    rows.put_line(run, FILE, gap.round, json.dumps(gap._asdict()) + "\n")


def gap_of(rows: Transaction, run: str) -> Gap | None:
    """The gap of a run, if it was put back; that of the last time."""
    found = rows.lines(run, FILE, after=-1)
    return Gap(**json.loads(found[-1][1])) if found else None


__all__ = ["Gap", "gap_of", "put_gap"]
