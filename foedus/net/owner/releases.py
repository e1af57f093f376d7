"""What left this machine with noise of its own, so that it leaves once: of every run the last round, and how often.

Noise hides an update as long as there is one copy. A server that is given the same update with fresh noise again and
again takes the mean, and has it without. So what is sent for a round is written down here, before its first byte
leaves: sent again, it is the same bytes (they lie in the journal); other bytes for that round, or for an earlier one,
are declined, whatever the server says became of the first. A withdrawal of consent, a run's end, or another agent of
the same owner take nothing back.

What leaves under masks is no copy by itself: a client unmasks one sum of a round (``protocol/secagg``). It counts all
the same.

Not here: what an owner allows in all (``rules.py``), single examples (``spending.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from foedus.errors import OwnerRefuses
from foedus.net.locks import in_turn
from foedus.net.owner.tallies import read_tally, write_tally

__all__ = ["Release", "Releases"]


@dataclass(frozen=True)
class Release:
    """What is about to be noised and sent.

    Attributes:
        data: whose: the owner's name of the data.
        run: for what: server, its signing key, and the run.
        round, part: of the run.
        kind: the event that it is, as JSON (``privacy/events.py``); empty where it hides no whole client.
        masked: it leaves under masks only.
    """

    data: str
    run: str
    round: int
    part: int = 0
    kind: str = ""
    masked: bool = False

    def text(self) -> str:
        """As the journal keeps it; see :meth:`of`."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def of(text: str) -> Release:
        """What :meth:`text` wrote."""
        return Release(**json.loads(text))


class _Run(NamedTuple):
    """What has left for one run: which step last, with which digest, and how many of every kind."""

    round: int
    part: int
    digest: str
    kinds: Mapping[str, int]


class Releases:
    """The file.

    Example:
        >>> import tempfile
        >>> releases = Releases(Path(tempfile.mkdtemp()) / "releases.json")
        >>> first = Release("heart", "https://a study", 1)
        >>> releases.note(first, "ab")
        >>> releases.note(first, "ab")  # the same bytes, sent again
        >>> releases.note(first, "cd")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        foedus.errors.OwnerRefuses: what this client noised for round 1 of the run has left, ...
        >>> releases.count("heart")
        1
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, release: Release) -> bool:
        """Whether a release is new; false for one that is made once more under masks.

        Raises:
            OwnerRefuses: it would be noised afresh: something has left for this step of the run, or a later one.
        """
        return self._checked(self._read(), release, "")

    def note(self, release: Release, digest: str) -> None:
        """Write down what leaves; it is on the disk when this returns.

        Args:
            release: what it is.
            digest: of its bytes; empty under masks.

        Raises:
            OwnerRefuses: other bytes have left for this step, or any for a later one.
        """
        with in_turn(self._path.with_name(self._path.name + ".lock")):
            found = self._read()
            if not self._checked(found, release, digest):
                return
            runs = found.setdefault(release.data, {})
            kinds = Counter(runs[release.run].kinds) if release.run in runs else Counter[str]()
            kinds[release.kind] += 1
            runs[release.run] = _Run(release.round, release.part, digest, kinds)
            plain = {data: {run: each._asdict() for run, each in runs.items()} for data, runs in found.items()}
            write_tally(self._path, plain)

    def kinds(self, data: str) -> dict[str, int]:
        """How many updates of each kind have left of a data set, in all runs of all servers."""
        total = Counter[str]()
        for run in self._read().get(data, {}).values():
            total.update(run.kinds)
        return dict(total)

    def count(self, data: str) -> int:
        """How many updates have left of a data set with noise of its own, in all runs of all servers."""
        return sum(self.kinds(data).values())

    def _checked(self, found: Mapping[str, Mapping[str, _Run]], release: Release, digest: str) -> bool:
        """Whether this is new; false for what has left already and may leave again."""
        last = found.get(release.data, {}).get(release.run)
        step = release.round, release.part
        if last is None or (last.round, last.part) < step:
            return True
        if (last.round, last.part) == step and last.digest == digest and (digest or release.masked):
            return False
        which = f"round {release.round}" + (f", part {release.part}," if release.part else "")
        raise OwnerRefuses(
            f"what this client noised for {which} of the run has left, as far as round {last.round}, and its bytes are "
            "not here: noised afresh, the noise could be averaged out. It goes on with the next round"
        )

    def _read(self) -> dict[str, dict[str, _Run]]:
        return read_tally(
            self._path, _run, lost="It says what has left with noise: restore it from a copy. Without it nothing is "
            "noised, since it could be the second time",
        )  # fmt: skip


def _run(told: Mapping[str, object]) -> _Run:
    round, part, digest, kinds = (told[name] for name in _Run._fields)
    whole = [round, part, *(kinds.values() if isinstance(kinds, dict) else [None])]
    if not isinstance(digest, str) or not isinstance(kinds, dict) or any(type(n) is not int or n < 0 for n in whole):
        raise ValueError(f"{told} is no run")
    assert isinstance(round, int)
    assert isinstance(part, int)
    return _Run(round, part, digest, kinds)
