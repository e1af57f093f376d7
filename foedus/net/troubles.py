"""What keeps failing: told at once, then ever more rarely and with a count, and shown for as long as it lasts.

A disk that is full, or a bucket that nobody has a key for, fails at every look, ten times a second. A log in which that
stands ten times a second has room for nothing else, and nobody reads it; a server that says it once looks well an hour
later. So the same failure is told again after 10 seconds, after 20, after 40; it stands in ``/health`` and in a file
of the server's folder, which ``foedus status`` shows; and when it has not come for a while, that is told, too.

Not here: what is tried again, and when (``http.py``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from foedus.errors import FoedusError
from foedus.net.logs import say
from foedus.record import files

FILE = "troubles.json"
FIRST_S, LONGEST_S = 10.0, 600.0  # between two lines about the same
OVER_S = 5.0  # seconds after which what has not failed again is taken to work


@dataclass
class Trouble:
    """Something that failed, and has not worked since: what, the last reason, since when, how often."""

    what: str
    why: str
    since: float
    last: float
    times: int = 1


class Troubles:
    """What fails in one process; may be told from any thread.

    Args:
        clock: seconds since 1970.
        folder: the server's, where it is shown to whoever looks from outside; ``None`` for nowhere.

    Example:
        >>> now = [0.0]
        >>> troubles = Troubles(lambda: now[0])
        >>> for _ in range(50):
        ...     troubles.failed("tick failed", "the disk is full")
        >>> [(each.what, each.times) for each in troubles.lasting()]
        [('tick failed', 50)]
        >>> now[0] = 60.0
        >>> troubles.lasting()
        []
    """

    def __init__(self, clock: Callable[[], float], folder: Path | None = None) -> None:
        self._clock, self._path = clock, None if folder is None else folder / FILE
        self._found: dict[tuple[str, str], Trouble] = {}
        self._next: dict[tuple[str, str], tuple[float, float]] = {}  # when it is told again, and how long after that
        self._lock = threading.Lock()
        self._write()  # what another process left is over

    def failed(self, what: str, error: Exception | str, *, run: str = "") -> None:
        """Something failed: tell it, unless it was told a moment ago.

        Args:
            what: in two or three words that stay the same, as in the log.
            error: why; of what is no error of ours, the log has the trace.
            run: whose, if it is of one.
        """
        why = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        key, now = (what, f"{run}{why.partition(':')[0]}"), self._clock()
        with self._lock:
            found = self._found.get(key)
            if found is None:
                found = self._found[key] = Trouble(what, why, now, now)
                self._next[key] = now + FIRST_S, FIRST_S
            else:
                found.why, found.last, found.times = why, now, found.times + 1
                at, wait = self._next[key]
                if now < at:
                    return
                wait = min(2 * wait, LONGEST_S)
                self._next[key] = now + wait, wait
            self._write()
        told: dict[str, object] = {"run": run} if run else {}
        if found.times > 1:
            told |= {"times": found.times, "seconds": round(now - found.since)}
        elif isinstance(error, Exception) and not isinstance(error, FoedusError):
            told["trace"] = "".join(traceback.format_exception(error))
        say(what, level=logging.ERROR, error=why, **told)

    def lasting(self) -> list[Trouble]:
        """What fails at present, the oldest first; tells what no longer does."""
        now = self._clock()
        with self._lock:
            over = [key for key, each in self._found.items() if now - each.last > OVER_S]
            gone = [self._found.pop(key) for key in over if self._next.pop(key)]
            if gone:
                self._write()
            found = list(self._found.values())
        for each in gone:
            if each.times > 1:
                say("works again", after=each.what, times=each.times, seconds=round(each.last - each.since))
        return found

    def _write(self) -> None:
        """For whoever looks from outside; a disk that is full is no further trouble."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._found:
                content = json.dumps([asdict(each) for each in self._found.values()], ensure_ascii=False)
                files.replace(self._path, content.encode())
            else:
                self._path.unlink(missing_ok=True)


def shown(folder: Path) -> list[Trouble]:
    """What fails in the server of a folder, as it last said."""
    try:
        return [Trouble(**each) for each in json.loads((folder / FILE).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []
