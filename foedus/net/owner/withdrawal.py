"""What a withdrawal of consent deletes on this machine, at once, whether or not an agent is running.

Not here: the words (``consent.py``).
"""

from __future__ import annotations

import contextlib

from foedus.net.journal import Journal
from foedus.net.owner.folder import OwnerFolder

__all__ = ["forget"]


def forget(owner: OwnerFolder, server: str, task: str = "") -> int:
    """Delete what waits to be sent to a server, and what is kept between its rounds; how many updates that were.

    Args:
        owner: the owner's folder.
        server: the server's address.
        task: only what is of the bundle of this digest, or a prefix of it; ``""`` for all.
    """
    folder = owner.server(server)
    if not (folder / "agent.sqlite").exists():
        return 0
    journal = Journal(folder / "agent.sqlite")
    try:
        held = [each for each in journal.held() if each.task.startswith(task)]
        for each in held:
            journal.drop(each.key)
        runs = {each.run for each in held} if task else None
        if runs is None:
            journal.wipe()
    finally:
        journal.close()
    for path in folder.glob("kept-*"):
        if runs is None or path.stem.removeprefix("kept-") in runs:
            with contextlib.suppress(OSError):
                path.unlink()
    return len(held)
