"""A server's log: one JSON object per line, on standard error; and the shapes of device sessions.

A session is a few characters, one per thing that happened, which together say at a glance what becomes of clients
(Bonawitz et al. 2019, table 1): ``-`` checked in, ``v`` fetched its orders, ``[`` began to train, ``]`` has trained,
``+`` uploaded, ``^`` was received, ``#`` was told that it is too late or was refused, ``!`` was interrupted. Most
should be ``-v[]+^``.

Names of clients, addresses and keys never stand in the log; positions do.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import IO, Any

NAME = "foedus.server"


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "at": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage(),
        }  # fmt: skip
        told |= getattr(record, "told", {})
        if record.exc_info and record.exc_info[1] is not None:
            told["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class _Unheard(logging.Handler):
    """Where nobody has asked for a log: what fails, in full; all else is for a log. (Python itself would print the
    event of every warning, without what is told of it.)"""

    def emit(self, record: logging.LogRecord) -> None:
        """To standard error, unless another handler has it."""
        others = [*logger().handlers, *(logging.getLogger().handlers if logger().propagate else ())]
        if record.levelno < logging.ERROR or any(other is not self for other in others):
            return
        told: dict[str, Any] = getattr(record, "told", {})
        trace = f"{told['trace']}" if "trace" in told else ""
        rest = "".join(f"; {name}: {value}" for name, value in told.items() if name not in ("error", "trace"))
        print(f"foedus: {record.getMessage()}: {told.get('error', '')}{rest}\n{trace}", file=sys.stderr, end="")


def logger() -> logging.Logger:
    """The server's logger."""
    return logging.getLogger(NAME)


def to_stream(stream: IO[str] | None = None, *, level: int = logging.INFO) -> logging.Handler:
    """Write the server's log to a stream, by default standard error; give it back to take it away again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Lines())
    logger().addHandler(handler)
    logger().setLevel(level)
    logger().propagate = False
    return handler


def say(event: str, *, level: int = logging.INFO, **told: Any) -> None:
    """Write one line.

    Args:
        event: what happened, in two or three words that stay the same.
        level: as in ``logging``.
        told: figures and texts, by name.
    """
    logger().log(level, event, extra={"told": told})


logger().addHandler(_Unheard())
