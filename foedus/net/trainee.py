"""The training process, from inside: data, one task, one model; asked over a pipe, behind walls.

    python -m foedus.net.trainee        started by ``training.py``, by nobody else

It puts up the walls before it reads anything (``sandbox.py``), and imports a task's code only from the source bundle
that the agent names, which its owner approved. It trains with the very code of the simulator (``rounds/debug.py``,
``rounds/parcel.py``), so a served round gives the bits of a simulated one. What it prints goes to the agent's log;
what it answers is plain values and bytes.

Not here: what is asked when (``agent.py``).
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from foedus.errors import ConfigurationError, DataError, FoedusError
from foedus.net.pipe import Frame, receive, send
from foedus.net.sandbox import Limits, allow_seconds, enter

__all__ = ["main"]


HERE = ". The batch is on this exception as .batch"  # and the exception stays here, with the data


def main() -> None:
    """Answer requests until there are no more."""
    requests, answers = _pipes()
    first = receive(requests)
    if first is None:
        return
    limits = Limits(**first.said["limits"])
    walls = enter(limits)
    send(answers, {"ok": True, "network": walls.network, "strict": walls.strict, "limits": list(walls.limits)})
    from foedus.net.bench import Bench  # numpy comes with it: not before the walls are up

    bench = Bench(Path.cwd())
    while (asked := receive(requests)) is not None:
        allow_seconds(limits.seconds, limits.cores)
        _answer(answers, bench, asked)


def _answer(answers: BinaryIO, bench: Any, asked: Frame) -> None:
    try:
        said, blobs = bench.do(asked.said, asked.blobs)
    except (ConfigurationError, DataError, FoedusError) as error:
        said, blobs = {"ok": False, "kind": type(error).__name__, "told": str(error).removesuffix(HERE)}, ()
    except BaseException as error:  # whatever the code of a task or of the owner raises, SystemExit too
        traceback.print_exc()
        said, blobs = {"ok": False, "kind": type(error).__name__, "told": f"{type(error).__name__}: {error}"}, ()
    send(answers, {"ok": True, **said}, blobs)


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the agent; whatever prints or reads afterwards meets others."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, answers


if __name__ == "__main__":
    main()
