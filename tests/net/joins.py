"""Clients that join from threads of their own, and whom no test waits for without limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def each(act: Callable[[int], T], parts: Sequence[int], *, seconds: float) -> list[T]:
    """What everybody gave who acted at the same time.

    The first failure is raised at once, and so is that time is over: whoever is still at it is left to the end of the
    process, since nothing can end a thread.
    """
    gave: queue.Queue[tuple[int, T | None, BaseException | None]] = queue.Queue()

    def acted(part: int) -> None:
        try:
            gave.put((part, act(part), None))
        except BaseException as error:
            gave.put((part, None, error))

    for part in parts:
        threading.Thread(target=acted, args=(part,), daemon=True, name=f"part {part}").start()
    found: dict[int, T] = {}
    end = time.monotonic() + seconds
    while missing := [part for part in parts if part not in found]:
        try:
            part, value, error = gave.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"{missing} have not come back in {seconds} s") from None
        if error is not None:
            raise error
        found[part] = value  # type: ignore[assignment]
    return [found[part] for part in parts]
