"""Shakespeare by role: predict the next character; every speaking role of every play is a client.

A role's lines, in reading order, are one text, with a line break after each line. The first 80 % of the
lines (rounded down) are for training, the rest, at least one line, for testing; roles of a single line
are left out (McMahan et al. 2017, section 3). A text is cut into windows of 80 characters; the target
at each place is the character that follows. The last window of a text is filled up with `PADDING`, and its
targets there are `IGNORED`, which torch's ``cross_entropy`` leaves out by itself. The first input of a text
is `PADDING` too, so that every character of the text is a target exactly once.

Source of the split: B. McMahan et al., AISTATS 2017; the text is in the public domain.
"""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foedus.core.population import Examples
from foedus.data.dataset import Dataset
from foedus.data.sources import read
from foedus.errors import ConfigurationError

__all__ = ["CHARACTERS", "IGNORED", "PADDING", "decode", "encode", "shakespeare", "tiny_shakespeare"]

CHARACTERS: Final = "\n" + "".join(chr(code) for code in range(32, 127))
"""The vocabulary: a line break and printable ASCII; character c has number ``CHARACTERS.index(c) + 1``."""

PADDING: Final = 0
"""The number that fills windows up; with it there are 97 classes."""

IGNORED: Final = -100
"""The target of a place that does not count."""

_NUMBERS: Final = np.zeros(128, np.int64)
_NUMBERS[[ord(c) for c in CHARACTERS]] = np.arange(1, len(CHARACTERS) + 1)


def shakespeare(*, window: int = 80, minimum_lines: int = 2) -> Dataset:
    """37 plays by role: int64 [n, window] characters, int64 [n, window] the ones that follow.

    Natural clients: ``shakespeare().clients()`` gives 1,229 roles, named "play/ROLE", each with its own
    test examples. 97 classes: `PADDING` and `CHARACTERS`.

    Args:
        window: characters per example.
        minimum_lines: roles of fewer lines are left out; at least 2.

    Raises:
        DataNotFound: the file is not there. This edition is not offered for download: put the file where the
            message says, or use `tiny_shakespeare`.
        DataCorrupt: the file is damaged, or another one.

    Example:
        >>> shakespeare().clients()  # doctest: +SKIP
        Clients(1,229 clients, 43,676 examples, resident)
    """
    lines: dict[str, list[str]] = {}
    for record in read("shakespeare/speeches.jsonl.gz").splitlines():
        speech = json.loads(record)
        lines.setdefault(f"{speech['play']}/{speech['role']}", []).extend(speech["lines"])
    return _dataset("shakespeare", lines, window, minimum_lines)


def tiny_shakespeare(*, window: int = 80, minimum_lines: int = 2) -> Dataset:
    """One million characters of several plays by speaker's name; arguments as for `shakespeare`.

    Natural clients: 268 names. Plays are not told apart, so that equal names fall together.

    Source: A. Karpathy, char-rnn, 2015.
    Raises:
        DataNotFound: the files are not there and cannot be downloaded.
        DataCorrupt: a file is damaged, or another one.

    Example:
        >>> tiny_shakespeare().clients()  # doctest: +SKIP
        Clients(268 clients, 10,354 examples, resident)
    """
    lines: dict[str, list[str]] = {}
    for speech in read("shakespeare/tinyshakespeare.txt").decode("ascii").split("\n\n"):
        name, _, said = speech.strip().partition(":\n")
        lines.setdefault(name.removesuffix(":"), []).extend(said.splitlines())
    return _dataset("tiny_shakespeare", lines, window, minimum_lines)


def encode(text: str) -> NDArray[np.int64]:
    """The numbers of a text's characters; one that is not in `CHARACTERS` becomes `PADDING`.

    Example:
        >>> decode(encode("To be, or not to be"))
        'To be, or not to be'
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.where(codes < 128, _NUMBERS[np.minimum(codes, 127)], PADDING)


def decode(numbers: ArrayLike) -> str:
    """The text of these numbers; `PADDING` and what lies outside the vocabulary is left out."""
    return "".join(CHARACTERS[n - 1] for n in np.asarray(numbers).ravel().tolist() if 0 < n <= len(CHARACTERS))


def _dataset(name: str, lines: dict[str, list[str]], window: int, minimum_lines: int) -> Dataset:
    if window < 1 or minimum_lines < 2:
        raise ConfigurationError(
            f"window must be at least 1 and minimum_lines at least 2 (to train, to test on), and they "
            f"are {window} and {minimum_lines}."
        )
    kept = {role: said for role, said in lines.items() if len(said) >= minimum_lines}
    cuts = {role: len(said) * 4 // 5 for role, said in kept.items()}  # each below len(said)
    train, trained = _part({role: said[: cuts[role]] for role, said in kept.items()}, window)
    test, tested = _part({role: said[cuts[role] :] for role, said in kept.items()}, window)
    return Dataset(
        name,
        train,
        test,
        classes=("padding", *CHARACTERS),
        groups={"role": trained},
        test_groups={"role": tested},
        about="Shakespeare by role, split as in McMahan et al. 2017",
    )


def _part(lines: dict[str, list[str]], window: int) -> tuple[Examples, NDArray[Any]]:
    """The windows of all roles, and whose each one is."""
    texts = [encode("\n".join(said) + "\n") for said in lines.values()]
    counts = [-(-len(text) // window) for text in texts]
    inputs = [_cut(np.concatenate([[PADDING], text[:-1]]), window, PADDING) for text in texts]
    targets = [_cut(text, window, IGNORED) for text in texts]
    return Examples((np.concatenate(inputs),), np.concatenate(targets)), np.repeat(list(lines), counts)


def _cut(values: NDArray[np.int64], window: int, fill: int) -> NDArray[np.int64]:
    """The values in rows of ``window``, the last one filled up: [row, window]."""
    return np.pad(values, (0, -len(values) % window), constant_values=fill).reshape(-1, window)
