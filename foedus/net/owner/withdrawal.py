"""What a withdrawal of consent deletes on this machine, at once, whether or not an agent is running.

Not here: the words (``consent.py``).
"""

from __future__ import annotations

import contextlib

from foedus.net.journal import Journal
from foedus.net.owner.folder import OwnerFolder, file_name

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
        waiting = {key: about for key in journal.held() if (about := journal.about(key)) is not None}
        held = {key: about for key, about in waiting.items() if about.task.startswith(task)}
        for key in held:
            journal.drop(key)
        journal.forget_aside(task)
        runs = {file_name(about.run) for about in held.values()} if task else None
        if runs is None:
            journal.wipe()
    finally:
        journal.close()
    for path in folder.glob("kept-*"):
        if runs is None or any(path.name.startswith(f"kept-{run}.") for run in runs):
            with contextlib.suppress(OSError):
                path.unlink()
    return len(held)
