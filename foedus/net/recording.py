"""The run folder of a served run: the same plain files as a simulated one's.

What is true is in the store; the folder is written after it, and made whole again when a server starts, so that it can
be deleted, or lie on another machine after a take-over. Readers see whole lines only.

Not here: what a line says (``foedus/rounds/lines.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foedus.net.coordinator import METRICS, TIMINGS, Coordinator
from foedus.net.course import Course
from foedus.protocol.round import Phase
from foedus.record import files
from foedus.record.folder import CONFIGURATION, COSTS, MODEL
from foedus.rounds import start
from foedus.rounds.state import COSTS as COST_NAMES


class Recording:
    """Keeps the folders of all runs of a server.

    Args:
        coordinator: of the runs.
        folder: run NAME gets ``folder/NAME``.
    """

    def __init__(self, coordinator: Coordinator, folder: Path) -> None:
        self._coordinator, self._folder = coordinator, folder
        self._written: dict[tuple[str, str], int] = {}  # run and file → the last round that is in it
        self._status: dict[str, tuple[str, int]] = {}

    def path(self, run: str) -> Path:
        """The folder of a run."""
        return self._folder / run

    def update(self) -> None:
        """Write what has come since."""
        for course in self._coordinator.courses():
            self._update(course)

    def _update(self, course: Course) -> None:
        learning = course.learning
        if learning.state is None and course.state.phase is not Phase.OVER:
            return
        done = 0 if learning.state is None else learning.state.round
        over = course.state.phase is Phase.OVER
        settled = done - (1 if self._coordinator.evaluating(course.name) else 0)
        told = ("finished" if over else "running", settled)
        if self._status.get(course.name) == told:
            return
        folder = self.path(course.name)
        with files.storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TIMINGS):
            self._lines(course.name, name, settled)
        self._configure(course, told[0])
        if over:
            self._finish(course)
        self._status[course.name] = told

    def _lines(self, run: str, name: str, settled: int) -> None:
        """Add the lines of the rounds since; all of them, where the file is not what it should be."""
        path = self.path(run) / name
        if (run, name) not in self._written:
            whole = [text for number, text in self._coordinator.record(run, name, 0) if number <= settled]
            files.replace(path, "".join(whole).encode())
        else:
            since = self._written[run, name]
            fresh = [text for number, text in self._coordinator.record(run, name, since) if number <= settled]
            with files.storage(path), open(path, "ab") as file:
                file.write("".join(fresh).encode())
        self._written[run, name] = settled

    def _configure(self, course: Course, status: str) -> None:
        told: dict[str, Any] = course.learning.describe() | {
            "identity": course.learning.identity(), "executor": "served", "status": status, "foedus": start.versions(),
        }  # fmt: skip
        text = json.dumps(told, indent=2, ensure_ascii=False)
        files.replace(self.path(course.name) / CONFIGURATION, text.encode() + b"\n")

    def _finish(self, course: Course) -> None:
        """The final model, and what each client's part in it cost."""
        learning, state = course.learning, course.learning.state
        if state is None:
            return
        trainer, weights, folder = learning.trainer, state.weights, self.path(course.name)
        named = trainer.layout.unflatten(weights.vector) | trainer.buffer_layout.unflatten(weights.buffers)
        about = {"identity": learning.identity(), "round": str(state.round)}
        files.replace(folder / MODEL, files.tensors(named, about))
        ids = learning.job.clients.ids
        rows = (
            {"client": ids[c], **dict(zip(COST_NAMES, state.costs[c].tolist(), strict=True))}
            for c in state.paid().tolist()
        )
        files.replace(folder / COSTS, b"".join(files.json_line(row) for row in rows))
